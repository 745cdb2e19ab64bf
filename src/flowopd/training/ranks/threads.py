"""How many threads a small network wants on the CPU."""

from __future__ import annotations

import os

import torch
from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

SMALL = 5e6
"""Parameters below which one thread is taken. Two cores, ms per training step of ``tests/benchmarks/threads.py``, one
thread and two: 34 and 22 for the 1.7 M of the tiles world where nothing else runs, 270 and 9 000 beside other work
(threads wait for one another in turns, hundreds of times per step); 400 and 200, 2 000 and 10 000 for 9 M."""

CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Threads(Callback):
    """Runs a small network in one thread on the CPU, unless ``OMP_NUM_THREADS`` says how many."""

    def __init__(self) -> None:
        self._before: int | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._choose(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._choose(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._choose(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._choose(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._before is not None:
            torch.set_num_threads(self._before)
        self._before = None

    def _choose(self, trainer: Trainer, module: LightningModule) -> None:
        if self._before is not None or trainer.strategy.root_device.type != "cpu" or any(map(os.environ.get, CHOSEN)):
            return
        if sum(parameter.numel() for parameter in module.parameters()) < SMALL:
            self._before = torch.get_num_threads()
            torch.set_num_threads(1)

"""Benchmarks as a run of ``flowopd test``: many models, the same noise, scored once and never again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from flowopd.core.names import perhaps
from flowopd.core.ranges import at_least
from flowopd.core.schedules import Schedule, ShiftedSchedule
from flowopd.evaluation import save_png
from flowopd.evaluation.benchmark import Benchmark
from flowopd.evaluation.comparison import Sheet, Summary, compare, write_comparison
from flowopd.evaluation.ledger import Ledger, Picture, missing
from flowopd.evaluation.tables import show
from flowopd.models import Backbone
from flowopd.records import Prompt
from flowopd.rollouts import Sampler
from flowopd.teachers import Teacher
from flowopd.teachers.base import guidance_of
from flowopd.teachers.composed import parts_of
from flowopd.training.ranks.strategies import FSDP2, check_trainer
from flowopd.training.rollout_data import RolloutLoader

BENCHMARKS = "benchmarks"
"""Where a run keeps its records and pictures, by benchmark and model."""


@dataclass(frozen=True)
class Round:
    """Some prompts for one model to draw.

    Args:
        model, name: of the model, and of the benchmark.
        benchmark: the benchmark.
        prompts: by their numbers.
        counted: False if another rank draws them too, and this one only keeps step.
    """

    model: str
    name: str
    benchmark: Benchmark
    prompts: Mapping[int, Prompt]
    counted: bool = True


class Contenders(LightningModule):
    """Models to compare: velocity fields on one frozen backbone.

    Args:
        backbone: the frozen model.
        models: by the names they have in the tables, each with its own guidance; drift is measured against the first.
        schedule: the grid of noise levels; default: SD3's, shifted by 3.

    Raises:
        ValueError: if there is no model, or a name is no name of a folder.
    """

    def __init__(self, backbone: Backbone, models: dict[str, Teacher], schedule: Schedule | None = None) -> None:
        super().__init__()
        if not models:
            raise ValueError("there is no model to score; name one in `models`")
        _check_folders("model", models)
        self.backbone = backbone
        self.models = dict(models)
        self.schedule = schedule or ShiftedSchedule()
        self.network: nn.Module | None = None
        self.unscored: dict[str, list[str]] = {}
        """By benchmark, what no picture has a score of."""

    @property
    def data(self) -> Benchmarks:
        """What they are scored on."""
        return cast(Benchmarks, self.trainer.datamodule)  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Load the backbone and attach every model.

        Raises:
            ValueError: naming a model that does not fit.
        """
        if self.network is not None:
            return
        check_trainer(self.trainer)
        self.backbone.load(self.trainer.strategy.root_device)
        for name, model in self.models.items():
            try:
                model.attach(self.backbone)
            except (ValueError, OSError) as error:
                raise ValueError(f"model {name!r} cannot be scored: {error}") from error
        self.network = self.backbone.network
        if isinstance(self.trainer.strategy, FSDP2):
            self.trainer.strategy.shard(self.network)

    def identity(self, name: str) -> dict[str, Any]:
        """What the pictures of a model follow from, besides the benchmark."""
        model = self.models[name]
        return {
            "base": str(getattr(self.backbone, "identity", type(self.backbone).__name__)),
            "resolution": getattr(self.backbone, "resolution", None),
            "schedule": repr(self.schedule),
            "weights": model.fingerprint(),
            "guidance": [[guidance_of(part), getattr(part, "embedded_guidance", None)] for part in parts_of([model])],
        }

    def on_test_start(self) -> None:
        """Sign the folders of what is drawn."""
        if self.trainer.is_global_zero:
            for name, benchmark in self.data.benchmarks.items():
                for model in self.models:
                    self.data.ledger(name, model).sign(self.identity(model) | benchmark.identity())
        self.trainer.strategy.barrier()

    @torch.no_grad()
    def test_step(self, batch: Round | None, batch_idx: int) -> None:
        """Draw, score, and write down; nothing, if all is done."""
        if batch is None:
            return
        with self.trainer.precision_plugin.forward_context():
            images = self.draw(batch)
        if batch.counted:
            pictures = batch.benchmark.scored(images, batch.prompts)
            self.data.keep(batch, pictures, images, self.trainer.global_rank)

    def draw(self, batch: Round) -> Tensor:
        """Pictures (P · n, 3, H, W) in [0, 1] of P prompts, the n of a prompt next to each other."""
        benchmark, shape = batch.benchmark, self.backbone.latent_shape()
        noise = torch.cat([benchmark.noise(prompt, shape) for prompt in batch.prompts.values()]).to(self.device)
        texts = [prompt.text for prompt in batch.prompts.values() for _ in range(benchmark.images_per_prompt)]
        sampler, field = Sampler(benchmark.steps, self.schedule), self.models[batch.model].velocity
        parts = [slice(i, i + self.data.batch_size) for i in range(0, len(texts), self.data.batch_size)]
        drawn = [sampler.draw(field, self.backbone.encode(texts[part]), noise[part]) for part in parts]
        return torch.cat([self.backbone.decode(latents) for latents in drawn])

    def on_test_epoch_end(self) -> None:
        """Write the tables, of what is there now and was there before."""
        self.trainer.strategy.barrier()
        sheets = self.data.sheets(list(self.models))
        self.unscored = {name: _unscored(models.values()) for name, models in sheets.items()}
        if self.trainer.is_global_zero:
            tables = compare(sheets, self.data.summary, self.data.references(self.models))
            write_comparison(tables, self.data.folder.parent)
            show(next(iter(tables.values())))
            print(f"\nall tables: {self.data.folder.parent / 'results.md'}", flush=True)


class Benchmarks(LightningDataModule):
    """What ``Contenders`` are scored on. Records are kept, so that a run that was stopped goes on where it was.

    Every picture is in ``<run>/benchmarks/<benchmark>/<model>``, as PNG and as a line with its prompt, seed and scores.
    ``flowopd test`` in the same folder draws only what is missing: more models, benchmarks and prompts may be added.

    Args:
        benchmarks: by the names they have in the tables.
        batch_size: pictures drawn at a time; the pictures of a prompt stay together.
        save_pictures: whether pictures are saved, and not their scores alone.
        summary: the table that is read first.
        against: models that all others are compared with, pair by pair; default: the first.

    Raises:
        ValueError: if there is no benchmark, or a name is no name of a folder.
    """

    def __init__(
        self,
        benchmarks: dict[str, Benchmark],
        batch_size: int = 64,
        save_pictures: bool = True,
        summary: Summary | None = None,
        against: list[str] | None = None,
    ) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size)
        if not benchmarks:
            raise ValueError("there is no benchmark; name one in `benchmarks`")
        _check_folders("benchmark", benchmarks)
        if summary is not None:
            summary.check(benchmarks)
        self.benchmarks = dict(benchmarks)
        self.batch_size = batch_size
        self.save_pictures = save_pictures
        self.summary = summary
        self.against = against
        self._prompts: dict[str, list[Prompt]] = {}

    @property
    def contenders(self) -> Contenders:
        """Who is scored."""
        assert self.trainer is not None
        return cast(Contenders, self.trainer.lightning_module)

    @property
    def folder(self) -> Path:
        """Of all records of the run."""
        assert self.trainer is not None
        return Path(self.trainer.default_root_dir) / BENCHMARKS

    def ledger(self, name: str, model: str) -> Ledger:
        """The records of a model on a benchmark."""
        return Ledger(self.folder / name / model)

    def setup(self, stage: str) -> None:
        """Refuse what is no comparison, before any long work.

        Raises:
            ValueError: saying what is missing.
        """
        assert self.trainer is not None
        if self.trainer.state.fn != TrainerFn.TESTING or not isinstance(self.trainer.lightning_module, Contenders):
            raise ValueError("benchmarks are for `flowopd test` with model flowopd.Contenders")
        if self.trainer.limit_test_batches != 1.0:
            raise ValueError("trainer.limit_test_batches would leave prompts out; give benchmarks a smaller count")
        self.references(self.contenders.models)
        self._prompts = {name: benchmark.prompts() for name, benchmark in self.benchmarks.items()}
        for name, benchmark in self.benchmarks.items():
            for prompt in self._prompts[name]:
                benchmark.group_of(prompt)

    def references(self, models: Mapping[str, Teacher]) -> list[str]:
        """Whom all others are compared with.

        Raises:
            ValueError: if one of them is no model of the run.
        """
        for name in self.against or ():
            if name not in models:
                raise ValueError(
                    f"against names {name!r}{perhaps(name, models)}; the models are {', '.join(map(repr, models))}"
                )
        return list(models)[:1] if self.against is None else self.against

    def test_dataloader(self) -> RolloutLoader:
        """What is not scored yet, of every model and benchmark.

        Raises:
            ValueError: if records are there that others made.
        """
        assert self.trainer is not None
        rounds = [
            batch
            for name, benchmark in self.benchmarks.items()
            for model in self.contenders.models
            for batch in self._rounds(name, benchmark, model)
        ]
        self.trainer.strategy.barrier()  # before anybody writes, all have read
        texts = dict.fromkeys(prompt.text for batch in rounds for prompt in batch.prompts.values())

        def batches() -> Iterator[Round | None]:
            self.contenders.backbone.prepare(list(texts))
            yield from rounds
            if not rounds:
                yield None

        return RolloutLoader(batches, max(len(rounds), 1))  # of nothing, lightning would not come to the tables

    def _rounds(self, name: str, benchmark: Benchmark, model: str) -> list[Round]:
        """This rank's share of what a model has to draw; batches are the same for any number of ranks."""
        assert self.trainer is not None
        ledger, prompts = self.ledger(name, model), self._prompts[name]
        ledger.check(self.contenders.identity(model) | benchmark.identity(), [prompt.text for prompt in prompts])
        lacking = missing(ledger.pictures(), len(prompts), benchmark.images_per_prompt)
        size = max(1, self.batch_size // benchmark.images_per_prompt)
        chunks = [range(i, min(i + size, len(prompts))) for i in range(0, len(prompts), size)]
        left = [[number for number in chunk if number in lacking] for chunk in chunks]
        rounds = [Round(model, name, benchmark, {n: prompts[n] for n in numbers}) for numbers in left if numbers]
        return _dealt(rounds, self.trainer.global_rank, self.trainer.world_size)

    def keep(self, batch: Round, pictures: Sequence[Picture], images: Tensor, rank: int) -> None:
        """Write pictures to their place, and then their records."""
        ledger = self.ledger(batch.name, batch.model)
        if self.save_pictures:
            name = batch.benchmark.file_of
            pictures = [replace(one, file=name(one.prompt, one.image, one.text)) for one in pictures]
            for picture, image in zip(pictures, images, strict=True):
                save_png(image, ledger.folder / str(picture.file))
        ledger.append(pictures, rank)

    def sheets(self, models: Sequence[str]) -> dict[str, dict[str, Sheet]]:
        """All records, by benchmark and model."""
        return {
            name: {model: Sheet.of(name, benchmark, self.ledger(name, model).pictures()) for model in models}
            for name, benchmark in self.benchmarks.items()
        }

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:  # noqa: ANN401
        """Noise is drawn where it is needed."""
        return batch


def _dealt(rounds: list[Round], rank: int, ranks: int) -> list[Round]:
    """Every ``ranks``-th, as many for each rank; who has none left draws a last one along, which does not count."""
    along = [replace(rounds[-1], counted=False)] * (-len(rounds) % ranks) if rounds else []
    return [*rounds, *along][rank::ranks]


def _check_folders(kind: str, names: Mapping[str, object]) -> None:
    for name in names:
        if not name or name.startswith(".") or "/" in name or "\\" in name:
            raise ValueError(
                f"a {kind} is called {name!r}, which is no name of a folder; use letters, digits and dashes"
            )


def _unscored(sheets: Any) -> list[str]:  # noqa: ANN401
    """Scores that failed on every picture of every model."""
    found = list(sheets)
    return [
        score
        for score in found[0].names()
        if all(bool(s.scores[score].isnan().all()) for s in found if score in s.scores)
    ]

"""One OPD optimiser step on random weights of Stable Diffusion 3.5 Medium's size, part by part.

Two teachers and MAR, 16 images of 512 pixels, ten steps of which nine are trained, guidance 4.5:

    python tests/benchmarks/sd35_step.py --folded              on a GPU: the default road, two trained steps
    python tests/benchmarks/sd35_step.py                       the same as the public code: all steps, a guided student
    python tests/benchmarks/sd35_step.py --folded --checkpointing --rows 4        on one of 24 GB
    python tests/benchmarks/sd35_step.py --cpu                 the true size in 8 GB of main memory: one picture, folded
    python tests/benchmarks/sd35_step.py --tiny                anywhere

The FLOP of the forwards that were made, by the second, stand beside what a plain product of bfloat16 matrices reaches.
"""

import argparse
import json
import resource
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning import Callback, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flowopd.core import Anchored, ShiftedSchedule, TransitionKL, Uniform
from flowopd.models import LoRASpec, SD3Backbone
from flowopd.models.adapters.files import save_adapter
from flowopd.models.adapters.lora import Adapter, Factors, take_adapter
from flowopd.preflight.costs import now, seconds_of, trace
from flowopd.preflight.plan import Hardware, Plan, plan
from flowopd.preflight.shapes import ADAPTER, Shapes, materialise
from flowopd.records import Conditioning, Prompt
from flowopd.rollouts import Sampler, SpreadSteps
from flowopd.teachers import LoRATeacher
from flowopd.training import AnchorCallback, OPDStudent, RolloutDataModule, TeacherCallback

PARTS = ("rollout forward", "teachers", "anchor", "student forward", "backward", "optimiser", "the rest")
GUIDANCE = 4.5
TINY = {
    "transformer": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "sample_size": 8,
        "pos_embed_max_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "qk_norm": "rms_norm",
        "dual_attention_layers": [0],
    },
    "vae": {"block_out_channels": [4, 8], "down_block_types": ["DownEncoderBlock2D"] * 2, "norm_num_groups": 2}
    | {"up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4},
    "text_encoder": {"max_position_embeddings": 16, "hidden_size": 16, "num_attention_heads": 2},
    "text_encoder_2": {"max_position_embeddings": 16, "hidden_size": 16, "num_attention_heads": 2},
}


class Clock(Callback):
    """Seconds by part, of the iterations after the first."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = Counter[str]()
        self.total = 0.0
        self.static = 0
        self.rows = Counter[bool]()
        """Rows of the transformer, by whether they are trained."""
        self._optimiser = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = now(self.device)
        yield
        self.seconds[name] += now(self.device) - started

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.seconds.clear()
        self.rows.clear()
        self.total = -now(self.device)
        if self.device == "cuda":
            self.static = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self._optimiser = now(self.device)

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if self._optimiser:
            self.seconds["optimiser"] += now(self.device) - self._optimiser
            self._optimiser = 0.0

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.total += now(self.device)
        self.seconds["the rest"] = self.total - sum(self.seconds.values())


class RandomSD3(SD3Backbone):
    """A backbone of random numbers, whose texts are encoded as random numbers; its rows are counted."""

    clock: Clock

    def load(self, device: torch.device | str = "cpu") -> None:
        if self._network is None:
            self._network = Shapes(self).transformer()
            materialise(self._network, device)
            if self.activation_checkpointing:
                self._network.enable_gradient_checkpointing()

    def latent_shape(self) -> tuple[int, int, int]:
        return Shapes(self).latent

    def prepare(self, texts: Sequence[str]) -> None:
        """Nothing to read."""

    def encode(self, texts: Sequence[str]) -> Conditioning:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Shapes(self).text(len(texts), "cpu").to(self._device())

    def _forward(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        self.clock.rows[torch.is_grad_enabled()] += len(x)
        return super()._forward(x, sigma, cond)


class TimedStudent(OPDStudent):
    """An OPD student that is watched."""

    clock: Clock

    def rollout(self, draw):
        with self.clock.part("rollout forward"):
            return super().rollout(draw)

    def training_step(self, batch, batch_idx: int) -> Tensor:
        with self.clock.part("student forward"):
            return super().training_step(batch, batch_idx)

    def backward(self, loss: Tensor, *args, **kwargs) -> None:
        with self.clock.part("backward"):
            super().backward(loss, *args, **kwargs)


class TimedTeacher(LoRATeacher):
    """A teacher that is watched."""

    def __init__(self, path: str, clock: Clock, part: str) -> None:
        super().__init__(path, guidance_scale=GUIDANCE)
        self.clock, self.part = clock, part

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        with self.clock.part(self.part):
            return super().velocity(x, sigma, cond)


class Words:
    """Texts of one task."""

    def __init__(self, task: str) -> None:
        self.task = task

    def draw(self, count: int, seed: int) -> list[Prompt]:
        return [Prompt(f"{self.task} {seed} {i}", self.task) for i in range(count)]


def random_adapter(shapes: Shapes, folder: Path, seed: int) -> str:
    """Save an adapter of random numbers."""
    empty = take_adapter(shapes.adapted(LoRASpec()), ADAPTER)
    noise = torch.Generator().manual_seed(seed)
    parts = {}
    for module, part in empty.parts.items():
        a, b = (0.01 * torch.randn(factor.shape, generator=noise) for factor in (part.a, part.b))
        parts[module] = Factors(a, b, part.scale)
    save_adapter(Adapter(parts), folder)
    return str(folder)


def recipe(options: argparse.Namespace, clock: Clock, folder: Path):
    """Policy, data and callbacks."""
    where = {
        "path": "stabilityai/stable-diffusion-3.5-medium",
        "resolution": options.resolution,
        "max_sequence_length": 128,
    }
    if options.tiny:
        where = {"path": str(tiny_configs(folder / "model")), "dtype": "float32", "max_sequence_length": 0}
    backbone = RandomSD3(**where, activation_checkpointing=options.checkpointing)
    backbone.clock = clock
    drawn = {"steps": SpreadSteps(2)} if options.folded else {"guidance_scale": GUIDANCE}
    sampler = Sampler(num_steps=options.steps, schedule=ShiftedSchedule(), **drawn)
    policy = TimedStudent(backbone, Anchored(TransitionKL(Uniform()), weighting=Uniform()), sampler=sampler)
    policy.clock = clock
    tasks = {task: Words(task) for task in ("geneval", "ocr")[: options.images]}
    data = RolloutDataModule(tasks, options.images, batch_size=options.rows, fused=options.fused or options.folded)
    shapes = Shapes(backbone)
    anchor, *paths = (random_adapter(shapes, folder / str(seed), seed) for seed in range(3))
    teachers = [
        TeacherCallback([task], TimedTeacher(path, clock, "teachers")) for task, path in zip(tasks, paths, strict=False)
    ]
    return policy, data, [*teachers, AnchorCallback(TimedTeacher(anchor, clock, "anchor"))]


def tiny_configs(folder: Path) -> Path:
    """A model's configs without its weights."""
    for part, config in TINY.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    return folder


def main(words: Sequence[str] | None = None) -> dict:
    """Run, print a table, and return what it says."""
    options = parsed(words)
    device = "cuda" if torch.cuda.is_available() and not (options.tiny or options.cpu) else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        clock = Clock(device)
        policy, data, callbacks = recipe(options, clock, Path(scratch))
        accumulate = policy.batches_per_rollout() * options.images // options.rows
        precision = "32-true" if options.tiny else options.precision
        hardware = Hardware(accumulate=accumulate, autocast="mixed" in precision)
        planned, before = plan(policy, data, callbacks, hardware), resident()
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(
            accelerator=device,
            devices=1,
            max_epochs=1 if options.cpu else 2,
            precision=precision,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=1.0,
            callbacks=[*callbacks, clock],
            limit_val_batches=0,
            num_sanity_val_steps=0,
            **quiet,
        )
        cost = trace(Shapes(policy.backbone), LoRASpec(), hardware.autocast)
        trainer.fit(policy, data)
    flop = sum(clock.rows.values()) * cost.forward + clock.rows[True] * cost.backward
    return report(options, clock, planned, flop, before)


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--cpu", action="store_true", help="one picture of 256 pixels, folded, on the CPU")
    parser.add_argument("--folded", action="store_true", help="the default road: guidance folded, two steps, fused")
    parser.add_argument("--fused", action="store_true", help="the forward that trains also advances the trajectory")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--images", type=int, default=16, help="images of an optimiser step")
    parser.add_argument("--rows", type=int, default=16, help="images of one forward")
    parser.add_argument("--resolution", type=int, default=512, help="side of an image in pixels")
    parser.add_argument("--steps", type=int, default=10, help="of a rollout")
    parser.add_argument("--precision", default="bf16-mixed", help="of lightning's trainer")
    parser.add_argument("--folder", type=Path, help="where to write sd35_step.json")
    given = parser.parse_args(words)
    if given.cpu:
        parser.set_defaults(folded=True, images=1, rows=1, resolution=256)
    return parser.parse_args(words)


def report(options: argparse.Namespace, clock: Clock, planned: Plan, flop: float, before: int) -> dict:
    """The figures of the last iteration, printed and written."""
    on_gpu = clock.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident() - before
    unread = planned.resident["autoencoder"]
    reached, ceiling = flop / 1e12 / clock.total, matmul_tflops(clock.device, 256 if options.tiny else 4096)
    found = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "options": {name: str(value) for name, value in vars(options).items()},
        "seconds": {part: clock.seconds[part] for part in PARTS},
        "seconds_in_all": clock.total,
        "pictures_per_second": options.images / clock.total,
        "forwards": sum(clock.rows.values()),
        "forwards_trained": clock.rows[True],
        "tflop": flop / 1e12,
        "tflop_per_second": reached,
        "tflop_per_second_of_matrices": ceiling,
        "utilisation": reached / ceiling,
        "static_gb": clock.static / 1e9 if on_gpu else None,
        "static_gb_planned": (planned.static() - unread) / 1e9,
        "peak_gb": peak / 1e9,
        "peak_gb_planned": (planned.static() - unread + sum(planned.training.values())) / 1e9,
    }
    show(found)
    if options.folder is not None:
        (options.folder / "sd35_step.json").write_text(json.dumps(found, indent=1))
    return found


def resident() -> int:
    """The most bytes of main memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_tflops(device: str, side: int) -> float:
    """TFLOP a second of a product of square matrices in bfloat16."""
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    return 2 * side**3 / 1e12 / seconds_of(lambda: matrix @ matrix, device, repeats=5)


def show(found: dict) -> None:
    table = Table(f"one optimiser step on {found['device']}", "seconds")
    for part in PARTS:
        table.add_row(part, f"{found['seconds'][part]:.3f}")
    table.add_section()
    table.add_row("in all", f"{found['seconds_in_all']:.3f}", style="bold")
    rest = [name for name in found if name not in ("device", "options", "seconds", "seconds_in_all")]
    for name in rest:
        table.add_row(name.replace("_", " "), "" if found[name] is None else f"{found[name]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()

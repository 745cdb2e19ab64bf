"""One folded OPD step on random weights of a published model's size: seconds and memory beside what ``plan`` says.

Two teachers and the base as the anchor, each with guidance; the student has none, and two of ten steps are trained on
the fused road, as in configs/sd35/opd_folded.yaml. Nothing is downloaded.

    python tests/benchmarks/family_step.py                                 Z-Image, on a GPU of 80 GB
    python tests/benchmarks/family_step.py --family flux1 --rows 8         zimage, qwen_image, flux1 or flux2_klein
    python tests/benchmarks/family_step.py --path FOLDER --side 16 --tokens 96     another model, on the CPU too
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning import Callback, Trainer

from flowopd import DiffusersBackbone, Flux2KleinBackbone, FluxBackbone, QwenImageBackbone, ZImageBackbone
from flowopd.core import Anchored, TransitionKL
from flowopd.core.schedules import Schedule
from flowopd.models import LoRASpec
from flowopd.models.adapters.files import save_adapter
from flowopd.models.adapters.lora import Adapter, Factors, take_adapter
from flowopd.preflight.costs import now
from flowopd.preflight.plan import Hardware, plan
from flowopd.preflight.shapes import ADAPTER, Shapes, materialise
from flowopd.records import Conditioning, Prompt
from flowopd.rollouts import Sampler, SpreadSteps
from flowopd.teachers import BaseTeacher, LoRATeacher
from flowopd.training import AnchorCallback, OPDStudent, RolloutDataModule, TeacherCallback

FAMILIES = {  # with the guidance of teachers and anchor, and tokens of a text, as in the recipes
    "zimage": (ZImageBackbone, "Tongyi-MAI/Z-Image", 5.0, 256),
    "qwen_image": (QwenImageBackbone, "Qwen/Qwen-Image", 4.0, 256),
    "flux1": (FluxBackbone, "black-forest-labs/FLUX.1-dev", 1.0, 512),
    "flux2_klein": (Flux2KleinBackbone, "black-forest-labs/FLUX.2-klein-base-4B", 4.0, 512),
}


def random(kind: type[DiffusersBackbone]) -> type[DiffusersBackbone]:
    """A family whose weights and encoded texts are random numbers."""

    class Random(kind):
        def load(self, device: torch.device | str = "cpu") -> None:
            if self._network is None:
                self._network = Shapes(self).transformer()
                materialise(self._network, device)
                if self.activation_checkpointing:
                    self._network.enable_gradient_checkpointing()

        def latent_shape(self) -> tuple[int, int, int]:
            return Shapes(self).latent

        def schedule(self) -> Schedule:
            return Shapes(self).schedule()

        def prepare(self, texts: Sequence[str]) -> None:
            """Nothing to read."""

        def encode(self, texts: Sequence[str]) -> Conditioning:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return Shapes(self).text(len(texts), "cpu").to(self._device())

    return Random


@dataclass
class Words:
    """Texts of one task."""

    task: str

    def draw(self, count: int, seed: int) -> list[Prompt]:
        return [Prompt(f"{self.task} {seed} {i}", self.task) for i in range(count)]


class Clock(Callback):
    """Seconds of the last iteration, and memory before it and at its worst moment."""

    seconds = static = 0.0

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if torch.cuda.is_available():
            self.static = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.seconds = -now(str(pl_module.device))

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.seconds += now(str(pl_module.device))


def random_adapter(shapes: Shapes, folder: Path) -> str:
    """Save an adapter of random numbers."""
    parts = {}
    for module, part in take_adapter(shapes.adapted(LoRASpec()), ADAPTER).parts.items():
        a, b = (0.01 * torch.randn(factor.shape) for factor in (part.a, part.b))
        parts[module] = Factors(a, b, part.scale)
    save_adapter(Adapter(parts), folder)
    return str(folder)


def main(words: Sequence[str] | None = None) -> dict:
    """Run two iterations, print figures of the second, and return them."""
    options = parsed(words)
    kind, path, guidance, tokens = FAMILIES[options.family]
    on_gpu = torch.cuda.is_available()
    where = {"resolution": options.side, "dtype": "bfloat16" if on_gpu else "float32"}
    where["max_sequence_length"] = options.tokens or tokens
    backbone = random(kind)(options.path or path, **where, activation_checkpointing=not options.keep)
    sampler = Sampler(num_steps=10, steps=SpreadSteps(2))
    policy = OPDStudent(backbone, Anchored(TransitionKL(), strength=0.02), sampler=sampler)
    tasks = {task: Words(task) for task in ("geneval", "ocr")}
    data = RolloutDataModule(tasks, options.images, batch_size=options.rows, fused=True, evaluation_count=0)
    accumulate, clock = policy.batches_per_rollout() * options.images // options.rows, Clock()
    with tempfile.TemporaryDirectory() as scratch:
        paths = {task: random_adapter(Shapes(backbone), Path(scratch, task)) for task in tasks}
        signals = [TeacherCallback([task], LoRATeacher(paths[task], guidance_scale=guidance)) for task in tasks]
        callbacks = [*signals, AnchorCallback(BaseTeacher(guidance))]
        planned = plan(policy, data, callbacks, Hardware(accumulate=accumulate, autocast=on_gpu))
        names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        Trainer(
            accelerator="gpu" if on_gpu else "cpu",
            devices=1,
            max_epochs=2,
            precision="bf16-mixed" if on_gpu else "32-true",
            accumulate_grad_batches=accumulate,
            gradient_clip_val=1.0,
            callbacks=[*callbacks, clock],
            limit_val_batches=0,
            num_sanity_val_steps=0,
            **dict.fromkeys(names, False),
        ).fit(policy, data)
    tflop = sum(planned.flop.values()) / 1e12
    found = {
        "model": backbone.path,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "seconds": clock.seconds,
        "seconds_per_picture": clock.seconds / options.images,
        "forwards_per_picture": planned.rows() / planned.pictures,
        "tflop_per_picture": tflop / planned.pictures,
        "tflop_per_second": tflop / clock.seconds,
        "static_gb": clock.static / 1e9,
        "static_gb_planned": (planned.static() - planned.resident["autoencoder"]) / 1e9,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
        "peak_gb_planned": (planned.static() + sum(planned.training.values())) / 1e9,
    }
    print(json.dumps(found, indent=1))
    return found


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="zimage")
    parser.add_argument("--path", help="another model of the family: a folder with its configs")
    parser.add_argument("--side", type=int, default=512, help="pixels of a picture's side")
    parser.add_argument("--tokens", type=int, help="of a text; default: as many as in the recipes")
    parser.add_argument("--images", type=int, default=16, help="images of an optimiser step")
    parser.add_argument("--rows", type=int, default=16, help="images of one forward")
    parser.add_argument("--keep", action="store_true", help="keep activations instead of computing them again")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()

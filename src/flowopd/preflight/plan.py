"""What a run will take, before any weight is read: memory by part, forwards and TFLOP per optimiser step.

Shapes come from configs and live on the meta device, so nothing is allocated. Forwards are counted by running the
recipe's own code for an iteration on a backbone that only counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flowopd.models import AdapterSource, LoRASpec, Merge
from flowopd.models.adapters.lora import adapter_parameters
from flowopd.preflight.costs import Cost, Speed, decode_flop, measure, trace
from flowopd.preflight.forwards import DECODED, TRAINED, count_forwards
from flowopd.preflight.shapes import ADAPTER, Shapes, adapter_spec, nbytes
from flowopd.rewards.model import resident_bytes
from flowopd.teachers import FullTeacher, LoRATeacher
from flowopd.training.callbacks.ema import EMA
from flowopd.training.policy import FlowPolicy
from flowopd.training.rollout_data import RolloutDataModule
from flowopd.training.signals import RewardCallback, Signals, signals_among

GB = 1e9


@dataclass(frozen=True)
class Hardware:
    """What a run is spread over.

    Args:
        ranks: processes on all nodes, a device each.
        sharded: whether a rank keeps only its part of the weights (``fsdp2``).
        autocast: whether linear layers run in half precision whatever their weights are (``bf16-mixed``).
        accumulate: micro-batches per optimiser step.
    """

    ranks: int = 1
    sharded: bool = False
    autocast: bool = False
    accumulate: int = 1

    @staticmethod
    def asked(trainer: Mapping[str, Any]) -> Hardware:
        """What the ``trainer`` section of a config asks for."""
        return Hardware(
            ranks=device_count(trainer.get("devices")) * int(trainer.get("num_nodes") or 1),
            sharded="fsdp2" in str(trainer.get("strategy")).lower(),
            autocast="mixed" in str(trainer.get("precision")),
            accumulate=int(trainer.get("accumulate_grad_batches") or 1),
        )


@dataclass(frozen=True)
class Plan:
    """What a run takes on every rank.

    Args:
        resident: bytes on the device that are there all the time, by part.
        training: bytes on the device while a step is trained.
        transient: bytes on the device that come and go at other moments, one part at a time.
        for_comparison: bytes in main memory, and what activations would take with and without checkpointing.
        forwards: rows of the transformer per optimiser step, by whose they are.
        flop: FLOP per optimiser step, by whose they are.
        notes: what was assumed.
    """

    resident: dict[str, float]
    training: dict[str, float]
    transient: dict[str, float]
    for_comparison: dict[str, float]
    forwards: dict[str, float]
    flop: dict[str, float]
    notes: list[str]

    def static(self) -> float:
        """Bytes of what is there all the time."""
        return sum(self.resident.values())

    def peak(self) -> float:
        """Bytes at the worst moment."""
        return self.static() + max(sum(self.training.values()), *self.transient.values())


def plan(policy: FlowPolicy, data: RolloutDataModule, callbacks: Sequence[Callback], hardware: Hardware) -> Plan:
    """Plan a fit; nothing is read but configs, and nothing that is given is changed.

    Raises:
        ValueError: if the shapes of the backbone cannot be known without a download.
    """
    shapes, notes = Shapes(policy.backbone), list[str]()
    checkpointing = shapes.backbone.activation_checkpointing
    cost = trace(shapes, student_spec(policy, notes), hardware.autocast)
    forwards = count_forwards(policy, data, callbacks, hardware.ranks, hardware.accumulate)
    activations = {flag: cost.activations(flag) * trained_rows(policy, data) for flag in (False, True)}
    return Plan(
        resident=_resident(policy, callbacks, shapes, hardware, notes),
        training={
            "activations": activations[checkpointing],
            "trajectories": _trajectory_bytes(policy, data, shapes, hardware),
        },
        transient={"text encoders": sum(shapes.encoders().values())},
        for_comparison={
            "encoded prompts of an iteration, main memory": _text_bytes(shapes) * data.prompts_per_iteration,
            "activations, kept": activations[False],
            "activations, checkpointed": activations[True],
        },
        forwards=forwards,
        flop=_flop(forwards, cost, shapes, checkpointing),
        notes=notes,
    )


def _flop(forwards: Mapping[str, float], cost: Cost, shapes: Shapes, checkpointing: bool) -> dict[str, float]:
    flop = {name: rows * cost.forward for name, rows in forwards.items() if name != DECODED}
    flop["backward"] = forwards.get(TRAINED, 0.0) * cost.backward
    if checkpointing:
        flop["computed again at backward"] = forwards.get(TRAINED, 0.0) * cost.forward
    if forwards.get(DECODED):
        flop[DECODED] = forwards[DECODED] * decode_flop(shapes)
    return flop


# -------------------------------------------------------------------------------------------------------------- memory


def _resident(
    policy: FlowPolicy, callbacks: Sequence[Callback], shapes: Shapes, hardware: Hardware, notes: list[str]
) -> dict[str, float]:
    student = shapes.adapter_bytes(student_spec(policy, []))
    parts = {"frozen transformer": nbytes(shapes.transformer()), "adapter of the student": student}
    parts |= {f"weights of {name}": size for name, size in _teachers(signals_among(callbacks), shapes, notes).items()}
    parts |= {"gradients": student, "optimiser": optimizer_bytes(policy, shapes)}
    parts |= {"EMA": student} if any(isinstance(callback, EMA) for callback in callbacks) else {}
    if hardware.sharded:
        parts = {name: size / hardware.ranks for name, size in parts.items()}
    return parts | {"autoencoder": nbytes(shapes.autoencoder())} | _rewards(callbacks)


def student_spec(policy: FlowPolicy, notes: list[str]) -> LoRASpec:
    """Shape of the adapter that is trained; what had to be assumed goes to ``notes``."""
    start = policy.start
    if start is None:
        return policy.lora
    if not isinstance(start, Merge):
        return _known_spec(AdapterSource(start) if isinstance(start, str) else start, notes)
    parts = [_known_spec(part, notes) for part in start.adapters]
    rank = parts[0].rank if start.method == "factors" else start.rank or sum(part.rank for part in parts)
    targets = list(dict.fromkeys(target for part in parts for target in part.targets))
    return LoRASpec(rank, targets=targets)


def _known_spec(source: AdapterSource, notes: list[str]) -> LoRASpec:
    if (spec := adapter_spec(source)) is not None:
        return spec
    notes.append(f"adapter {source} is not here; taken for one of rank {LoRASpec().rank} on the attention projections")
    return LoRASpec()


def _teachers(signals: Signals, shapes: Shapes, notes: list[str]) -> dict[str, float]:
    sizes = {}
    for name, teacher in signals.teaching.teachers_by_name().items():
        if isinstance(teacher, LoRATeacher):
            sizes[name] = shapes.adapter_bytes(_known_spec(teacher.source, notes))
        elif isinstance(teacher, FullTeacher):
            sizes[name] = nbytes(Shapes(teacher.backbone).transformer())
    return sizes


def optimizer_bytes(policy: FlowPolicy, shapes: Shapes) -> float:
    """Bytes of the optimiser's state, by letting it take a step on the meta device."""
    parameters = adapter_parameters(shapes.adapted(student_spec(policy, [])), ADAPTER)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = policy.optimizer(parameters)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return float(sum(value.nbytes for value in states))


def _rewards(callbacks: Iterable[Callback]) -> dict[str, float]:
    rewards = [callback.scorer.reward for callback in callbacks if isinstance(callback, RewardCallback)]
    return {f"reward network {name}": size for name, size in resident_bytes(rewards).items()}


def trained_rows(policy: FlowPolicy, data: RolloutDataModule) -> int:
    """Rows of the transformer in one training forward."""
    return data.batch_size * (1 if policy.sampler.guidance_scale == 1 else 2)


def _trajectory_bytes(policy: FlowPolicy, data: RolloutDataModule, shapes: Shapes, hardware: Hardware) -> float:
    """Latents and velocities of whole trajectories, float32; on the fused road there is one state."""
    channels, height, width = shapes.latent
    kept = 1 if data.fused else 2 * policy.sampler.num_steps + 1
    rows = data.batch_size if data.fused else data.prompts_per_iteration * data.group_size // hardware.ranks
    return 4.0 * rows * kept * channels * height * width


def _text_bytes(shapes: Shapes) -> float:
    text = shapes.text()
    return float(text.tokens.nbytes + text.pooled.nbytes)


# --------------------------------------------------------------------------------------------------------------- shown


def show_plan(planned: Plan, hardware: Hardware, speed: Speed | None = None) -> None:
    """Print a plan."""
    console = Console()
    console.print(_memory_table(planned))
    console.print(_work_table(planned, hardware, speed))
    for note in dict.fromkeys(planned.notes):
        console.print(f"note: {note}", soft_wrap=True)


def _memory_table(planned: Plan) -> Table:
    table = Table("memory of every device", "GB", title_justify="left")
    table.columns[1].justify = "right"
    sections = {
        f"always ({_gb(planned.static())} GB)": planned.resident,
        "while a step is trained (estimate)": planned.training,
        "at other moments, one at a time": planned.transient,
        "for comparison, not in the sum": planned.for_comparison,
    }
    for title, parts in sections.items():
        table.add_row(title, "", style="bold")
        for name, size in parts.items():
            table.add_row(f"  {name}", _gb(size))
        table.add_section()
    table.add_row("peak (estimate)", _gb(planned.peak()), style="bold")
    return table


def _work_table(planned: Plan, hardware: Hardware, speed: Speed | None) -> Table:
    each = f", each of {hardware.ranks} ranks" if hardware.ranks > 1 else ""
    table = Table(f"work of every optimiser step{each}", "forwards", "TFLOP")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in dict.fromkeys([*planned.forwards, *planned.flop]):
        rows = planned.forwards.get(name)
        table.add_row(name, "" if rows is None else f"{rows:.0f}", f"{planned.flop.get(name, 0) / 1e12:.1f}")
    table.add_section()
    rows = sum(count for name, count in planned.forwards.items() if name != DECODED)
    table.add_row("in all", f"{rows:.0f}", f"{sum(planned.flop.values()) / 1e12:.1f}", style="bold")
    if speed is not None:
        table.add_row(f"measured here: {seconds(planned.forwards, speed):.1f} s without rewards", "", "")
    return table


def measured(policy: FlowPolicy, data: RolloutDataModule, autocast: bool, device: str) -> Speed:
    """Time the run's own micro-batches on random weights of the true size."""
    shapes = Shapes(policy.backbone)
    return measure(shapes, student_spec(policy, []), trained_rows(policy, data), autocast, device)


def seconds(forwards: Mapping[str, float], speed: Speed) -> float:
    """Seconds per optimiser step, without rewards and pictures."""
    plain = sum(rows for name, rows in forwards.items() if name not in (TRAINED, DECODED))
    return plain * speed.forward + forwards.get(TRAINED, 0.0) * speed.trained


def _gb(size: float) -> str:
    return f"{size / GB:.3f}"


def device_count(devices: Any) -> int:  # noqa: ANN401
    """How many devices ``trainer.devices`` names."""
    if isinstance(devices, list | tuple):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([name for name in devices.split(",") if name])
    if devices in (None, "auto", -1, "-1"):
        return max(torch.cuda.device_count(), 1)
    return int(devices)

"""What a run will take, before any weight is read: memory by part, forwards and TFLOP per optimiser step.

Shapes come from configs and live on the meta device, so nothing is allocated. Forwards are counted by running the
recipe's own code for an iteration on a backbone that only counts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning import Callback
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from flowopd.models import AdapterSource, LoRASpec, Merge
from flowopd.models.adapters.lora import adapter_parameters
from flowopd.models.quantized import BYTES, nbytes
from flowopd.models.texts import SMALL_ENCODERS
from flowopd.preflight.costs import Cost, Speed, decode_bytes, decode_flop, forward_flop, measure, trace
from flowopd.preflight.forwards import (
    DECODED,
    TRAINED,
    count_evaluation,
    count_forwards,
    part_names,
    pictures_per_update,
)
from flowopd.preflight.shapes import ADAPTER, Shapes, adapter_spec
from flowopd.rewards.model import resident_bytes
from flowopd.teachers import FullTeacher, LoRATeacher, Teacher
from flowopd.teachers.composed import identity, parts_of
from flowopd.training.callbacks.ema import EMA
from flowopd.training.policy import FlowPolicy
from flowopd.training.rollout_data import RolloutDataModule
from flowopd.training.signals import RewardCallback, Signals, signals_among


@dataclass(frozen=True)
class Hardware:
    """What a run is spread over.

    Args:
        ranks: processes on all nodes, a device each.
        sharded: whether a rank keeps only its part of the weights (``fsdp2``, or ``fsdp``, which means it).
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
            sharded="fsdp" in str(trainer.get("strategy")).lower(),
            autocast="mixed" in str(trainer.get("precision")),
            accumulate=int(trainer.get("accumulate_grad_batches") or 1),
        )


CARDS = {"H100": 989.0, "A100": 312.0}
"""TFLOP a second of products of dense bfloat16 matrices, by their makers' data sheets."""

UTILISATION = 0.4
"""What a run is taken to reach of them; an assumption, measured nowhere."""


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
        pictures: trajectories per optimiser step.
        evaluation: rows of the transformer per evaluation, by what they are for.
        notes: what was assumed.
    """

    resident: dict[str, float]
    training: dict[str, float]
    transient: dict[str, float]
    for_comparison: dict[str, float]
    forwards: dict[str, float]
    flop: dict[str, float]
    pictures: float
    evaluation: dict[str, float]
    notes: list[str]

    def static(self) -> float:
        """Bytes of what is there all the time."""
        return sum(self.resident.values())

    def peak(self) -> float:
        """Bytes at the worst moment."""
        return self.static() + max(sum(self.training.values()), *self.transient.values())

    def rows(self) -> float:
        """Rows of the transformer per optimiser step."""
        return sum(rows for name, rows in self.forwards.items() if name != DECODED)

    def hours(self, card: str, updates: int) -> float:
        """Hours of some updates on a card of ``CARDS``, an estimate: without evaluations and text encoders."""
        return updates * sum(self.flop.values()) / (CARDS[card] * 1e12 * UTILISATION) / 3600

    def per_picture(self) -> float:
        """Forwards of a trajectory, where a backward counts as two."""
        return (self.rows() + 2 * self.forwards.get(TRAINED, 0.0)) / self.pictures


def plan(policy: FlowPolicy, data: RolloutDataModule, callbacks: Sequence[Callback], hardware: Hardware) -> Plan:
    """Plan a fit; nothing is read but configs, and nothing that is given is changed.

    Raises:
        ValueError: if the shapes of the backbone cannot be known without a download.
    """
    shapes = Shapes(policy.backbone)
    student = student_adapter(policy)
    notes = list(student.notes)
    if data.mixture.by_gap:
        notes.append("tasks share the prompts alike, as they do until their gaps are known")
    if bits := shapes.backbone.quantize:
        notes.append(
            f"frozen linear layers are kept as {bits}, {BYTES[bits]:.3g} bytes a weight; speed is not measured"
        )
    checkpointing = shapes.backbone.activation_checkpointing
    cost = trace(shapes, student.spec, hardware.autocast)
    forwards = count_forwards(policy, data, callbacks, hardware.ranks, hardware.accumulate)
    if _reads_encoders_again(shapes):
        notes.append(
            "the text encoders are read anew, by every rank, in each iteration that has a new prompt; give the "
            "backbone a text_cache, or keep_encoders"
        )
    activations = {flag: cost.activations(flag) * trained_rows(policy, data) for flag in (False, True)}
    return Plan(
        resident=_resident(policy, student.spec, callbacks, shapes, hardware, notes),
        training={
            "activations": activations[checkpointing],
            "trajectories": _trajectory_bytes(policy, data, shapes, hardware),
        },
        transient={
            "text encoders": sum(shapes.encoders().values()),
            "pictures, and decoding them": _picture_bytes(data, shapes, DECODED in forwards),
        },
        for_comparison={
            "encoded prompts of an iteration, main memory": shapes.text_bytes() * data.prompts_per_iteration,
            "activations, kept": activations[False],
            "activations, checkpointed": activations[True],
        },
        forwards=forwards,
        flop=_flop(forwards, cost, shapes, _other_models(callbacks, shapes)),
        pictures=pictures_per_update(policy, data, hardware.ranks, hardware.accumulate),
        evaluation=count_evaluation(policy, data, callbacks, hardware.ranks),
        notes=notes,
    )


def _flop(forwards: Mapping[str, float], cost: Cost, shapes: Shapes, other: Mapping[str, float]) -> dict[str, float]:
    flop = {name: rows * other.get(name, cost.forward) for name, rows in forwards.items() if name != DECODED}
    flop["backward"] = forwards.get(TRAINED, 0.0) * cost.backward
    if shapes.backbone.activation_checkpointing:
        flop["computed again at backward"] = forwards.get(TRAINED, 0.0) * cost.forward
    if forwards.get(DECODED):
        flop[DECODED] = forwards[DECODED] * decode_flop(shapes)
    return flop


def _other_models(callbacks: Sequence[Callback], shapes: Shapes) -> dict[str, float]:
    """FLOP of a forward of every teacher that is a model of its own, by the name that its forwards go by."""
    names, teachers = part_names(callbacks), signals_among(callbacks).teaching.teachers_by_name().values()
    models = {names[identity(t)]: t.backbone for t in parts_of(teachers) if isinstance(t, FullTeacher)}
    return {name: forward_flop(Shapes(model), shapes) for name, model in models.items()}


def _resident(
    policy: FlowPolicy,
    spec: LoRASpec,
    callbacks: Sequence[Callback],
    shapes: Shapes,
    hardware: Hardware,
    notes: list[str],
) -> dict[str, float]:
    student = shapes.adapter_bytes(spec)
    parts = {"frozen transformer": shapes.transformer_bytes(), "adapter of the student": student}
    parts |= {f"adapter {name!r}": student for name in policy.adapters[1:]}
    parts |= {f"weights of {name}": size for name, size in _teachers(signals_among(callbacks), shapes, notes).items()}
    parts |= {"gradients": student, "optimiser": optimizer_bytes(policy.optimizer, shapes.adapted(spec))}
    if any(isinstance(callback, EMA) for callback in callbacks):
        parts["EMA"] = student
    if hardware.sharded:
        parts = {name: size / hardware.ranks for name, size in parts.items()}
    return parts | {"autoencoder": nbytes(shapes.autoencoder())} | _rewards(callbacks)


class StudentAdapter(NamedTuple):
    """Shape of the adapter that is trained, and what had to be assumed of it."""

    spec: LoRASpec
    notes: Sequence[str] = ()


def student_adapter(policy: FlowPolicy) -> StudentAdapter:
    """What is known of the adapter that is trained before anything is read."""
    start = policy.start
    notes = list[str]()
    if start is None:
        return StudentAdapter(policy.lora)
    if not isinstance(start, Merge):
        source = AdapterSource(start) if isinstance(start, str) else start
        return StudentAdapter(_known_spec(source, notes), notes)
    parts = [_known_spec(part, notes) for part in start.adapters]
    rank = parts[0].rank if start.method == "factors" else start.rank or sum(part.rank for part in parts)
    usual = Shapes(policy.backbone).targets
    targets = list(dict.fromkeys(target for part in parts for target in part.targets or usual))
    return StudentAdapter(LoRASpec(rank, targets=targets), notes)


def _known_spec(source: AdapterSource, notes: list[str]) -> LoRASpec:
    if (spec := adapter_spec(source)) is not None:
        return spec
    notes.append(f"adapter {source} is not here; taken for one of rank {LoRASpec().rank} on the modules of a new one")
    return LoRASpec()


def _teachers(signals: Signals, shapes: Shapes, notes: list[str]) -> dict[str, float]:
    """Bytes that each teacher adds; what several have in common is the first one's."""
    sizes, carried = dict[str, float](), set[Hashable]()
    for name, teacher in signals.teaching.teachers_by_name().items():
        for weights, size in _weights(teacher, shapes, notes):
            if weights not in carried:
                carried.add(weights)
                sizes[name] = sizes.get(name, 0.0) + size
    return sizes


def _weights(teacher: Teacher, shapes: Shapes, notes: list[str]) -> Iterator[tuple[Hashable, float]]:
    """What a teacher brings to the device, and its bytes."""
    for part in parts_of([teacher]):
        if isinstance(part, LoRATeacher):
            yield part.source, shapes.adapter_bytes(_known_spec(part.source, notes))
        elif isinstance(part, FullTeacher):
            model = Shapes(part.backbone)
            yield part.backbone.identity, model.transformer_bytes()
            if part.adapter is not None:
                yield (part.backbone.identity, part.adapter), model.adapter_bytes(_known_spec(part.adapter, notes))


def optimizer_bytes(make: OptimizerCallable, network: nn.Module) -> float:
    """Bytes of the state of the optimiser of a network's adapter, by letting it take a step on the meta device."""
    parameters = adapter_parameters(network, ADAPTER)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = make(parameters)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return float(sum(value.nbytes for value in states))


def _rewards(callbacks: Iterable[Callback]) -> dict[str, float]:
    rewards = [callback.scorer.reward for callback in callbacks if isinstance(callback, RewardCallback)]
    return {f"reward network {name}": size for name, size in resident_bytes(rewards).items()}


def trained_rows(policy: FlowPolicy, data: RolloutDataModule) -> int:
    """Rows of the transformer in one training forward."""
    return data.batch_size * (1 if policy.sampler.guidance_scale == 1 else 2)


def _reads_encoders_again(shapes: Shapes) -> bool:
    texts = shapes.backbone.texts
    small = sum(shapes.encoders().values()) <= SMALL_ENCODERS
    return shapes.backbone.text_cache is None and not (small if texts.keep is None else texts.keep)


def _picture_bytes(data: RolloutDataModule, shapes: Shapes, trains: bool) -> float:
    """Float32 pictures of an evaluation's batch, or of a rollout's if it is judged, and what decoding some takes."""
    rows = max(data.evaluation_batch_size if data.evaluation_count else 0, data.batch_size if trains else 0)
    if not rows:
        return 0.0
    config, (_, height, width) = shapes.config("vae"), shapes.latent
    pixels = height * width * shapes.backbone.pixels_per_latent(config) ** 2
    at_once = min(rows, shapes.backbone.decoded_at_once((height, width), config))
    return 4.0 * 3 * rows * pixels + decode_bytes(shapes, at_once)


def _trajectory_bytes(policy: FlowPolicy, data: RolloutDataModule, shapes: Shapes, hardware: Hardware) -> float:
    """States of whole trajectories, float32, and velocities and targets if they are read; one state if fused."""
    channels, height, width = shapes.latent
    steps = policy.sampler.num_steps
    kept = 1 if data.fused else steps + 1 + (2 * steps if policy.keeps_velocities() else 0)
    rows = data.batch_size if data.fused else data.prompts_per_iteration * data.group_size // hardware.ranks
    return 4.0 * rows * kept * channels * height * width


def measured(policy: FlowPolicy, data: RolloutDataModule, autocast: bool, device: str) -> Speed:
    """Time the run's own micro-batches on random weights of the true size."""
    spec = student_adapter(policy).spec
    return measure(Shapes(policy.backbone), spec, trained_rows(policy, data), autocast, device)


def device_count(devices: Any) -> int:  # noqa: ANN401
    """How many devices ``trainer.devices`` names."""
    if isinstance(devices, list | tuple):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([name for name in devices.split(",") if name])
    if devices in (None, "auto", -1, "-1"):
        return max(torch.cuda.device_count(), 1)
    return int(devices)

"""Teachers made of teachers: weighted sums of velocities, and the fewest forwards that answer them."""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from flowopd.core.ranges import at_least, within
from flowopd.core.shown import Shown
from flowopd.core.tensors import expand_like, picks, sent
from flowopd.models import Backbone, Question
from flowopd.records import Conditioning
from flowopd.teachers.base import Teacher, guidance_of

TOGETHER = 400
"""Image tokens of every teacher, on average, up to which those of one backbone are asked by one forward."""

Groups = Sequence[tuple[Teacher, Sequence[int]]]
"""Teachers, and the rows of a batch that each of them answers."""


class Composed(Shown, ABC):
    """A teacher whose velocity is a weighted sum of other teachers',  v = Σ_k w_k(σ) · v_k.

    Args:
        teachers: whose velocities are summed; composed ones, too.
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.teachers = list(teachers)

    @abstractmethod
    def shares(self, sigma: Tensor) -> list[Tensor]:
        """Return w_k, (B,) of each teacher, at noise levels σ (B,)."""

    @abstractmethod
    def numbers(self) -> str:
        """All numbers of the composition as text, for its fingerprint."""

    def attach(self, backbone: Backbone) -> None:
        """Attach every teacher."""
        for teacher in self.teachers:
            teacher.attach(backbone)

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the composed velocity (B, C, H, W)."""
        return ask({"velocity": [(self, range(len(x)))]}, x, sigma, cond)["velocity"]

    def fingerprint(self) -> str:
        """A digest of the teachers' fingerprints and of the numbers that compose them."""
        facts = [type(self).__name__, self.numbers(), *(teacher.fingerprint() for teacher in self.teachers)]
        return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:16]

    def over(self, teachers: Sequence[Teacher]) -> Self:
        """The same composition of other teachers."""
        twin = copy.copy(self)
        twin.teachers = list(teachers)
        return twin


class Beyond(Composed):
    """A teacher, exaggerated against a reference,  v = v_ref + λ · (v_T - v_ref).

    λ > 1 goes beyond the teacher, 1 is the teacher, between 0 and 1 lies between the two. A step of such a field is the
    Gaussian in proportion to  p_T^λ · p_ref^(1-λ).

    Args:
        teacher: T.
        reference: ref: the base, or what the student starts from.
        strength: λ.

    Raises:
        ValueError: if λ is negative.

    References:
        GFD-OPD (arXiv 2609.39692), λ = 1.25; STEP-OPD (arXiv 2608.04887).

    >>> from flowopd.teachers import BaseTeacher, LoRATeacher
    >>> Beyond(LoRATeacher("org/ocr"), BaseTeacher(), strength=1.5).shares(torch.tensor([0.8, 0.2]))
    [tensor([1.5000, 1.5000]), tensor([-0.5000, -0.5000])]
    """

    def __init__(self, teacher: Teacher, reference: Teacher, strength: float = 1.25) -> None:
        at_least(0.0, strength=strength)
        super().__init__([teacher, reference])
        self.strength = strength

    @property
    def teacher(self) -> Teacher:
        """T."""
        return self.teachers[0]

    @property
    def reference(self) -> Teacher:
        """ref."""
        return self.teachers[1]

    def shares(self, sigma: Tensor) -> list[Tensor]:
        """Return λ and 1 - λ."""
        return [torch.full_like(sigma, self.strength), torch.full_like(sigma, 1 - self.strength)]

    def numbers(self) -> str:
        """Return λ."""
        return repr(float(self.strength))


@dataclass(frozen=True)
class Piecewise:
    """A share that changes with the noise level: straight lines between points, constant outside.

    Args:
        points: (σ, share), by rising σ; two of one σ are a jump, and that σ belongs to the later of them.

    Raises:
        ValueError: unless there are two points or more, by rising σ in [0, 1], of no negative share.

    >>> Piecewise([(0.2, 1.0), (0.6, 0.0)]).at(torch.tensor([0.1, 0.3, 1.0]))
    tensor([1.0000, 0.7500, 0.0000])
    """

    points: list[tuple[float, float]]

    def __post_init__(self) -> None:
        for number, (sigma, share) in enumerate(self.points):
            within(0.0, 1.0, **{f"σ of points[{number}]": sigma})
            at_least(0.0, **{f"share of points[{number}]": share})
        rising = all(left <= right for (left, _), (right, _) in pairwise(self.points))
        if len(self.points) < 2 or not rising:
            raise ValueError(f"points are {self.points}; expected two or more (σ, share) by rising σ")

    def at(self, sigma: Tensor) -> Tensor:
        """Return the share at noise levels σ (B,)."""
        levels, shares = torch.tensor(self.points, dtype=sigma.dtype).T.contiguous()
        right = torch.searchsorted(levels, sigma.contiguous(), right=True).clamp(1, len(levels) - 1)
        start, width = levels[right - 1], levels[right] - levels[right - 1]
        along = torch.where(width > 0, (sigma - start) / width, (sigma >= start).to(sigma)).clamp(0, 1)
        return torch.lerp(shares[right - 1], shares[right], along)


class Blend(Composed):
    """Several teachers at once, the paper's soft routing,  v = Σ_k α_k(σ) · v_k,  α_k = s_k / Σ_j s_j.

    A step of such a field is the Gaussian in proportion to  Π_k p_k^α_k. For shares by task, α_k(c), give each task a
    blend of its own: teachers that several blends share are asked once.

    Args:
        teachers: whose velocities are blended.
        weights: s_k: a number, or a ``Piecewise`` in σ, for each teacher; only their proportions matter.

    Raises:
        ValueError: if a weight is missing or negative, or all are 0 at some noise level.

    References:
        Flow-OPD (arXiv 2605.08063), appendix: soft weights α_k.

    >>> from flowopd.teachers import BaseTeacher, LoRATeacher
    >>> Blend([LoRATeacher("org/ocr"), BaseTeacher()], [3, Piecewise([(0.0, 1.0), (1.0, 3.0)])]).shares(torch.ones(1))
    [tensor([0.5000]), tensor([0.5000])]
    """

    def __init__(self, teachers: list[Teacher], weights: list[float | Piecewise]) -> None:
        super().__init__(teachers)
        self.weights = list(weights)
        if len(weights) != len(teachers):
            raise ValueError(f"there are {len(weights)} weights for {len(teachers)} teachers; expected one each")
        numbers = {f"weights[{k}]": w for k, w in enumerate(self.weights) if not isinstance(w, Piecewise)}
        at_least(0.0, **numbers)
        points = [sigma for share in self.weights if isinstance(share, Piecewise) for sigma, _ in share.points]
        if bool((self._given(torch.tensor([0.0, *points, 1.0])).sum(0) <= 0).any()):
            raise ValueError(f"weights of a blend are {weights}, all 0 at some noise level; expected one above 0")

    def _given(self, sigma: Tensor) -> Tensor:
        """s_k, (K, B)."""
        weights = self.weights
        return torch.stack([s.at(sigma) if isinstance(s, Piecewise) else torch.full_like(sigma, s) for s in weights])

    def shares(self, sigma: Tensor) -> list[Tensor]:
        """Return α_k."""
        given = self._given(sigma)
        return list(given / given.sum(0))

    def numbers(self) -> str:
        """Return s_k."""
        return repr([share if isinstance(share, Piecewise) else float(share) for share in self.weights])


def ask(
    wanted: Mapping[str, Groups],
    x: Tensor,
    sigma: Tensor,
    cond: Conditioning,
    lockstep: bool = False,
    level: float | None = None,
) -> dict[str, Tensor]:
    """Velocities of several teachers at one batch of states, by one forward of every part that they have in common.

    A composed teacher is asked part by part, and only about rows where a part has a weight. Parts of the same network,
    adapter and guidance are one, whoever they belong to.

    Args:
        wanted: by name of an answer, which teacher answers which rows.
        x, sigma, cond: B states.
        lockstep: ask every part that is named, if need be about a row whose answer is dropped, so that their number
            does not depend on the rows.
        level: σ of all rows, if that is known without waiting for a device.

    Returns:
        By name, (B, C, H, W); 0 in rows that nobody answers.
    """
    levels = _on_cpu(wanted, sigma, level)
    tables: dict[Hashable, tuple[Teacher, Tensor]] = {}
    for number, groups in enumerate(wanted.values()):
        for teacher, rows in groups:
            for part, weight in parts(teacher, levels):
                _, table = tables.setdefault(identity(part), (part, torch.zeros(len(wanted), len(x))))
                table[number, rows] += weight[rows]
    asked = list[tuple[Teacher, list[int], list[list[float]]]]()
    for part, table in tables.values():
        rows = table.any(0).nonzero().flatten().tolist()
        if rows or lockstep:
            asked.append((part, rows or [0], table[:, rows or [0]].tolist()))
    tokens = 2 * len(wanted) * len(x) * x[0, 0].numel() // 4  # alike on all ranks, however their rows are routed
    together = tokens <= TOGETHER * len(tables)
    velocities = _velocities([(part, rows) for part, rows, _ in asked], x, sigma, cond, together)
    answers = {name: torch.zeros_like(x) for name in wanted}
    for (_, rows, shares), velocity in zip(asked, velocities, strict=True):
        for answer, weights in zip(answers.values(), shares, strict=True):
            _add(answer, rows, weights, velocity)
    return answers


def _on_cpu(wanted: Mapping[str, Groups], sigma: Tensor, level: float | None) -> Tensor:
    """Noise levels (B,) on the CPU; a device is asked for them only where weights depend on them."""
    asked = (teacher for groups in wanted.values() for teacher, _ in groups)
    if level is None and any(isinstance(teacher, Composed) for teacher in asked):
        return sigma.cpu()
    return torch.full(sigma.shape, 1.0 if level is None else level)


def _velocities(
    asked: Sequence[tuple[Teacher, list[int]]], x: Tensor, sigma: Tensor, cond: Conditioning, together: bool
) -> list[Tensor]:
    """Velocities of every part at its rows; if together, parts of one backbone by one forward."""
    found: dict[int, Tensor] = {}
    shared: dict[int, list[int]] = {}
    for number, (part, rows) in enumerate(asked):
        if together and "asks" in vars(type(part)):  # of its own: a subclass may answer otherwise
            shared.setdefault(id(part.asks.backbone), []).append(number)  # type: ignore[attr-defined]
        else:
            where = picks(rows, x.device)
            found[number] = part.velocity(x[where], sigma[where], cond[rows])
    for numbers in shared.values():
        asks = [asked[number][0].asks for number in numbers]  # type: ignore[attr-defined]
        questions = [Question(a.adapter, a.guidance_scale, asked[n][1]) for a, n in zip(asks, numbers, strict=True)]
        found |= zip(numbers, asks[0].backbone.velocities(x, sigma, cond, questions), strict=True)
    return [found[number] for number in range(len(asked))]


def _add(answer: Tensor, rows: Sequence[int], weights: Sequence[float], velocity: Tensor) -> None:
    """Add weight · velocity to the rows that have a weight; a number that they share is no tensor to be sent."""
    own = [k for k, weight in enumerate(weights) if weight]
    if not own:
        return
    given = [weights[k] for k in own]
    added = velocity[picks(own, velocity.device)]
    share = given[0] if len(set(given)) == 1 else expand_like(sent(torch.tensor(given), added.device).to(added), added)
    answer[picks([rows[k] for k in own], answer.device)] += share * added


def parts(teacher: Teacher, sigma: Tensor) -> Iterator[tuple[Teacher, Tensor]]:
    """What a teacher is made of in the end, itself if of no others, with weights (B,) at noise levels σ (B,)."""
    if not isinstance(teacher, Composed):
        yield teacher, torch.ones_like(sigma)
        return
    for inner, share in zip(teacher.teachers, teacher.shares(sigma), strict=True):
        for part, weight in parts(inner, sigma):
            yield part, share * weight


def parts_of(teachers: Iterable[Teacher]) -> list[Teacher]:
    """What teachers are made of in the end, each once."""
    found = {identity(part): part for teacher in teachers for part, _ in parts(teacher, torch.ones(1))}
    return list(found.values())


def at_guidance(teacher: Teacher, guidance_scale: float) -> Teacher:
    """The same teacher asked with another guidance; a composed one is composed of its parts so asked.

    Raises:
        ValueError: if it, or a part of it, is not guided from outside.
    """
    if isinstance(teacher, Composed):
        return teacher.over([at_guidance(part, guidance_scale) for part in teacher.teachers])
    if not hasattr(teacher, "at"):
        raise ValueError(
            f"a {type(teacher).__name__} has no branches, as its guidance cannot be chosen (there is no method `at`); "
            "teach by another objective, such as flowopd.core.TransitionKL"
        )
    twin: Teacher = teacher.at(guidance_scale)
    return twin


def guidance_said(teacher: Teacher) -> str:
    """At which guidance a teacher is drawn, in words: of a composed one, that of its parts.

    >>> from flowopd.teachers import BaseTeacher, LoRATeacher
    >>> guidance_said(Beyond(LoRATeacher("org/ocr", guidance_scale=4.5), BaseTeacher()))
    '4.5 and 1'
    """
    scales = dict.fromkeys(guidance_of(part) for part in parts_of([teacher]))
    return " and ".join("its own" if scale is None else f"{scale:g}" for scale in scales)


def identity(teacher: Teacher) -> Hashable:
    """Its network, adapter and guidance: what tells two teachers apart; of an unknown kind, the object itself."""
    return getattr(teacher, "identity", id(teacher))

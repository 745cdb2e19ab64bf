"""One adapter out of several, and what the merge keeps of each."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal

import torch
from peft import LoraConfig
from torch import Tensor

from flowopd.core.ranges import above, at_least, finite, within
from flowopd.models.adapters.files import AdapterSource
from flowopd.models.adapters.lora import Adapter, Factors

Method = Literal["exact", "factors", "svd", "ties", "dare"]


class Merge:
    """One adapter out of several, whose changes are ΔW_i = scale_i · B_i·A_i.

    - ``exact``: ΔW = Σ w_i ΔW_i, by concatenated factors, at rank Σ r_i of those that change the module.
    - ``svd``: the best approximation of that at rank ``rank`` (largest singular values).
    - ``factors``: ΔW = scale · (Σ w_i B_i)(Σ w_i A_i), as the released Flow-OPD code does; it keeps about 1/k of
      the changes of k independent adapters.
    - ``ties``: of every ΔW_i the ``density`` share of entries that are largest; at each entry the sign of Σ w_i ΔW_i,
      and the w-weighted mean of those that have it; all times Σ w_i (the paper's λ).
    - ``dare``: every entry of ΔW_i dropped with probability 1 - ``density``, the rest divided by ``density``; then
      Σ w_i ΔW_i, whose expectation is the exact merge.

    ``ties`` and ``dare`` are computed on whole matrices ΔW, one module at a time, and written as factors of rank
    ``rank`` by singular values.

    Args:
        adapters: adapter folders or files, models of the hub, or ``{path, subfolder, revision}``.
        method: see above.
        weights: w_i, one per adapter; default 1/k each.
        rank: inner width of the result, for ``svd``, ``ties`` and ``dare``; default Σ r_i.
        density: share of entries that ``ties`` and ``dare`` keep, in (0, 1].
        seed: of what ``dare`` drops.

    Raises:
        ValueError: if the numbers do not fit together.

    References:
        Flow-OPD (arXiv 2605.08063), merge cold start; TIES (arXiv 2306.01708); DARE (arXiv 2311.03099).
    """

    def __init__(
        self,
        adapters: list[str | AdapterSource],
        method: Method = "exact",
        weights: list[float] | None = None,
        rank: int | None = None,
        density: float = 0.5,
        seed: int = 0,
    ) -> None:
        if not adapters:
            raise ValueError("a merge needs at least one adapter folder, got none")
        if weights is not None and len(weights) != len(adapters):
            raise ValueError(f"{len(adapters)} adapters were given {len(weights)} weights; expected one each")
        if rank is not None and method in ("exact", "factors"):
            raise ValueError(f"rank is {rank}, but only svd, ties and dare choose a rank")
        at_least(1, rank=rank)
        at_least(0, seed=seed)
        within(0.0, 1.0, density=density)
        above(0.0, density=density)
        self.adapters = [source if isinstance(source, AdapterSource) else AdapterSource(source) for source in adapters]
        self.method: Method = method
        self.weights = list(weights or [1 / len(adapters)] * len(adapters))
        finite(**{f"weights[{i}]": weight for i, weight in enumerate(self.weights)})
        if not any(self.weights):
            raise ValueError("every weight of the merge is 0, which is the base; expected one that is not")
        self.rank = rank
        self.density = density
        self.seed = seed
        if method == "ties" and min(self.weights) <= 0:
            raise ValueError(f"ties elects signs by weight, but one is {min(self.weights)}; expected positive weights")

    def adapter(self) -> Adapter:
        """Read the adapters and merge them.

        Raises:
            FileNotFoundError: if one of them is not there.
            ValueError: if ``factors`` meets adapters of different rank or scale, or an adapter is more than a LoRA.
        """
        return self._merge(self._read())

    def report(self, merged: Adapter | None = None) -> dict[str, dict[str, float]]:
        """What the adapters change and what is left of it; a row per adapter, and one for the merge.

        Columns: ``weight`` w_i; ``norm`` ‖ΔW_i‖ over all modules; ``cosine to …`` of the ΔW; ``kept`` =
        ⟨ΔW, ΔW_i⟩ / ‖ΔW_i‖², which is 1 if the merge contains the whole change, and w_i if the changes are orthogonal
        and the merge is exact.
        """
        parts = self._read()
        return merge_report(self.names(), parts, self.weights, merged or self._merge(parts))

    def names(self) -> list[str]:
        """A short name of each adapter, all different."""
        last = [str(source).rstrip("/").rsplit("/", 1)[-1] for source in self.adapters]
        whole = [str(source) for source in self.adapters]
        names = last if len(set(last)) == len(last) else whole
        return names if len(set(names)) == len(names) else [f"{name} ({i})" for i, name in enumerate(names, 1)]

    def _read(self) -> list[Adapter]:
        return [source.adapter() for source in self.adapters]

    def _merge(self, parts: Sequence[Adapter]) -> Adapter:
        if self.method == "factors":
            return _average_factors(parts, self.weights)
        exact = _concatenate(parts, self.weights)
        if self.method == "exact":
            return exact
        return Adapter({m: self._approximate(parts, m, part) for m, part in exact.parts.items()}, exact.declared)

    def _approximate(self, parts: Sequence[Adapter], module: str, exact: Factors) -> Factors:
        rank = self.rank or exact.rank
        if self.method == "svd":
            a, b = truncate_factors(*exact.matrices(), rank)
        else:
            zero = torch.zeros_like(exact.change())  # an adapter that leaves a module alone has a change of zero there
            changes = [part.parts[module].change() if module in part.parts else zero for part in parts]
            a, b = truncate(self._combine(changes, module) / exact.scale, rank)
        return Factors(a.reshape(-1, *exact.a.shape[1:]), b.reshape(*b.shape, *exact.b.shape[2:]), exact.scale)

    def _combine(self, changes: Sequence[Tensor], module: str) -> Tensor:
        if self.method == "ties":
            return ties(changes, self.weights, self.density)
        return dare(changes, self.weights, self.density, f"{self.seed} {module}")


# ------------------------------------------------------------------------------------------------------------ formulas


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim, elect signs, and average those who agree,  Σ w · Σ_{i agrees} w_i ΔW_i / Σ_{i agrees} w_i  at every entry.

    Args:
        changes: k matrices of one shape.
        weights: k positive numbers.
        density: share of the largest entries of each matrix that takes part.

    References:
        TIES-Merging (arXiv 2306.01708), with Σ w as its λ.
    """
    w = torch.tensor(weights, dtype=changes[0].dtype).reshape(-1, *[1] * changes[0].dim())
    trimmed = torch.stack([_largest(change, density) for change in changes])
    sign = (w * trimmed).sum(0).sign()
    agrees = (trimmed.sign() == sign) & (sign != 0)
    share = (w * agrees).sum(0)
    return w.sum() * (w * trimmed * agrees).sum(0) / torch.where(share == 0, 1, share)


def _largest(change: Tensor, density: float) -> Tensor:
    keep = max(1, round(density * change.numel()))
    threshold = change.abs().flatten().kthvalue(change.numel() - keep + 1).values
    return torch.where(change.abs() >= threshold, change, 0)


def dare(changes: Sequence[Tensor], weights: Sequence[float], density: float, seed: object = 0) -> Tensor:
    """Drop and rescale,  Σ w_i ΔW_i·m_i / density,  m_i ~ Bernoulli(density) at every entry.

    References:
        DARE (arXiv 2311.03099).
    """
    total = torch.zeros_like(changes[0])
    for i, (change, weight) in enumerate(zip(changes, weights, strict=True)):
        kept = torch.rand(change.shape, generator=_generator(f"dare {seed} {i}")) < density
        total += weight / density * change * kept
    return total


def truncate(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors A (r, in) and B (out, r) of equal norm, whose product B·A is closest to ΔW (out, in)."""
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    return _split(u, s, vh, rank)


def truncate_factors(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As ``truncate`` of B·A, without ever making the product."""
    (qb, rb), (qa, ra) = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return tuple(factor.to(a.dtype) for factor in _split(qb @ u, s, vh @ qa.T, rank))  # type: ignore[return-value]


def _split(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    root = s[:rank].sqrt()
    a, b = root[:, None] * vh[:rank], u[:, :rank] * root
    missing = rank - len(root)  # a small matrix has fewer singular values than the rank that was asked for
    return torch.cat([a, a.new_zeros(missing, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), missing)], 1)


# -------------------------------------------------------------------------------------------------------------- report


def merge_report(
    names: Sequence[str], parts: Sequence[Adapter], weights: Sequence[float], merged: Adapter
) -> dict[str, dict[str, float]]:
    """The table that ``Merge.report`` tells of."""
    rows: dict[str, dict[str, float]] = {}
    norms = [inner(part, part) ** 0.5 for part in parts]
    for name, part, norm, weight in zip(names, parts, norms, weights, strict=True):
        cosines = {
            f"cosine to {other}": inner(part, parts[j]) / (norm * norms[j]) if norm * norms[j] else 0.0
            for j, other in enumerate(names)
        }
        kept = inner(merged, part) / norm**2 if norm else 0.0
        rows[name] = {"weight": weight, "norm": norm, **cosines, "kept": kept}
    rows["merge"] = _merge_row(names, parts, norms, merged)
    return rows


def _merge_row(
    names: Sequence[str], parts: Sequence[Adapter], norms: Sequence[float], merged: Adapter
) -> dict[str, float]:
    norm = inner(merged, merged) ** 0.5
    each = zip(names, parts, norms, strict=True)
    cosines = {f"cosine to {n}": inner(merged, part) / (norm * size) if norm * size else 0.0 for n, part, size in each}
    return {"norm": norm, **cosines}


def inner(first: Adapter, second: Adapter) -> float:
    """⟨ΔW_1, ΔW_2⟩ summed over all modules, by factors:  tr((B_1 A_1)ᵀ B_2 A_2) = Σ (B_1ᵀB_2) ∘ (A_1 A_2ᵀ)."""
    total = 0.0
    for module in sorted(set(first.parts) & set(second.parts)):
        one, other = first.parts[module], second.parts[module]
        (a1, b1), (a2, b2) = one.matrices(), other.matrices()
        product = ((b1.double().T @ b2.double()) * (a1.double() @ a2.double().T)).sum()
        total += one.scale * other.scale * float(product)
    return total


# ------------------------------------------------------------------------------------------------------------- helpers


def _concatenate(parts: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    merged = {}
    for module in dict.fromkeys(module for part in parts for module in part.parts):
        owners = [(part.parts[module], w) for part, w in zip(parts, weights, strict=True) if module in part.parts]
        scale = max(abs(factors.scale) for factors, _ in owners) or 1.0
        a = torch.cat([factors.a for factors, _ in owners])
        b = torch.cat([w * factors.scale / scale * factors.b for factors, w in owners], 1)
        merged[module] = Factors(a, b, scale)
    return Adapter(merged, _declared(parts))


def _average_factors(parts: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    shapes = {tuple(sorted((module, f.rank, f.scale) for module, f in part.parts.items())) for part in parts}
    if len(shapes) > 1:
        raise ValueError(
            "factors can only be averaged between adapters of one rank, scale and target; use method: exact"
        )
    merged = {}
    for module, first in parts[0].parts.items():
        each = [(part.parts[module], weight) for part, weight in zip(parts, weights, strict=True)]
        a = torch.stack([weight * factors.a for factors, weight in each]).sum(0)
        b = torch.stack([weight * factors.b for factors, weight in each]).sum(0)
        merged[module] = Factors(a, b, first.scale)
    return Adapter(merged, _declared(parts))


def _declared(parts: Sequence[Adapter]) -> list[LoraConfig]:
    return [config for part in parts for config in part.declared]


def _generator(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) >> 1)

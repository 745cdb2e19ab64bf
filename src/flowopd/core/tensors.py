"""Three helpers for shapes."""

from torch import Tensor


def same_shape(**tensors: Tensor | None) -> None:
    """Raise unless all given tensors have one shape; ``None`` is skipped.

    Raises:
        ValueError: naming every shape, e.g. a (B, 1) advantage beside a (B,) log-probability.
    """
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"expected equal shapes, got {shapes}")


def expand_like(per_row: Tensor, like: Tensor) -> Tensor:
    """View (B,) as (B, 1, ..., 1), ready to broadcast against ``like`` (B, ...)."""
    return per_row.reshape(per_row.shape + (1,) * (like.dim() - per_row.dim()))


def row_mean(x: Tensor) -> Tensor:
    """Mean over everything but the first axis, (B, ...) → (B,)."""
    return x.flatten(1).mean(1)

"""Three helpers for shapes."""

from torch import Tensor


def same_shape(**tensors: Tensor | None) -> None:
    """Raise unless all given tensors have one shape; ``None`` is skipped.

    Raises:
        ValueError: naming every shape, e.g. a (B, 1) advantage beside a (B,) log-probability.

    >>> import torch
    >>> same_shape(log_prob=torch.zeros(4), advantage=torch.zeros(4, 1))
    Traceback (most recent call last):
    ValueError: expected equal shapes, got {'log_prob': (4,), 'advantage': (4, 1)}
    """
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"expected equal shapes, got {shapes}")


def expand_like(per_row: Tensor, like: Tensor) -> Tensor:
    """View (B,) as (B, 1, ..., 1), ready to broadcast against ``like`` (B, ...).

    >>> import torch
    >>> expand_like(torch.zeros(2), like=torch.zeros(2, 4, 8, 8)).shape
    torch.Size([2, 1, 1, 1])
    """
    return per_row.reshape(per_row.shape + (1,) * (like.dim() - per_row.dim()))


def row_mean(x: Tensor) -> Tensor:
    """Mean over everything but the first axis, (B, ...) → (B,).

    >>> import torch
    >>> row_mean(torch.tensor([[[1.0, 2.0]], [[3.0, 5.0]]]))
    tensor([1.5000, 4.0000])
    """
    return x.flatten(1).mean(1)

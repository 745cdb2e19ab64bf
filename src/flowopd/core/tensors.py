"""Helpers for shapes and rows, and for a device that is not to be waited for."""

from collections.abc import Sequence
from functools import lru_cache

import torch
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


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The same on ``device``; from the CPU it leaves at once, and nobody waits until it is there.

    >>> sent(torch.arange(2), "cpu")
    tensor([0, 1])
    """
    there = torch.device(device)
    if there.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(there)
    return (tensor.pin_memory() if torch.cuda.is_available() else tensor).to(there, non_blocking=True)


def picks(rows: Sequence[int], device: torch.device) -> slice | Tensor:
    """What picks rows out of a tensor on ``device``: a slice where they follow one another, else an index, made once.

    >>> picks([2, 3, 4], torch.device("cpu")), picks([4, 1], torch.device("cpu"))
    (slice(2, 5, None), tensor([4, 1]))
    """
    if rows and list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return _index(tuple(rows), device)


@lru_cache(maxsize=1024)
def _index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives the evaluation that may have asked first
        return sent(torch.tensor(rows, dtype=torch.long), device)

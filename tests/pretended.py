"""A pretended CUDA device: tensors there have a shape and a device but no numbers; those on the CPU are real."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowopd.core import tensors

CUDA = torch.device("cuda", 0)


class Waited(Exception):
    """The host would have waited for the device."""


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """Run what uses ``CUDA`` without one; a mixture of devices raises, and so does what would wait for the device.

    A branch on a number that is there raises by itself: nobody knows it. No backward, which needs a real device.
    """
    tensors._index.cache_clear()  # what is pretended here is nothing elsewhere
    with FakeTensorMode(allow_non_fake_inputs=True), _Devices():
        yield
    tensors._index.cache_clear()


class _Devices(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._tables: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in given) and "cuda" not in str(kwargs.get("device")):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if not self._is_new_table(func.name(), args):
            _refuse_waiting(func.name(), args, kwargs)
        return func(*args, **kwargs)

    def _is_new_table(self, name: str, args: Any) -> bool:
        """Whether diffusers sends a table that it keeps, for the first time."""
        if name != "aten::_to_copy" or args[0].device.type != "cpu" or not _asked_by_diffusers():
            return False
        known = args[0].data_ptr() in self._tables
        self._tables.add(args[0].data_ptr())
        return not known


def _asked_by_diffusers() -> bool:
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))
    return "/diffusers/" in next(file for file in files if "/torch/" not in file and file != __file__)


def _refuse_waiting(name: str, args: Any, kwargs: Any) -> None:
    if name == "aten::_to_copy":
        there = kwargs.get("device")
        crosses = there is not None and torch.device(there).type != args[0].device.type
        if crosses and (args[0].device.type == "cuda" or not kwargs.get("non_blocking")):
            raise Waited(f"{tuple(args[0].shape)} from {args[0].device} to {there}")
    if name == "aten::copy_" and args[0].device != args[1].device and not (args[2:] and args[2]):
        raise Waited(f"{tuple(args[1].shape)} from {args[1].device} into {args[0].device}")
    if name.startswith("aten::index"):
        indices = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, torch.Tensor)]
        if args[0].device.type == "cuda" and any(index.device.type == "cpu" and index.dim() for index in indices):
            raise Waited("an index on the CPU picks from the device")


def move(network: nn.Module) -> None:
    """Pretend that a network is on the device; its weights are forgotten."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_like(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _like(buffer)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)

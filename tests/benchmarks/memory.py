"""Bytes of tensors: those that are there, and at most at one time in between."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages() -> dict[int, int]:
    """Bytes of every storage that a tensor of this process has, by its address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            storage = thing.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found


class Live(TorchDispatchMode):
    """Follows the storages that operators make, until nobody holds them."""

    def __init__(self, there: dict[int, int]) -> None:
        super().__init__()
        self.sizes = dict(there)
        self.bytes = self.peak = sum(there.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.bytes += self.sizes[key]
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._part, key)

    def _part(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key, 0)


def measured(make: Callable[[], Callable[[], object]]) -> tuple[int, int]:
    """Bytes that are there between two calls of what is made, and the most within one."""
    before = storages()
    work = make()
    work()
    own = {key: size for key, size in storages().items() if key not in before}
    with Live(own) as live:
        work()
    return sum(own.values()), live.peak

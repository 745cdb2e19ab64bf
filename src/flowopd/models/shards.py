"""Networks and tensors spread over ranks by FSDP2; what one rank has alone passes through unchanged."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Spread every block of a network, then the rest of it, over the ranks of a mesh; in place, adapters included.

    The rest is given back after every forward as well: between calls each parameter is its shard, so that whoever
    writes to it (an optimiser, an average) reaches the next forward.

    Raises:
        ValueError: if the network is quantised.
    """
    if getattr(network, "hf_quantizer", None) is not None:
        raise ValueError("a quantised base cannot be spread over ranks; leave out quantize, or choose strategy ddp")
    for block in blocks(network):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network: what stands in its lists of modules."""
    return [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child]


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, of any shape, gathered from the shards of all ranks, which must all ask for it.

    Args:
        tensor: this rank's part; a plain tensor is whole already.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    gathered: Tensor = tensor.detach().to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    return gathered


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a full tensor that all ranks have.

    Args:
        tensor: all of it.
        like: a tensor whose full shape is the same; a plain one is not cut.
    """
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)

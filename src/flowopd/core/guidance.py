"""Classifier-free guidance, written once."""

from torch import Tensor

from flowopd.core.tensors import same_shape


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Guided velocity,  v = v_u + s · (v_c - v_u), (B, C, H, W); s = 1 is the conditional one.

    References:
        Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), with s = 1 + w of its Eq. 6.

    >>> import torch
    >>> guided(conditional=torch.tensor([1.0, 2.0]), unconditional=torch.tensor([0.0, 2.0]), scale=4.5)
    tensor([4.5000, 2.0000])
    """
    same_shape(conditional=conditional, unconditional=unconditional)
    return unconditional + scale * (conditional - unconditional)

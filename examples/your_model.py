"""A model of your own, in one file outside of the package: a network that draws, and what training asks of it.

Replace ``Painter`` by your network and the bodies of ``YourBackbone`` by what yours needs; their signatures stay. A
config names the class by ``class_path: your_model.YourBackbone``, and ``flowopd.testing.check_backbone`` proves it. A
model that diffusers has a pipeline for costs less: subclass ``flowopd.DiffusersBackbone``, as
``flowopd/models/zimage.py`` does.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from flowopd import Backbone, Conditioning
from flowopd.core import LinearSchedule
from flowopd.core.schedules import Schedule
from flowopd.models import use_adapter

SIDE, PATCH, WIDTH = 16, 4, 32  # pixels of a picture and of an image token; numbers per token
WORDS = ("<start>", "a", "disc", "on", "the", "red", "green", "blue", "yellow", "left", "right", "top", "bottom")


class Block(nn.Module):
    """Attention among all tokens, then a small network for each."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.into, self.out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor, read: Tensor) -> Tensor:
        """Tokens (B, L, D) that know one another; only those of ``read`` (B, L) are looked at."""
        x = self.norms[0](tokens)
        q, k, v = (part(x).unflatten(2, (4, -1)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=read[:, None, None])
        tokens = tokens + self.to_out(seen.transpose(1, 2).flatten(2))
        return tokens + self.out(F.gelu(self.into(self.norms[1](tokens))))


class Painter(nn.Module):
    """A transformer of image tokens and words that guesses the clean picture of a noisy one."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), WIDTH)
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.places = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, WIDTH))
        self.time = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.last = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * PATCH**2))

    def forward(self, x: Tensor, sigma: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """The velocity (B, 3, H, W) of states x at noise levels σ (B,), by words (B, L, D) where the mask (B, L) is."""
        image = self.patches(x).flatten(2).transpose(1, 2) + self.places
        angles = sigma[:, None] * torch.pi * torch.arange(1, 9, device=x.device)
        time, text = self.time(torch.cat([angles.sin(), angles.cos()], 1)), (words * mask[:, :, None]).sum(1)
        tokens = torch.cat([image, words], 1) + (time + text)[:, None]
        read = torch.cat([mask.new_ones(image.shape[:2]), mask], 1)
        for block in self.blocks:
            tokens = block(tokens, read)
        patches = self.last(tokens[:, : image.shape[1]]).transpose(1, 2)
        clean = F.fold(patches, (SIDE, SIDE), PATCH, stride=PATCH)
        return (x - clean) / sigma.clamp(min=0.05)[:, None, None, None]


class YourBackbone(Backbone):
    """What training asks of a model: read it, encode texts, answer with a velocity, decode latents.

    Args:
        path: a safetensors file of the network's weights.
    """

    targets = ("to_q", "to_k", "to_v", "to_out", "into", "out")  # of a new adapter: endings of names of linear layers

    def __init__(self, path: str) -> None:
        self.path = path
        self._network: Painter | None = None

    @property
    def network(self) -> Painter:
        """What carries the adapters; its lists of blocks are what fsdp2 spreads over ranks."""
        assert self._network is not None, "call load() first"
        return self._network

    def load(self, device: torch.device | str = "cpu") -> None:
        """Read the weights, frozen; once."""
        if self._network is None:
            if not Path(self.path).is_file():
                raise FileNotFoundError(f"model {self.path!r} is no file; expected safetensors of a Painter")
            network = Painter()
            network.load_state_dict(load_file(self.path))
            self._network = network.requires_grad_(False).eval().to(device)

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W): this model draws pixels; another one would give what its autoencoder makes of them."""
        return 3, SIDE, SIDE

    def schedule(self) -> Schedule:
        """The noise levels that the model is meant for."""
        return LinearSchedule()

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Texts, a row each; lengths may differ, and a mask says where the words are."""
        table = self.network.words
        numbers = [[0, *(WORDS.index(word) for word in text.split())] for text in texts]
        return Conditioning.ragged([table(torch.tensor(row, device=table.weight.device)) for row in numbers])

    def velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, adapter: str | None = None, guidance_scale: float = 1.0
    ) -> Tensor:
        """The velocity (B, C, H, W), noise - clean, of an adapter or of the base; 1 is no guidance, 0 no text."""
        if guidance_scale not in (0, 1):
            return self.guide(*self.branches(x, sigma, cond, adapter), guidance_scale)
        branch = cond if guidance_scale == 1 else self.encode([""]).expand(len(x))
        assert branch.mask is not None
        with use_adapter(self.network, adapter):
            return self.network(x, sigma, branch.tokens, branch.mask).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1]."""
        return (latents / 2 + 0.5).clamp(0, 1)

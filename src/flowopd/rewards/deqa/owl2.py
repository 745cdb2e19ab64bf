"""mPLUG-Owl2 in plain torch, under the names of its published weights, asked for one token.

Axes: B images, N tokens, D channels, H heads, d channels of a head, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The prompt never changes, so its LLaMA-2 tokens are written out:
# USER: How would you rate the quality of this image?\n<image>\nASSISTANT: The quality of the image is
BEFORE = (1, 3148, 1001, 29901, 1128, 723, 366, 6554, 278, 11029, 310, 445, 1967, 29973, 13)
AFTER = (29871, 13, 22933, 9047, 13566, 29901, 450, 11029, 310, 278, 1967, 338)
LEVELS = {"excellent": 15129, "good": 1781, "fair": 6534, "poor": 6460, "bad": 4319}  # worth 5, 4, 3, 2, 1


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of the vision transformer, named as in config.json."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    layer_norm_eps: float = 1e-6

    @property
    def tokens(self) -> int:
        """One per patch, and one for the class."""
        return int((self.image_size // self.patch_size) ** 2 + 1)


@dataclass(frozen=True)
class AbstractorSizes:
    """Sizes of the abstractor, named as in config.json."""

    num_learnable_queries: int = 64
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Sizes of the language model, named as in config.json, and of what it looks through."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    vision: VisionSizes = field(default_factory=VisionSizes)
    abstractor: AbstractorSizes = field(default_factory=AbstractorSizes)

    @staticmethod
    def of(config: Mapping[str, Any]) -> Sizes:
        """The sizes in a config.json; what it leaves out is as published."""
        visual = config.get("visual_config") or {}
        vision = _known(VisionSizes, visual.get("visual_model", {}))
        abstractor = _known(AbstractorSizes, visual.get("visual_abstractor", {}))
        return _known(Sizes, {**config, "vision": vision, "abstractor": abstractor})


Record = TypeVar("Record")


def _known(record: type[Record], values: Mapping[str, Any]) -> Record:
    names = [item.name for item in fields(record)]  # type: ignore[arg-type]
    return record(**{name: values[name] for name in names if name in values})


class Owl2(nn.Module):
    """mPLUG-Owl2, asked for one token.

    Args:
        sizes: of every part.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.model = Body(sizes)
        self.lm_head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of the five levels, (B, 3, S, S) → (B, 5)."""
        last = self.model(pixels)[:, -1]
        return F.linear(last, self.lm_head.weight[list(LEVELS.values())])


class Body(nn.Module):
    """Vision transformer, abstractor and language model."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_size = sizes.hidden_size // sizes.num_attention_heads
        self.theta = sizes.rope_theta
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.vision_model = Vision(sizes.vision)
        self.visual_abstractor = Abstractor(sizes.abstractor, sizes.vision, sizes.hidden_size)
        self.layers = nn.ModuleList([LanguageLayer(sizes) for _ in range(sizes.num_hidden_layers)])
        self.norm = nn.RMSNorm(sizes.hidden_size, eps=sizes.rms_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Last states of the prompt with the image in it, (B, N, D)."""
        image = self.visual_abstractor(self.vision_model(pixels))
        before, after = (
            self.embed_tokens(torch.tensor(ids, device=pixels.device)).expand(len(pixels), -1, -1)
            for ids in (BEFORE, AFTER)
        )
        return self.language(torch.cat([before, image, after], 1), (len(BEFORE), image.shape[1], len(AFTER)))

    def language(self, x: Tensor, lengths: tuple[int, int, int]) -> Tensor:
        """Last states of ``lengths`` = (text, image, text) tokens, (B, N, D) → (B, N, D)."""
        turn = rotary(x, self.head_size, self.theta)
        for layer in self.layers:
            x = layer(x, lengths, turn)
        return self.norm(x)  # type: ignore[no-any-return]


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √d) v,  (B, H, N, d) → (B, N, H·d)."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2).flatten(2)


class Vision(nn.Module):
    """CLIP's vision transformer, normalised after the last layer too."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(sizes)
        self.encoder = Stack(VisionLayer(sizes) for _ in range(sizes.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, N, D), the class token first."""
        return self.post_layernorm(self.encoder(self.embeddings(pixels)))  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Layers one after the other; what else they see is the same for all."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        for layer in self.layers:
            x = layer(x, *context)
        return x


class VisionEmbeddings(nn.Module):
    """Patches, a class token and their places."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.Conv2d(3, width, sizes.patch_size, sizes.patch_size, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(1, sizes.tokens, width))
        self.pre_layernorm = nn.LayerNorm(width, eps=sizes.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, N, D)."""
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1)
        return self.pre_layernorm(tokens + self.position_embedding)  # type: ignore[no-any-return]


class VisionLayer(nn.Module):
    """Attention and a QuickGELU layer, each normalised before."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)
        self.self_attn = VisionAttention(sizes.hidden_size, sizes.num_attention_heads)
        self.post_attention_layernorm = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)
        self.mlp = VisionMLP(sizes.hidden_size, sizes.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class VisionAttention(nn.Module):
    """Self-attention whose joint projection holds q, k and v head by head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        joint = self.query_key_value(x).unflatten(-1, (self.heads, 3, -1))  # (B, N, H, 3, d)
        return self.dense(attend(*joint.permute(3, 0, 2, 1, 4)))  # type: ignore[no-any-return]


class VisionMLP(nn.Module):
    """W₂ (h · sigmoid(1.702 h)),  h = W₁ x."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        hidden = self.fc1(x)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))  # type: ignore[no-any-return]


class Abstractor(nn.Module):
    """Learned queries that read the image's tokens, in the language model's width, and an end token."""

    def __init__(self, sizes: AbstractorSizes, vision: VisionSizes, language_width: int) -> None:
        super().__init__()
        self.query_embeds = nn.Parameter(torch.zeros(1, sizes.num_learnable_queries, sizes.hidden_size))
        self.encoder = Stack(AbstractorLayer(sizes, vision) for _ in range(sizes.num_hidden_layers))
        self.visual_fc = nn.Linear(sizes.hidden_size, language_width)
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, language_width))

    def forward(self, image: Tensor) -> Tensor:
        """(B, N, D) → (B, queries + 1, language width)."""
        rows = len(image)
        seen = self.visual_fc(self.encoder(self.query_embeds.expand(rows, -1, -1), image))
        return torch.cat([seen, self.vit_eos.expand(rows, -1, -1)], 1)


class AbstractorLayer(nn.Module):
    """One reading; the published names put it one level deeper."""

    def __init__(self, sizes: AbstractorSizes, vision: VisionSizes) -> None:
        super().__init__()
        self.crossattention = CrossAttention(sizes, vision)

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """(B, Q, D), (B, N, D) → (B, Q, D)."""
        return self.crossattention(queries, image)  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """q ← LN(q);  q ← q + attention(q; [q, LN(image)]);  q ← q + SwiGLU(LN(q)).

    The first residual starts from the normalised queries.
    """

    def __init__(self, sizes: AbstractorSizes, vision: VisionSizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.hidden_size)  # 1e-5, unlike the layers with an eps of their own in the config
        self.normk = nn.LayerNorm(vision.hidden_size)
        self.attention = PlacedAttention(sizes, vision)
        self.output = CrossOutput(sizes)

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """(B, Q, D), (B, N, D) → (B, Q, D)."""
        queries = self.norm1(queries)
        read = self.attention(queries, torch.cat([queries, self.normk(image)], 1))
        return self.output(queries, read)  # type: ignore[no-any-return]


class PlacedAttention(nn.Module):
    """Attention to the queries and the image; sines and cosines of the places are added to q and k, not to v."""

    def __init__(self, sizes: AbstractorSizes, vision: VisionSizes) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.heads = sizes.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(vision.hidden_size, width)
        self.value = nn.Linear(vision.hidden_size, width)
        self.q_pos_embed = nn.Parameter(torch.zeros(sizes.num_learnable_queries, width))
        self.k_pos_embed = nn.Parameter(torch.zeros(vision.tokens, width))

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """(B, Q, D), (B, Q + N, D) → (B, Q, D)."""
        query = self.query(queries + self.q_pos_embed)
        key = self.key(context + torch.cat([self.q_pos_embed, self.k_pos_embed]))
        parts = (query, key, self.value(context))
        return attend(*(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts))


class CrossOutput(nn.Module):
    """Projection of what was read, and the feed-forward half of the layer."""

    def __init__(self, sizes: AbstractorSizes) -> None:
        super().__init__()
        self.out_proj = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.norm2 = nn.LayerNorm(sizes.hidden_size)
        self.mlp = AbstractorMLP(sizes)

    def forward(self, queries: Tensor, read: Tensor) -> Tensor:
        """(B, Q, D), (B, Q, D) → (B, Q, D)."""
        queries = queries + self.out_proj(read)
        return queries + self.mlp(self.norm2(queries))  # type: ignore[no-any-return]


class AbstractorMLP(nn.Module):
    """W₂ LN(silu(W₁ x) · W₃ x)."""

    def __init__(self, sizes: AbstractorSizes) -> None:
        super().__init__()
        width, hidden = sizes.hidden_size, sizes.intermediate_size
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(hidden, width)
        self.w3 = nn.Linear(width, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=sizes.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Q, D) → (B, Q, D)."""
        return self.w2(self.ffn_ln(F.silu(self.w1(x)) * self.w3(x)))  # type: ignore[no-any-return]


class Multiway(nn.Module):
    """Two copies of a layer, the first for text, the second for the image.

    Args:
        make: builds one copy.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])

    def forward(self, x: Tensor, lengths: tuple[int, int, int]) -> Tensor:
        """Text, image, text of ``lengths``, each through its copy, (B, N, D) → (B, N, E)."""
        text, image = self.multiway
        before, middle, after = x.split(lengths, 1)
        return torch.cat([text(before), image(middle), text(after)], 1)


class LanguageLayer(nn.Module):
    """LLaMA's layer; the norms are those of a token's modality."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = Multiway(lambda: nn.RMSNorm(sizes.hidden_size, eps=sizes.rms_norm_eps))
        self.self_attn = LanguageAttention(sizes.hidden_size, sizes.num_attention_heads)
        self.post_attention_layernorm = Multiway(lambda: nn.RMSNorm(sizes.hidden_size, eps=sizes.rms_norm_eps))
        self.mlp = LanguageMLP(sizes.hidden_size, sizes.intermediate_size)

    def forward(self, x: Tensor, lengths: tuple[int, int, int], turn: tuple[Tensor, Tensor]) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        x = x + self.self_attn(self.input_layernorm(x, lengths), lengths, turn)
        return x + self.mlp(self.post_attention_layernorm(x, lengths))  # type: ignore[no-any-return]


class LanguageAttention(nn.Module):
    """Causal attention with rotary places; keys and values are those of a token's modality."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = Multiway(lambda: nn.Linear(width, width, bias=False))
        self.v_proj = Multiway(lambda: nn.Linear(width, width, bias=False))
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, lengths: tuple[int, int, int], turn: tuple[Tensor, Tensor]) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        parts = (self.q_proj(x), self.k_proj(x, lengths), self.v_proj(x, lengths))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.o_proj(attend(turned(query, turn), turned(key, turn), value, causal=True))  # type: ignore[no-any-return]


class LanguageMLP(nn.Module):
    """W_down (silu(W_gate x) · W_up x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


def rotary(x: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles  n · θ^(-2i/d),  (N, d) each, in the dtype of ``x`` (B, N, D)."""
    powers = torch.arange(0, head_size, 2, device=x.device).float() / head_size
    angles = torch.outer(torch.arange(x.shape[1], device=x.device).float(), 1 / theta**powers).repeat(1, 2)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Channel i and channel i + d/2 of each head (B, H, N, d) turned by the angle of their token."""
    first, second = x.chunk(2, -1)
    cos, sin = turn
    return x * cos + torch.cat([-second, first], -1) * sin

"""ImageReward: how an expert would rate an image for its prompt, by BLIP reading both together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from flowopd.records import Prompt
from flowopd.rewards.base import Scores
from flowopd.rewards.clip import cropped
from flowopd.rewards.model import ModelReward, Precision, linear_head, read_pretrained, read_tensors, weights_file

NETWORK = "THUDM/ImageReward"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score over the training images
PROMPT_TOKENS = 35
HEAD_WIDTH = 64  # of the vision transformer's attention, in every size of it
VISION = "blip.visual_encoder."
TEXT = "blip.text_encoder."
TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
)
RENAMES = {  # published name of a vision tensor: name in transformers
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    "norm.": "post_layernorm.",
}
RENAMES_IN_BLOCK = {
    "attn.qkv.": "self_attn.qkv.",
    "attn.proj.": "self_attn.projection.",
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
}


class ImageReward(ModelReward):
    """How well an image is made and fits its prompt,  r = (h(image, text) - 0.167) / 1.033.

    h is five linear layers in a row on the first token of BLIP's text encoder, which looks at the image; on the
    images it was trained on, r has mean 0 and deviation 1. The part ``paper`` is the same number.

    Args:
        path: folder of ``ImageReward.pt`` and ``med_config.json``, or their id on the hub.
        revision: branch, tag or commit on the hub.
        tokenizer: folder of BERT's tokenizer, or the id of a model on the hub that has it.
        dtype: what the network computes in; 0.9 GB of weights in half precision, twice that in float32.
        batch_size: images per forward.
        offload: keep the weights on the CPU between uses.

    References:
        ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation (Xu et al., 2023).
    """

    weights: ClassVar = {NETWORK: 446_206_689}

    def __init__(
        self,
        path: str = NETWORK,
        revision: str | None = None,
        tokenizer: str = "google-bert/bert-base-uncased",
        dtype: Precision = "float32",
        batch_size: int = 16,
        offload: bool = False,
    ) -> None:
        super().__init__(batch_size, offload, dtype)
        self.path = path
        self.revision = revision
        self.tokenizer = tokenizer
        self._blip: Blip
        self._words: Any = None

    def read(self) -> None:
        """Read the network and its tokenizer.

        Raises:
            FileNotFoundError: if they are not there.
            ValueError: if the checkpoint is not an ImageReward.
        """
        words = "`hf download google-bert/bert-base-uncased` gets it and prints where it is"
        self._words = read_pretrained(AutoTokenizer, self.tokenizer, words)
        source = "`hf download THUDM/ImageReward ImageReward.pt med_config.json` gets it and prints where it is"
        config = json.loads(weights_file(self.path, "med_config.json", self.revision, source).read_text("utf-8"))
        file = weights_file(self.path, "ImageReward.pt", self.revision, source)
        try:
            self._blip = Blip.read(read_tensors(file), config, self.torch_dtype)
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split()[:20])
            raise ValueError(f"{file} is not an ImageReward checkpoint: {reason}") from error

    def networks(self) -> Iterable[nn.Module]:
        """BLIP with its head."""
        return [self._blip]

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Each image with its own prompt, cut after 35 tokens."""
        texts = [prompt.text for prompt in prompts]
        tokens = self._words(texts, padding=True, truncation=True, max_length=PROMPT_TOKENS, return_tensors="pt")
        tokens = tokens.to(images.device)
        raw = self._blip(cropped(images, self._blip.size), tokens.input_ids, tokens.attention_mask)
        score = (raw - MEAN) / STD
        return Scores(score, {"paper": score})


class Blip(nn.Module):
    """A vision transformer, BERT with cross-attention to its tokens, and the head, by the modules of transformers.

    Args:
        vision, text: the two encoders.
        head: float32, on the first token of the text.
    """

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, head: nn.Module) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.head = head

    @property
    def size(self) -> int:
        """Side of the pictures it reads, in pixels."""
        return int(self.vision.config.image_size)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Raw scores (B,) of pixels (B, 3, size, size) and tokens (B, L); ``mask`` is 0 on padding."""
        seen = self.vision(pixels).last_hidden_state
        read = self.text(tokens, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False).last_hidden_state
        score: Tensor = self.head(read[:, 0].float())[:, 0]
        return score

    @staticmethod
    def read(tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> Blip:
        """Build it from published tensors and BERT's published config; the sizes of the vision transformer are theirs.

        Raises:
            KeyError: if a tensor is missing.
            RuntimeError: if one has another shape.
        """
        vision = {vision_name(key): value for key, value in below(VISION, tensors).items()}
        # a buffer that transformers does not keep
        text = {key: value for key, value in below(TEXT, tensors).items() if key != "embeddings.position_ids"}
        eyes = BlipVisionModel(vision_config(vision))
        eyes.load_state_dict(vision)
        reader = BlipTextModel(text_config(config, eyes.config.hidden_size), add_pooling_layer=False)
        reader.load_state_dict(text)
        return Blip(eyes.to(dtype), reader.to(dtype), linear_head(below("mlp.", tensors)))


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def vision_name(key: str) -> str:
    """The name in transformers of a published vision tensor."""
    start = next((start for start in RENAMES if key.startswith(start)), "")
    key = RENAMES.get(start, "") + key.removeprefix(start)
    for old, new in RENAMES_IN_BLOCK.items():
        key = key.replace(f".{old}", f".{new}")
    return key


def vision_config(tensors: Mapping[str, Tensor]) -> BlipVisionConfig:
    """Sizes of a vision transformer, read off its tensors."""
    width, _, patch, _ = tensors["embeddings.patch_embedding.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len({key.split(".")[2] for key in tensors if key.startswith("encoder.layers.")}),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * isqrt(tensors["embeddings.position_embedding"].shape[1] - 1),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def text_config(published: Mapping[str, Any], vision_width: int) -> BlipTextConfig:
    """BERT's config in transformers; called a decoder, as only then it has cross-attention."""
    sizes = {name: published[name] for name in TEXT_SIZES}
    special = {"bos_token_id": None, "eos_token_id": None, "sep_token_id": None, "pad_token_id": 0}
    return BlipTextConfig(encoder_hidden_size=vision_width, is_decoder=True, **sizes, **special)

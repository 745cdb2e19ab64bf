"""PickScore: what people of Pick-a-Pic would prefer, by a CLIP ViT-H/14 trained on their choices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPModel

from flowopd.records import Prompt
from flowopd.rewards.base import Scores
from flowopd.rewards.clip import cropped
from flowopd.rewards.model import ModelReward, Precision, read_pretrained

NETWORK = "yuvalkirstain/PickScore_v1"
PAPER = 26.0  # a score of 1 in training, on the paper's scale


class PickScore(ModelReward):
    """How well an image pleases whoever asked for it,  r = s / 26,  s = exp(t) · cos(image, text).

    t is the network's learned temperature, exp(t) ≈ 100. The part ``paper`` is s, as papers report it (about 20).

    Args:
        path: folder of the network in transformers' layout, or its id on the hub.
        revision: branch, tag or commit on the hub.
        tokenizer: folder of the tokenizer, or the id of a model on the hub that has it.
        dtype: what the network computes in; 2.0 GB of weights in half precision, twice that in float32.
        batch_size: images per forward.
        offload: keep the weights on the CPU between uses.

    References:
        Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation (Kirstain et al., 2023).
    """

    weights: ClassVar = {NETWORK: 986_109_441}

    def __init__(
        self,
        path: str = NETWORK,
        revision: str | None = None,
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        dtype: Precision = "float32",
        batch_size: int = 16,
        offload: bool = False,
    ) -> None:
        super().__init__(batch_size, offload, dtype)
        self.path = path
        self.revision = revision
        self.tokenizer = tokenizer
        self._clip: Any = None
        self._words: Any = None

    def read(self) -> None:
        """Read the network and its tokenizer.

        Raises:
            FileNotFoundError: if they are not there.
            ValueError: if the network is not a whole CLIP.
        """
        source = (
            "`hf download yuvalkirstain/PickScore_v1` and `hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K` get it"
        )
        self._words = read_pretrained(AutoTokenizer, self.tokenizer, source)
        options = {"revision": self.revision, "dtype": self.torch_dtype, "output_loading_info": True}
        self._clip, found = read_pretrained(CLIPModel, self.path, source, **options)
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"{self.path!r} is not a whole CLIPModel: it has no {missing[0]}, one of {len(missing)}")

    def networks(self) -> Iterable[nn.Module]:
        """The CLIP."""
        return [self._clip]

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Each image with its own prompt."""
        cosine = (self.images(images) * self.texts([prompt.text for prompt in prompts])).sum(dim=-1)
        paper = self._clip.logit_scale.float().exp() * cosine
        return Scores(paper / PAPER, {"paper": paper})

    def images(self, images: Tensor) -> Tensor:
        """Features of images (B, 3, H, W) uint8: (B, D) float32, of length 1."""
        pixels = cropped(images, self._clip.config.vision_config.image_size).to(self.torch_dtype)
        return normalize(self._clip.get_image_features(pixels).pooler_output.float(), dim=-1)

    def texts(self, texts: list[str]) -> Tensor:
        """Features of texts, cut after 77 tokens: (B, D) float32, of length 1."""
        length = self._clip.config.text_config.max_position_embeddings
        tokens = self._words(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(self._clip.device)
        features = self._clip.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask)
        return normalize(features.pooler_output.float(), dim=-1)

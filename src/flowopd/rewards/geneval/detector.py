"""Mask2Former as GenEval runs it: mmdet's test pipeline before it, mmdet's instance post-processing after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from transformers import Mask2FormerConfig, Mask2FormerModel, Mask2FormerPreTrainedModel

from flowopd.prompts.geneval import OBJECTS
from flowopd.rewards.geneval.verdicts import LEAST_SCORE, Detection
from flowopd.rewards.model import read_pretrained

META = "facebook/mask2former-swin-small-coco-instance"
META_NUMBERS = 68_741_083
SOURCE = f"`hf download {META}` gets Meta's, `flowopd convert` makes a folder of GenEval's own"
SHORT, LONG, DIVISOR = 800, 1333, 32  # pixels
MEAN = (123.675, 116.28, 103.53)  # of RGB in [0, 255], ImageNet's
STD = (58.395, 57.12, 57.375)
MOST_INSTANCES = 100  # per image
TRAINING_ONLY = r"^criterion\."  # in published checkpoints: the weights of the loss
NEVER_RUN = r"swin\.layernorm"  # in the network, in no checkpoint

Size = tuple[int, int]


class Detector(Mask2FormerPreTrainedModel):  # type: ignore[misc]  # transformers is untyped
    """transformers' Mask2Former up to its last logits, by the tensor names of ``Mask2FormerForUniversalSegmentation``.

    That class also builds its training loss, which needs scipy.
    """

    main_input_name = "pixel_values"
    _keys_to_ignore_on_load_unexpected = [TRAINING_ONLY]  # noqa: RUF012 - a hook of transformers
    _keys_to_ignore_on_load_missing = [NEVER_RUN]  # noqa: RUF012

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of classes, (B, Q, 81), and of masks, (B, Q, H / 4, W / 4)."""
        output = self.model(pixel_values=pixel_values)
        queries = self.model.transformer_module.decoder.layernorm(output.transformer_decoder_last_hidden_state)
        return self.class_predictor(queries), output.masks_queries_logits[-1]

    def detect(self, images: Tensor) -> list[list[Detection]]:
        """Detections in each image that any threshold of GenEval can keep.

        Args:
            images: (B, 3, H, W) uint8, RGB.
        """
        pixels, resized = prepare(images)
        class_logits, mask_logits = self(pixels.to(self.dtype))
        padded, original = _size(pixels), _size(images)
        both = zip(class_logits, mask_logits, strict=True)
        return [instances(*logits, padded, resized, original, least=LEAST_SCORE) for logits in both]


def prepare(images: Tensor) -> tuple[Tensor, Size]:
    """Images as the detector reads them.

    Resized bilinearly to a short side of 800 px, or to a long side of 1333 px where that is less; rounded to bytes;
    normalised by ImageNet's mean and deviation; zeros added right and below up to a multiple of 32.

    Args:
        images: (B, 3, H, W) uint8.

    Returns:
        pixels, (B, 3, H', W') float32, and (height, width) without the padding.
    """
    scale = min(SHORT / min(_size(images)), LONG / max(_size(images)))
    height, width = (int(side * scale + 0.5) for side in _size(images))
    resized = interpolate(images.float(), (height, width), mode="bilinear", align_corners=False).round()
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return pad((resized - mean) / std, (0, -width % DIVISOR, 0, -height % DIVISOR)), (height, width)


def _size(images: Tensor) -> Size:
    return images.shape[-2], images.shape[-1]


def instances(
    class_logits: Tensor, mask_logits: Tensor, padded: Size, resized: Size, original: Size, least: float = 0.0
) -> list[Detection]:
    """Detections in one image: the 100 best pairs of query and class, each with the mask of its query.

    score = softmax(class logits)[class] · mean of sigmoid(mask logits) where these are > 0.

    Args:
        class_logits: (Q, C + 1), the last being "nothing".
        mask_logits: (Q, h, w).
        padded, resized, original: (height, width) of what the network read, of that without padding, and of the image.
        least: leaves out detections whose class alone scores no more, since the mask cannot raise it.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    scores, best = probabilities.flatten().topk(min(MOST_INSTANCES, probabilities.numel()))
    scores, best = scores[scores > least], best[scores > least]
    if not len(best):
        return []
    classes = probabilities.shape[1]
    logits = _full_size(mask_logits[best // classes].float(), padded, resized, original)
    masks = logits > 0
    inside = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
    labels = [OBJECTS[i] for i in (best % classes).tolist()]
    rows = zip(labels, (scores * inside).tolist(), _boxes(masks).tolist(), masks, strict=True)
    return [Detection(label, score, (*box,), mask) for label, score, box, mask in rows]


def _full_size(logits: Tensor, padded: Size, resized: Size, original: Size) -> Tensor:
    """Mask logits (N, h, w) on the pixels of the image."""
    read = interpolate(logits[None], padded, mode="bilinear", align_corners=False)[..., : resized[0], : resized[1]]
    return interpolate(read, original, mode="bilinear", align_corners=False)[0]


def _boxes(masks: Tensor) -> Tensor:
    """Left, top, right, bottom (exclusive) of each mask, (N, H, W) → (N, 4); zeros for an empty one."""
    columns, rows = masks.any(1).int(), masks.any(2).int()
    starts = [side.argmax(1) for side in (columns, rows)]
    ends = [side.shape[1] - side.flip(1).argmax(1) for side in (columns, rows)]
    return torch.stack([*starts, *ends], 1) * masks.any(2).any(1)[:, None]


def read_detector(path: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Detector:
    """Read a COCO instance Mask2Former, of the hub or from a folder, strictly.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if a tensor is missing or too many, or the classes are not COCO's 80.
    """
    options = {"revision": revision, "dtype": dtype, "output_loading_info": True}
    network, report = read_pretrained(Detector, path, SOURCE, **options)
    _check(path, network, report)
    return network  # type: ignore[no-any-return]


def _check(path: str, network: Detector, report: Mapping[str, Any]) -> None:
    absent = sorted(report["missing_keys"])
    extra = sorted(report["unexpected_keys"])
    odd = sorted(str(entry) for entry in report["mismatched_keys"])
    if absent or extra or odd:
        found = {"missing": absent, "unexpected": extra, "of another shape": odd}
        told = "; ".join(f"{len(names)} {what}, such as {names[0]}" for what, names in found.items() if names)
        raise ValueError(f"{path!r} does not hold the tensors of its Mask2Former config: {told}")
    if network.config.num_labels != len(OBJECTS):
        raise ValueError(
            f"detector {path!r} knows {network.config.num_labels} classes; GenEval needs COCO's {len(OBJECTS)}, in "
            "their order"
        )

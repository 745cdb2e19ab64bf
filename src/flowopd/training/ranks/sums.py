"""Sums over ranks, number by number."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn.functional import pad


def added_over_ranks(module: LightningModule, facts: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Sums over all ranks, number by number; exchanged as JSON in bytes, for ranks may know of different names."""
    own = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8, device=module.device)
    lengths = cast(Tensor, module.all_gather(torch.tensor([len(own)], device=module.device))).flatten().tolist()
    texts = cast(Tensor, module.all_gather(pad(own, (0, max(lengths) - len(own))))).reshape(len(lengths), -1)
    ranks = [json.loads(bytes(text[:length].tolist())) for text, length in zip(texts, lengths, strict=True)]
    names = dict.fromkeys(name for rank in ranks for name in rank)
    each = {name: [rank[name] for rank in ranks if name in rank] for name in names}
    return {name: [sum(numbers) for numbers in zip(*found, strict=True)] for name, found in each.items()}

"""Frozen weights of fewer bits: what diffusers is asked for, and what it takes."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

Bits = Literal["nf4", "int8", "fp8"]

BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0, "fp8": 1.0}
"""Of a weight; nf4 keeps a float32 for every 64 of them."""
SCALES = {"nf4": 0, "int8": 5, "fp8": 4}
"""Bytes besides, at most, for a row of a matrix: its scale, and its zero."""


def transformer_config(bits: Bits, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """The quantisation of a model of diffusers.

    Raises:
        ValueError: if a library, or the device that it needs, is not here.
    """
    import diffusers

    return _config(diffusers, bits, dtype)


def encoders_config(bits: Bits, dtype: torch.dtype, parts: Iterable[str]) -> Any:  # noqa: ANN401
    """The quantisation of the text encoders of a pipeline, which are models of transformers.

    Raises:
        ValueError: if a library, or the device that it needs, is not here.
    """
    import transformers
    from diffusers import PipelineQuantizationConfig

    return PipelineQuantizationConfig(quant_mapping={part: _config(transformers, bits, dtype) for part in parts})


def nbytes(network: nn.Module, bits: Bits | None = None) -> float:
    """Bytes of all parameters and buffers, once the weights of linear layers are quantised."""
    plain = float(sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers())))
    if bits is None:
        return plain
    weights = [layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)]
    fewer = (w.numel() * BYTES[bits] + len(w) * SCALES[bits] - w.nbytes for w in weights)
    return plain + sum(fewer)


def _config(library: Any, bits: Bits, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """In the words of diffusers or of transformers, which are the same."""
    package = "bitsandbytes" if bits == "nf4" else "torchao"
    if find_spec(package) is None:
        raise ValueError(f'quantize: {bits} needs {package}; pip install "flowopd[quantize]"')
    if bits == "nf4":
        if not torch.cuda.is_available():
            raise ValueError("quantize: nf4 needs a CUDA device, and none is found here; int8 needs none")
        return library.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return library.TorchAoConfig(Int8WeightOnlyConfig() if bits == "int8" else Float8WeightOnlyConfig())

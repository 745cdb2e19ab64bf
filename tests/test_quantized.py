"""A base of fewer bits holds every law of a whole one; what is missing, and what does not go together, is said."""

from functools import partial

import pytest
import tiny
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn

from flowopd.core import TransitionKL
from flowopd.models import LoRASpec, quantized
from flowopd.models.adapters import adapter_parameters, add_adapter, attach, read_adapter, take_adapter
from flowopd.models.quantized import nbytes, transformer_config
from flowopd.models.shards import shard
from flowopd.preflight.shapes import Shapes
from flowopd.rollouts import Sampler
from flowopd.teachers import LoRATeacher
from flowopd.testing import check_backbone
from flowopd.training import AdapterExport, OPDStudent, TeacherCallback

SMALL = {"texts": ["red 1", "blue 22"], "steps": [4], "scales": [1.0, 4.5]}


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao")


@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_a_quantised_base_holds_every_law_of_a_backbone(tiny_pipeline, torchao, bits):
    backbone = tiny.loaded(tiny_pipeline, quantize=bits)
    options = {"quantization_config": transformer_config(bits, torch.float32), "dtype": torch.float32}
    network = SD3Transformer2DModel.from_pretrained(tiny_pipeline, subfolder="transformer", **options)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, transformer=network, dtype=torch.float32)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        setattr(pipeline, part, backbone.texts.parts()[part])
    found = check_backbone(backbone, pipeline, **SMALL)
    assert found["ratio_is_one"] == found["none_is_the_base"] == 0
    assert {p.dtype for p in adapter_parameters(backbone.network, "probe")} == {torch.float32}


@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_a_plan_counts_what_a_quantised_base_takes(tiny_pipeline, torchao, bits):
    whole, few = tiny.loaded(tiny_pipeline), tiny.loaded(tiny_pipeline, quantize=bits)
    assert kept(few.network) <= Shapes(few).transformer_bytes() <= 1.02 * kept(few.network)
    assert Shapes(few).transformer_bytes() < 0.6 * Shapes(whole).transformer_bytes() == 0.6 * kept(whole.network)


def test_a_linear_layer_takes_what_its_bits_say():
    layer = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    assert [nbytes(layer, bits) for bits in (None, "int8", "nf4")] == [4096, 2048 + 32 * 5, 1024 + 128]


def test_an_adapter_fits_whatever_shape_quantised_weights_have(tiny_pipeline):
    backbone = tiny.loaded(tiny_pipeline)
    add_adapter(backbone.network, "first", LoRASpec(rank=4))
    adapter = take_adapter(backbone.network, "first")
    for module in backbone.network.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, type(backbone.network)):
            module.weight.data = module.weight.data.reshape(-1, 1)  # as bitsandbytes keeps four bits
    attach(backbone.network, "second", adapter)
    assert take_adapter(backbone.network, "second").fingerprint() == adapter.fingerprint()


def test_a_missing_library_is_one_sentence(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    for bits, package in (("nf4", "bitsandbytes"), ("int8", "torchao"), ("fp8", "torchao")):
        backbone = tiny.backbone(tiny_pipeline, quantize=bits)
        with pytest.raises(ValueError, match=rf'quantize: {bits} needs {package}; pip install "flowopd\[quantize\]"'):
            backbone.load()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_four_bits_ask_for_a_device(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="nf4 needs a CUDA device"):
        tiny.loaded(tiny_pipeline, quantize="nf4")


def test_a_quantised_base_is_not_spread_over_ranks(tiny_pipeline):
    network = tiny.loaded(tiny_pipeline).network
    network.hf_quantizer = object()
    with pytest.raises(ValueError, match="a quantised base cannot be spread over ranks"):
        shard(network, None)


def test_a_quantised_base_is_another_one_for_teachers_and_texts(tiny_pipeline):
    assert tiny.backbone(tiny_pipeline, quantize="int8").identity != tiny.backbone(tiny_pipeline).identity


def test_a_student_of_a_quantised_base_learns_and_leaves_the_base_alone(tiny_pipeline, torchao, tmp_path):
    backbone = tiny.backbone(tiny_pipeline, quantize="int8")
    options = {"sampler": Sampler(num_steps=3), "lora": LoRASpec(rank=4, alpha=8)}
    policy = OPDStudent(backbone, TransitionKL(), **options, optimizer=partial(torch.optim.SGD, lr=0.1))
    teacher = TeacherCallback(["red"], LoRATeacher(tiny.expert(tmp_path / "teacher", tiny_pipeline)))
    other = tiny.loaded(tiny_pipeline, quantize="int8")
    tiny.trainer(tmp_path, [teacher, AdapterExport()]).fit(policy, tiny.data())
    assert any(factor.any() for factor in take_adapter(backbone.network, "student").tensors.values())
    exported = read_adapter(str(tmp_path / "adapter"))
    assert exported.fingerprint() == take_adapter(backbone.network, "student").fingerprint()
    x, sigma, cond = torch.randn(1, *backbone.latent_shape()), torch.tensor([0.5]), backbone.encode(["red 1"])
    assert torch.equal(backbone.velocity(x, sigma, cond), other.velocity(x, sigma, cond))


def kept(network):
    """Bytes of all that a network keeps, quantised tensors by their parts."""
    total = 0
    for tensor in (*network.parameters(), *network.buffers()):
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        total += sum(getattr(tensor, name).nbytes for name in names) if names else tensor.nbytes
    return total

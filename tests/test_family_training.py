"""The laws of training further families: two tasks, guidance folded, two steps of a rollout, on the fused road."""

from functools import partial

import pytest
import tiny
import tiny_families
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks

import flowopd
from flowopd.core import Anchored, TransitionKL
from flowopd.models import LoRASpec
from flowopd.models.adapters.files import read_adapter, save_adapter
from flowopd.models.adapters.lora import adapter_parameters, add_adapter, take_adapter
from flowopd.rollouts import Sampler, SpreadSteps
from flowopd.teachers import BaseTeacher, LoRATeacher
from flowopd.training import EMA, AdapterExport, AnchorCallback, OPDStudent, TeacherCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # a resumed run gets its own folder
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped"),  # blocks of FLUX return views, which it never changes in place
]
SMALL = {"dtype": "float32", "resolution": (16, 24)}
FAMILIES = {
    "zimage": (tiny_families.zimage, partial(flowopd.ZImageBackbone, **SMALL, max_sequence_length=96)),
    "qwen": (tiny_families.qwen, partial(flowopd.QwenImageBackbone, **SMALL, negative_prompt=" ")),
    "flux": (tiny_families.flux, partial(flowopd.FluxBackbone, **SMALL, max_sequence_length=16)),
    "klein": (tiny_families.klein, partial(flowopd.Flux2KleinBackbone, **SMALL, max_sequence_length=96)),
}
TASKS = ("red", "green")
DDP, FSDP2 = ({"strategy": name, "devices": 2} for name in ("ddp", "fsdp2"))


@pytest.fixture(scope="module", params=FAMILIES)
def world(request, tmp_path_factory):
    """A backbone not yet loaded, to be had again and again, and where its experts are."""
    home, (pipeline, kind) = tmp_path_factory.mktemp(request.param), FAMILIES[request.param]
    pipeline().save_pretrained(home / "base")
    made = partial(kind, str(home / "base"))
    backbone = made()
    backbone.load()
    add_adapter(backbone.network, "expert", LoRASpec(rank=2), backbone.targets)
    for task in TASKS:
        for factor in adapter_parameters(backbone.network, "expert"):
            factor.data.normal_(std=0.1)
        save_adapter(take_adapter(backbone.network, "expert"), home / task)
    return made, home


def fit(folder, world, max_epochs: int = 2, updates: int = 1, ckpt_path=None, **ranks) -> OPDStudent:
    """Two iterations of eight rows, in batches of two."""
    torch.manual_seed(0)
    made, home = world
    policy = OPDStudent(
        made(),
        Anchored(TransitionKL(), strength=0.5),
        sampler=Sampler(num_steps=4, steps=SpreadSteps(2)),
        lora=LoRASpec(rank=4),
        optimizer=partial(torch.optim.SGD, lr=1.0, momentum=0.9),
    )
    experts = {task: LoRATeacher(str(home / task), guidance_scale=3.0) for task in TASKS}
    signals = [TeacherCallback([task], expert) for task, expert in experts.items()]
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callbacks = [*signals, AnchorCallback(BaseTeacher(2.0)), EMA(0.9), AdapterExport(), saving]
    batches = policy.batches_per_rollout() * 4 // ranks.get("devices", 1)
    options = {"enable_checkpointing": True, "accumulate_grad_batches": batches // updates, **ranks}
    data = tiny.data(*TASKS, batch_size=2, fused=True)
    safe = True if ckpt_path else None
    tiny.trainer(folder, callbacks, max_epochs, **options).fit(policy, data, ckpt_path=ckpt_path, weights_only=safe)
    return policy


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """Where one rank trained two iterations of two updates."""
    folder = tmp_path_factory.mktemp("alone")
    fit(folder, world, updates=2)
    return folder


def trained(folder) -> dict[str, torch.Tensor]:
    return read_adapter(str(folder / "adapter")).tensors


def test_two_mixed_tasks_train_by_two_steps_of_a_fused_rollout(alone):
    assert torch.load(alone / "epoch=1.ckpt", weights_only=True)["global_step"] == 4
    assert all(bool(factor.isfinite().all()) for factor in trained(alone).values())
    assert max(float(factor.abs().max()) for name, factor in trained(alone).items() if "lora_B" in name) > 1e-4


def test_a_resumed_run_ends_the_same_to_the_bit(world, alone, tmp_path):
    fit(tmp_path, world, updates=2, ckpt_path=str(alone / "epoch=0.ckpt"))
    again, before = trained(tmp_path), trained(alone)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], factor) for name, factor in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_two_ranks_train_what_one_trains(world, alone, tmp_path, ranks):
    run_ranks(lambda: fit(tmp_path, world, updates=2, **ranks), timeout=300)
    for name, factor in trained(alone).items():
        torch.testing.assert_close(trained(tmp_path)[name], factor, rtol=0, atol=1e-6)

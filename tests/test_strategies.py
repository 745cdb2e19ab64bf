"""The laws of sharding: fsdp2 trains what ddp trains, nobody waits for ever, and its checkpoints are everybody's."""

import json
from functools import partial

import pytest
import tiny
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import run_ranks, slurm_node, torchrun_node
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves_with_path

from flowopd.models import LoRASpec
from flowopd.models.adapters.files import read_adapter
from flowopd.models.adapters.lora import ATTENTION, adapter_names, adapter_parameters
from flowopd.preflight.check import SelfCheck
from flowopd.teachers import FullTeacher, LoRATeacher
from flowopd.training import EMA, AdapterExport, OPDStudent, RewardCallback, TeacherCallback
from flowopd.training.ranks.lifecycle import plugins
from flowopd.training.ranks.strategies import check_halves, check_name, check_places, check_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # of checkpoints: a resumed run gets its own folder
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # a scored one needs no teachers
]
TASKS = ("red", "green")
ONE, DDP, FSDP2 = {}, {"strategy": "ddp", "devices": 2}, {"strategy": "fsdp2", "devices": 2}
LORA = LoRASpec(rank=4, alpha=8, targets=[*ATTENTION, "proj_out"])  # the last one is outside of all blocks
MOMENTUM = partial(torch.optim.SGD, lr=1.0, momentum=0.9)


@pytest.fixture(scope="module")
def experts(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return {task: tiny.expert(folder / task, tiny_pipeline, seed) for seed, task in enumerate(TASKS)}


@pytest.fixture(scope="module")
def fit(tiny_pipeline, experts):
    """Fit a student of two tasks; checkpoints, its average and the drawn scores stay in a folder."""

    def run(folder, ranks: dict, ckpt_path=None, recompute=False, max_epochs=2, first=(), **options) -> OPDStudent:
        torch.manual_seed(0)
        policy = tiny.policy(OPDStudent, tiny_pipeline, optimizer=MOMENTUM, lora=LORA)
        if recompute:
            policy.backbone.load()
            policy.backbone.network.enable_gradient_checkpointing()
        saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        reward = RewardCallback("brightness", tiny.Brightness())
        callbacks = [*first, *teachers(experts), reward, EMA(0.9), AdapterExport(), saving]
        options = {"accumulate_grad_batches": 3 if ranks else 6, "gradient_clip_val": 0.01} | options
        options = {"limit_val_batches": 1.0} | options
        trainer = tiny.trainer(folder, callbacks, max_epochs, enable_checkpointing=True, **ranks, **options)
        safe = True if ckpt_path else None
        trainer.fit(policy, tiny.data(*TASKS), ckpt_path=ckpt_path, weights_only=safe)
        return policy

    return run


def teachers(experts) -> list[TeacherCallback]:
    return [TeacherCallback([task], LoRATeacher(experts[task], guidance_scale=2.0)) for task in TASKS]


@pytest.fixture(scope="module")
def sharded(fit, tmp_path_factory):
    """Where two sharded ranks trained for two iterations."""
    folder = tmp_path_factory.mktemp("sharded")
    run_ranks(lambda: fit(folder, FSDP2))
    return folder


@pytest.fixture(scope="module")
def replicated(fit, tmp_path_factory):
    """Where two ranks of ddp did."""
    folder = tmp_path_factory.mktemp("replicated")
    run_ranks(lambda: fit(folder, DDP))
    return folder


def assert_same_leaves(first, second, **tolerance):
    one, two = dict(tree_leaves_with_path(first)), dict(tree_leaves_with_path(second))
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        if isinstance(leaf, Tensor) and tolerance:
            torch.testing.assert_close(two[path], leaf, rtol=0, **tolerance)
        else:
            assert torch.equal(two[path], leaf) if isinstance(leaf, Tensor) else two[path] == leaf, path


def checkpoint(folder, epoch: int, *parts: str) -> dict:
    content = torch.load(folder / f"epoch={epoch}.ckpt", weights_only=True)
    return {part: content[part] for part in parts} if parts else content


# --------------------------------------------------------------------------------------------------------- same numbers


def test_sharded_ranks_train_what_replicated_ranks_train(sharded, replicated):
    """Clipped and accumulated gradients, teachers with guidance, momentum, and the average, scored on the way."""
    for epoch in (0, 1):
        first, second = (checkpoint(folder, epoch, "state_dict", "callbacks") for folder in (replicated, sharded))
        assert_same_leaves(first["state_dict"], second["state_dict"], atol=1e-6)
        assert_same_leaves(first["callbacks"]["EMA"], second["callbacks"]["EMA"], atol=1e-6)
    exported = [read_adapter(str(folder / "adapter")).tensors for folder in (replicated, sharded)]
    assert_same_leaves(*exported, atol=1e-6)
    assert max(value.abs().max() for key, value in exported[0].items() if "lora_B" in key) > 1e-4


def test_an_adapter_outside_of_the_blocks_is_trained_too(sharded):
    assert read_adapter(str(sharded / "adapter")).tensors["proj_out.lora_B.weight"].abs().max() > 1e-5


@pytest.mark.parametrize("launched", [torchrun_node, slurm_node])
def test_two_nodes_train_what_two_ranks_of_one_train(fit, sharded, tmp_path, launched):
    nodes = {"strategy": "fsdp2", "devices": 1, "num_nodes": 2}
    run_ranks(lambda: fit(tmp_path, nodes, plugins=plugins()), launched=launched)
    assert_same_leaves(checkpoint(sharded, 1, "state_dict"), checkpoint(tmp_path, 1, "state_dict"))


def test_recomputed_activations_give_the_same_gradient(fit, sharded, tmp_path):
    run_ranks(lambda: fit(tmp_path, FSDP2, recompute=True))
    assert_same_leaves(checkpoint(sharded, 1, "state_dict"), checkpoint(tmp_path, 1, "state_dict"), atol=1e-6)


@pytest.mark.parametrize(("ranks", "unchecked"), [(FSDP2, "sharded"), (DDP, "replicated")], ids=["fsdp2", "ddp"])
def test_a_self_check_changes_nothing_that_is_trained(fit, tmp_path, request, ranks, unchecked):
    """It runs a forward with gradient whose backward never comes, before the first update."""
    run_ranks(lambda: fit(tmp_path, ranks, first=[SelfCheck()]))
    expected = checkpoint(request.getfixturevalue(unchecked), 1, "state_dict")
    assert_same_leaves(expected, checkpoint(tmp_path, 1, "state_dict"), atol=1e-6)


def test_mixed_precision_runs_sharded(fit, sharded, tmp_path):
    """bfloat16 moves the numbers a little; what is trained and saved is float32."""
    run_ranks(lambda: fit(tmp_path, FSDP2, precision="bf16-mixed"))
    full, mixed = (checkpoint(folder, 1, "state_dict") for folder in (sharded, tmp_path))
    assert all(value.dtype == torch.float32 for value in mixed["state_dict"].values())
    assert_same_leaves(full, mixed, atol=1e-2)
    with pytest.raises(AssertionError):
        assert_same_leaves(full, mixed, atol=1e-9)


def test_everything_on_the_network_is_sharded(fit, tmp_path):
    def look():
        network = fit(tmp_path, FSDP2, max_epochs=1).backbone.network
        assert len(adapter_names(network)) == 3
        for name in adapter_names(network):
            assert all(isinstance(parameter, DTensor) for parameter in adapter_parameters(network, name))
        held = sum(parameter.to_local().numel() for parameter in network.parameters())
        assert held == pytest.approx(sum(parameter.numel() for parameter in network.parameters()) / 2, rel=0.05)

    run_ranks(look)


def test_routing_that_differs_by_rank_keeps_the_ranks_in_step(tiny_pipeline, experts, tmp_path):
    """The first rank has rows of both tasks, the second of one alone; each row finds its own teacher's velocity."""

    def label():
        policy, data = tiny.policy(OPDStudent, tiny_pipeline), tiny.data(*TASKS)
        trainer = tiny.trainer(tmp_path, teachers(experts), max_epochs=0, **FSDP2)
        trainer.fit(policy, data)
        tasks = ["red", "green", "red", "red"] if trainer.global_rank == 0 else ["green"] * 4
        batch = data.few_held_out(2)
        cond, sigma = policy.backbone.encode([prompt.text for prompt in batch.prompts]), torch.full((4,), 0.5)
        routed = policy.signals.teaching.router.velocity(batch.noise, sigma, cond, tasks)
        alone = {task: role.teacher for task, role in zip(TASKS, policy.signals.teaching.roles, strict=True)}
        answers = {task: teacher.velocity(batch.noise, sigma, cond) for task, teacher in alone.items()}
        for row, task in enumerate(tasks):
            torch.testing.assert_close(routed[row], answers[task][row], rtol=0, atol=1e-5)

    run_ranks(label)


# ---------------------------------------------------------------------------------------------------------- checkpoints


PARTS = ("state_dict", "optimizer_states", "callbacks", "RolloutDataModule", "global_step", "epoch", "made_by")


def without_paths(content: dict) -> dict:
    return content | {"callbacks": {"EMA": content["callbacks"]["EMA"]}}


def test_a_sharded_run_resumes_to_the_bit(fit, sharded, tmp_path):
    run_ranks(lambda: fit(tmp_path, FSDP2, ckpt_path=sharded / "epoch=0.ckpt"))
    straight, resumed = (without_paths(checkpoint(folder, 1, *PARTS)) for folder in (sharded, tmp_path))
    assert_same_leaves(straight, resumed)


@pytest.mark.parametrize("ranks", [ONE, DDP], ids=["one", "ddp"])
def test_what_sharded_ranks_saved_goes_on_elsewhere(fit, sharded, tmp_path, ranks):
    def resume():
        fit(tmp_path, ranks, ckpt_path=sharded / "epoch=0.ckpt")

    run_ranks(resume) if ranks else resume()
    straight, resumed = (checkpoint(folder, 1) for folder in (sharded, tmp_path))
    assert_same_leaves(straight["state_dict"], resumed["state_dict"], atol=1e-6)
    assert_same_leaves(straight["callbacks"]["EMA"], resumed["callbacks"]["EMA"], atol=1e-6)


def test_what_two_ranks_saved_goes_on_alone(fit, replicated, tmp_path):
    fit(tmp_path, ONE, ckpt_path=replicated / "epoch=0.ckpt")
    assert_same_leaves(checkpoint(replicated, 1, "state_dict"), checkpoint(tmp_path, 1, "state_dict"), atol=1e-6)


def test_a_checkpoint_says_who_made_it(sharded, replicated):
    assert checkpoint(sharded, 0)["made_by"] == {"strategy": "fsdp2", "world_size": 2}
    assert checkpoint(replicated, 0)["made_by"] == {"strategy": "ddp", "world_size": 2}


def test_a_checkpoint_of_another_strategy_does_not_go_on_sharded(fit, replicated, tmp_path):
    def refuse():
        with pytest.raises(ValueError, match=r"^the checkpoint was made by strategy 'ddp' \(ranks: 2\); .*fsdp2"):
            fit(tmp_path, FSDP2, ckpt_path=replicated / "epoch=0.ckpt")

    run_ranks(refuse)


def test_a_checkpoint_of_another_strategy_is_scored_sharded(tiny_pipeline, replicated, tmp_path):
    """Its average, by any strategy alike; nothing of the optimiser is needed."""

    def validate(ranks: dict):
        policy = tiny.policy(OPDStudent, tiny_pipeline, lora=LORA)
        reward = RewardCallback("brightness", tiny.Brightness())
        trainer = tiny.trainer(tmp_path, [reward], limit_val_batches=1.0, **ranks)
        path = replicated / "epoch=1.ckpt"
        data, quiet = tiny.data(*TASKS), {"verbose": False, "weights_only": True}
        scores = trainer.validate(policy, datamodule=data, ckpt_path=path, **quiet)[0]
        if trainer.is_global_zero:
            (tmp_path / f"{len(ranks)}.json").write_text(json.dumps(scores))

    validate(ONE)
    run_ranks(lambda: validate(FSDP2))
    one, two = (json.loads((tmp_path / f"{len(ranks)}.json").read_text()) for ranks in (ONE, FSDP2))
    assert two == pytest.approx(one, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------ sentences


@pytest.mark.parametrize("name", ["fsdp", "fsdp_cpu_offload", "deepspeed_stage_2"])
def test_a_strategy_that_does_not_work_here_names_the_one_that_does(name):
    with pytest.raises(ValueError, match=f"^strategy '{name}' is not supported: .*; use fsdp2 to shard, or ddp$"):
        check_name(name)


@pytest.mark.parametrize("name", ["auto", "ddp", "fsdp2", None])
def test_strategies_that_work_pass(name):
    check_name(name)


def test_a_stock_strategy_that_would_let_the_ranks_drift_apart_is_refused(tiny_pipeline, experts, tmp_path):
    def refuse():
        trainer = tiny.trainer(tmp_path, teachers(experts), strategy=ModelParallelStrategy(), devices=2)
        with pytest.raises(ValueError, match="strategy ModelParallelStrategy is not supported; use ddp, fsdp2"):
            trainer.fit(tiny.policy(OPDStudent, tiny_pipeline), tiny.data(*TASKS))

    run_ranks(refuse)


def test_a_precision_that_would_round_the_adapter_is_refused(tiny_pipeline, experts, tmp_path):
    trainer = tiny.trainer(tmp_path, teachers(experts), precision="bf16-true")
    with pytest.raises(ValueError, match=r"precision 'bf16-true' would round the adapter .*; use bf16-mixed"):
        trainer.fit(tiny.policy(OPDStudent, tiny_pipeline), tiny.data(*TASKS))


def test_a_precision_that_would_cast_every_frozen_weight_in_every_forward_is_refused(tiny_pipeline, experts, tmp_path):
    policy = OPDStudent(tiny.backbone(tiny_pipeline, dtype="float16"))
    trainer = tiny.trainer(tmp_path, teachers(experts), precision="bf16-mixed")
    with pytest.raises(
        ValueError, match=r"^precision 'bf16-mixed' would cast .* from float16 .*trainer.precision 16-m"
    ):
        trainer.fit(policy, tiny.data(*TASKS))
    with pytest.raises(ValueError, match=r"^precision '16-mixed' would cast .* from bfloat16 in every forward; "):
        check_halves("16-mixed", torch.bfloat16)  # which lightning has on a GPU alone


@pytest.mark.parametrize(
    ("precision", "dtype"), [("16-mixed", "float16"), ("bf16-mixed", "bfloat16"), ("32-true", "bfloat16")]
)
def test_precisions_that_fit_the_frozen_weights_pass(precision, dtype):
    check_halves(precision, getattr(torch, dtype))
    check_halves(precision, torch.float32)
    check_halves(precision, None)


def test_a_loss_scale_over_shards_is_refused(tiny_pipeline, experts, tmp_path):
    def refuse():
        trainer = tiny.trainer(tmp_path, teachers(experts), precision="bf16-mixed", **FSDP2)
        trainer.strategy.precision_plugin.precision = "16-mixed"  # whose own plugin needs a GPU
        with pytest.raises(ValueError, match=r"^precision '16-mixed' does not work under strategy 'fsdp2'"):
            check_trainer(trainer)

    run_ranks(refuse)


def test_a_teacher_on_one_card_is_refused_to_several_ranks():
    check_places([("large", "cuda:1")], ranks=1)
    check_places([("large", "cpu"), ("small", None), ("other", "cuda")], ranks=2)
    with pytest.raises(
        ValueError, match=r"^teacher 'large' lives on cuda:1, where all 2 ranks of a machine would put it"
    ):
        check_places([("large", "cuda:1")], ranks=2)


def test_a_run_of_several_ranks_looks_where_its_teachers_live(tiny_pipeline, tmp_path):
    full = TeacherCallback(["red", "green"], FullTeacher(tiny.backbone(tiny_pipeline), device="cuda:1"), name="large")

    def refuse():
        trainer = tiny.trainer(tmp_path, [full], **DDP)
        with pytest.raises(ValueError, match=r"^teacher 'large' lives on cuda:1"):
            trainer.fit(tiny.policy(OPDStudent, tiny_pipeline), tiny.data(*TASKS))

    run_ranks(refuse)


def test_no_update_sends_frozen_buffers(fit, tmp_path):
    class Look(Callback):
        def on_train_end(self, trainer, pl_module):
            assert any(buffer.numel() for buffer in pl_module.buffers())
            assert not trainer.strategy.model.will_sync_module_buffers()

    alone = {"strategy": "ddp", "devices": 1}
    run_ranks(lambda: fit(tmp_path, alone, max_epochs=1, first=[Look()], limit_val_batches=0), count=1)


class Unsharded(LightningModule):
    """A module that knows nothing of sharding."""

    def configure_model(self):
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)


def test_a_module_that_shards_nothing_is_refused(tmp_path):
    def refuse():
        trainer: Trainer = tiny.trainer(tmp_path, **FSDP2)
        with pytest.raises(ValueError, match="Unsharded has nothing that strategy 'fsdp2' could shard; use ddp"):
            trainer.predict(Unsharded(), [])

    run_ranks(refuse)

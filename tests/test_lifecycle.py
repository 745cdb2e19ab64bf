"""The laws of a run among many: one folder, whole checkpoints, an orderly end, and its average is what is looked at."""

import errno
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from lightning import Callback
from lightning.fabric.plugins.io import torch_io
from lightning.pytorch.plugins.environments import SLURMEnvironment
from ranks import free_port, one_node, run_ranks, slurm_node, torchrun_node

from flowopd.cli.sentences import meant
from flowopd.teachers import LoRATeacher
from flowopd.training import EMA, ImageGrid, OPDStudent, PictureFolder, RewardCallback, TeacherCallback
from flowopd.training.callbacks.checkpoints import Checkpoints
from flowopd.training.callbacks.folder import RunFolder
from flowopd.training.ranks import threads
from flowopd.training.ranks.lifecycle import OrderlyEnd, WholeCheckpoints, check_launch, is_first, plugins
from flowopd.training.ranks.threads import CHOSEN, Threads

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def expert(tiny_pipeline, tmp_path_factory):
    return tiny.expert(tmp_path_factory.mktemp("expert"), tiny_pipeline)


@pytest.fixture
def opd(tiny_pipeline):
    return partial(tiny.policy, OPDStudent, tiny_pipeline, optimizer=partial(torch.optim.AdamW, lr=1e-2))


def teach(expert: str) -> TeacherCallback:
    return TeacherCallback(["red"], LoRATeacher(expert))


def flat(policy) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters() if parameter.requires_grad])


# --------------------------------------------------------------------------------------------------------- many ranks


def test_every_rank_works_in_the_folder_of_rank_zero(opd, tmp_path):
    def predict():
        folder = tmp_path / f"chosen by {os.environ['RANK']}"
        trainer = tiny.trainer(folder, [RunFolder(folder), PictureFolder()], strategy="ddp", devices=2)
        trainer.predict(opd(), datamodule=tiny.data(), return_predictions=False)
        assert trainer.default_root_dir == str(tmp_path / "chosen by 0")

    run_ranks(predict)
    assert [path.name for path in tmp_path.iterdir()] == ["chosen by 0"]
    assert {path.name for path in tmp_path.rglob("*.png")} == {"00000.png", "00001.png", "00002.png", "sheet.png"}


@pytest.mark.parametrize("launched", [one_node, torchrun_node, slurm_node])
def test_a_process_knows_from_its_launcher_whether_it_is_the_first(monkeypatch, launched):
    for rank in range(2):
        for name, value in launched(rank, 2, 0).items():
            monkeypatch.setenv(name, value)
        assert is_first() is (rank == 0)


def test_a_process_of_its_own_is_the_first():
    assert is_first()


@pytest.mark.parametrize("launched", [torchrun_node, slurm_node])
def test_processes_that_would_train_alone_are_refused(monkeypatch, tmp_path, launched):
    for name, value in launched(0, 2, 0).items():
        monkeypatch.setenv(name, value)
    check_launch(tiny.trainer(tmp_path, strategy="ddp", devices=1, num_nodes=2))
    with pytest.raises(ValueError, match=r" starts 2 processes, but the trainer has 1 ranks .*; set trainer.num_nodes"):
        check_launch(tiny.trainer(tmp_path, devices=1))


class Asks(Callback):
    """Sends the scheduler's signal to one rank in the second iteration."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and trainer.is_last_batch and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_signal_to_one_rank_ends_the_iteration_of_all_and_saves_it(opd, expert, tmp_path):
    def fit():
        before = signal.getsignal(signal.SIGUSR1)
        callbacks = [teach(expert), OrderlyEnd(), Asks(), Checkpoints(1)]
        ranks = {"strategy": "ddp", "devices": 2, "enable_checkpointing": True}
        trainer = tiny.trainer(tmp_path, callbacks, max_epochs=50, **ranks)
        trainer.fit(opd(), tiny.data())
        assert trainer.current_epoch == 2
        assert signal.getsignal(signal.SIGUSR1) == before

    run_ranks(fit)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["RolloutDataModule"]["iteration"] == 2


def test_under_slurm_nothing_is_saved_inside_of_a_signal(monkeypatch):
    for name, value in slurm_node(0, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    slurm = [plugin for plugin in plugins() if isinstance(plugin, SLURMEnvironment)]
    assert [plugin.auto_requeue for plugin in slurm] == [False]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "torchrun knows better")
    assert not any(isinstance(plugin, SLURMEnvironment) for plugin in plugins())


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(opd, expert, tmp_path, monkeypatch):
    write, written = torch_io._atomic_save, []

    def half(content, path):
        if written:
            Path(path).write_bytes(b"half of a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(write(content, path))

    monkeypatch.setattr(torch_io, "_atomic_save", half)
    options = {"max_epochs": 3, "enable_checkpointing": True, "plugins": [WholeCheckpoints()]}
    trainer = tiny.trainer(tmp_path, [teach(expert), Checkpoints(1)], **options)
    with pytest.raises(OSError, match=r"^checkpoint .*last.ckpt could not be written .*No space left") as failed:
        trainer.fit(opd(), tiny.data())
    assert meant(failed.value) is failed.value  # so the command line says this sentence alone
    assert [path.name for path in tmp_path.glob("checkpoints/*")] == ["last.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["RolloutDataModule"]["iteration"] == 1


# ---------------------------------------------------------------------------------------------------------- the threads


@pytest.mark.parametrize("chosen", [None, "2"])
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_small_network_runs_in_one_thread_unless_somebody_chose(opd, expert, tmp_path, monkeypatch, stage, chosen):
    """And the process has as many as before when the run is over."""
    for name in CHOSEN:
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    set_to: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    trainer = tiny.trainer(tmp_path, [teach(expert), RewardCallback("red", tiny.Brightness()), Threads()])
    getattr(trainer, stage)(opd(), datamodule=tiny.data())
    assert set_to == ([1, 7] if chosen is None else [])


def test_a_larger_network_keeps_its_threads(opd, expert, tmp_path, monkeypatch):
    for name in CHOSEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "SMALL", 1000)
    monkeypatch.setattr(torch, "set_num_threads", None)
    tiny.trainer(tmp_path, [teach(expert), Threads()]).fit(opd(), tiny.data())


# ---------------------------------------------------------------------------------------------------------- the average


@pytest.fixture
def trained(opd, expert, tmp_path):
    """A student whose parameters are its average, as the end of a fit leaves it; and its last checkpoint."""
    policy = opd()
    callbacks = [teach(expert), EMA(0.9), Checkpoints(1)]
    tiny.trainer(tmp_path, callbacks, enable_checkpointing=True).fit(policy, tiny.data())
    return policy, tmp_path / "checkpoints" / "last.ckpt"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("callbacks", [[], [EMA(0.9)]], ids=["without", "with"])
def test_the_average_of_a_checkpoint_is_scored(opd, trained, expert, tmp_path, stage, callbacks):
    """Whether or not the config that scores it keeps an average itself."""
    policy, path = trained
    fresh, reward = opd(), RewardCallback("brightness", tiny.Brightness())
    options = {"limit_val_batches": 1.0}
    trainer = tiny.trainer(tmp_path, [reward, *callbacks], **options)
    getattr(trainer, stage)(fresh, datamodule=tiny.data(), ckpt_path=path, verbose=False, weights_only=True)
    torch.testing.assert_close(flat(fresh), flat(policy), rtol=0, atol=0)
    raw = torch.load(path, weights_only=True)["state_dict"]
    assert not torch.equal(torch.cat([value.flatten() for value in raw.values()]), flat(policy))


class Looks(ImageGrid):
    """Keeps what is drawn with, in place of the pictures."""

    def __init__(self):
        super().__init__(every=1)
        self.seen: list[torch.Tensor] = []

    def on_fit_end(self, trainer, pl_module):
        pass

    def _save(self, trainer, models, step=0, name=""):
        self.seen.append(flat(trainer.lightning_module))


def test_pictures_along_the_way_show_the_average(opd, expert, tmp_path):
    policy, looks = opd(), Looks()
    tiny.trainer(tmp_path, [teach(expert), EMA(0.9), looks]).fit(policy, tiny.data())
    assert len(looks.seen) == 2
    torch.testing.assert_close(looks.seen[-1], flat(policy), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------- torchrun


@pytest.mark.slow
def test_torchrun_starts_sharded_ranks_that_share_a_folder(tmp_path):
    """As on several nodes: nobody hands the ranks a folder, and each would choose its own."""
    words = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=fsdp2", "--trainer.max_epochs=2"]
    words += ["--trainer.default_root_dir=run", "--trainer.precision=32-true", "--data.init_args.evaluation_count=4"]
    words += ["--data.init_args.prompts_per_iteration=4", "--data.init_args.batch_size=2"]
    sizes = {"num_steps": "2", "eval_steps": "2", "window": "[0,1]", "trained": "[0,1]"}
    words += [f"--model.init_args.sampler.init_args.{name}={size}" for name, size in sizes.items()]
    words += ["--trainer.limit_val_batches=0"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "flowopd"]
    command = [*launcher, "fit", "--config", str(CONFIGS / "tiles" / "opd.yaml"), *words]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("run folder: run\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    left = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*")}
    assert {"config.yaml", "metrics.csv", "results.md", "images/models.png", "checkpoints/last.ckpt"} <= left
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= left
    go_on = ["--ckpt_path=run/checkpoints/last.ckpt", "--trainer.max_epochs=3"]
    second = subprocess.run([*command, *go_on], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not list(tmp_path.glob("run/metrics-*.csv"))

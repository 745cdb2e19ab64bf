"""The laws of going on: what was changed takes effect or is refused by name, and a run has one folder and one log."""

import hashlib
import os
import re
import shutil
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from lightning import Callback
from safetensors.torch import load_file
from torch.optim import lr_scheduler

from flowopd.cli.folders import folder_of
from flowopd.cli.main import main
from flowopd.cli.resume import check_changes, settings
from flowopd.teachers import LoRATeacher
from flowopd.training import EMA, AdapterExport, OPDStudent, RewardCallback, TeacherCallback
from flowopd.training.callbacks.checkpoints import Checkpoints
from flowopd.training.callbacks.log import MetricsFile
from flowopd.training.ranks.folders import Claim

CONFIGS = Path(__file__).parent.parent / "configs"
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@pytest.fixture(scope="module")
def expert(tiny_pipeline, tmp_path_factory):
    return tiny.expert(tmp_path_factory.mktemp("expert"), tiny_pipeline)


class Rates(Callback):
    """Notes what the optimiser is set to in every update."""

    def __init__(self):
        self.seen: list[dict] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        group = optimizer.param_groups[0]
        self.seen.append({name: value for name, value in group.items() if name not in ("params", "initial_lr")})


@pytest.fixture
def fit(tiny_pipeline, expert, tmp_path):
    """Fit an OPD student of four updates per iteration; return what its optimiser was set to."""

    def run(max_epochs: int, *callbacks, goes_on=False, scheduler=None, optimizer=None, **options):
        torch.manual_seed(0)
        optimizer = optimizer or partial(torch.optim.AdamW, lr=1e-2)
        policy = tiny.policy(OPDStudent, tiny_pipeline, optimizer=optimizer, scheduler=scheduler)
        rates = Rates()
        signals = [TeacherCallback(["red"], LoRATeacher(expert)), RewardCallback("red", tiny.Brightness())]
        everything = [*signals, rates, Checkpoints(1), *callbacks]
        trainer = tiny.trainer(tmp_path, everything, max_epochs, enable_checkpointing=True, **options)
        last = tmp_path / "checkpoints" / "last.ckpt"
        trainer.fit(policy, tiny.data(group_size=1), ckpt_path=last if goes_on else None, weights_only=True)
        return policy, rates.seen

    return run


# ------------------------------------------------------------------------------------------------- optimiser, schedule


def cosine(updates: int):
    return partial(lr_scheduler.CosineAnnealingLR, T_max=updates)


def warm_up(updates: int):
    def make(optimizer):
        parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[updates])

    return make


SCHEDULES = {
    "cosine": (cosine(8), cosine(24)),
    "cosine to one cycle": (cosine(8), partial(lr_scheduler.OneCycleLR, max_lr=0.03, total_steps=40)),
    "steps": (partial(lr_scheduler.StepLR, step_size=3), partial(lr_scheduler.StepLR, step_size=5, gamma=0.5)),
    "a function": (cosine(8), partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step))),
    "in parts": (warm_up(3), warm_up(6)),
    "one that was not": (None, cosine(24)),
    "none that was": (cosine(8), None),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_changed_schedule_is_the_one_it_would_have_been_from_the_start(fit, name):
    before, after = SCHEDULES[name]
    _, straight = fit(4, scheduler=after)
    fit(2, scheduler=before)
    _, resumed = fit(4, scheduler=after, goes_on=True)
    assert resumed == straight[len(straight) // 2 :]


@pytest.mark.parametrize("change", [{"lr": 1e-5}, {"weight_decay": 0.3}, {"betas": (0.5, 0.6)}, {"eps": 1e-3}], ids=str)
def test_a_changed_setting_of_the_optimiser_takes_effect(fit, change):
    fit(2, scheduler=cosine(16))
    changed = partial(torch.optim.AdamW, **({"lr": 1e-2} | change))
    _, straight = fit(4, scheduler=cosine(16), optimizer=changed)
    fit(2, scheduler=cosine(16))
    _, resumed = fit(4, scheduler=cosine(16), optimizer=changed, goes_on=True)
    assert resumed == straight[len(straight) // 2 :]
    assert all(resumed[0][name] == value for name, value in change.items() if name != "lr")


def test_another_optimiser_is_refused_by_name(fit):
    fit(1)
    with pytest.raises(
        ValueError, match=r"^model.optimizer was AdamW, now SGD, which cannot read its state; give AdamW"
    ):
        fit(2, optimizer=partial(torch.optim.SGD, lr=1e-2), goes_on=True)


def test_a_schedule_that_does_not_reach_the_checkpoint_is_refused(fit):
    fit(2)
    with pytest.raises(ValueError, match=r"^model.scheduler does not reach update \d+, where the checkpoint stands"):
        fit(3, scheduler=partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=3), goes_on=True)


def test_fewer_iterations_than_are_done_are_refused(fit):
    fit(2)
    with pytest.raises(ValueError, match=r"^the checkpoint has done 2 iterations, but trainer.max_epochs is 1; give 2"):
        fit(1, goes_on=True)


# ---------------------------------------------------------------------------------------------------------- the average


def decay_of(ema: EMA) -> float:
    return ema._averaged().cur_decay_value


@pytest.mark.parametrize("every", [1, 8])
def test_the_average_warms_up_by_optimiser_steps(every, tiny_pipeline):
    """Whatever the rhythm, it reaches .9 at about update 80."""
    policy, ema = torch.nn.Linear(2, 2), EMA(0.9, every)
    policy.device = torch.device("cpu")
    trainer = type("Steps", (), {"global_step": 0})()
    ema.on_fit_start(trainer, policy)
    decays = {}
    for trainer.global_step in range(1, 105):
        for _ in range(2):  # micro-batches
            ema.on_train_batch_end(trainer, policy)
        decays[trainer.global_step] = decay_of(ema)
    assert decays[80] == pytest.approx(0.9, abs=2e-3)
    assert decays[72] < 0.895
    assert decays[104] == 0.9


def test_changed_settings_of_the_average_take_effect(fit):
    fit(2, EMA(0.9))
    ema = EMA(0.2)
    fit(4, ema, goes_on=True)
    assert decay_of(ema) == 0.2


def test_the_average_goes_on_with_the_steps_that_were_done(fit):
    straight, resumed = EMA(0.99, every=3), EMA(0.99, every=3)
    fit(4, straight)
    fit(2, EMA(0.99, every=3))
    fit(4, resumed, goes_on=True)
    assert straight.state_dict()["optimization_step"] == resumed.state_dict()["optimization_step"] > 0
    for here, there in zip(*(ema.state_dict()["shadow_params"] for ema in (straight, resumed)), strict=True):
        assert torch.equal(here, there)


# ---------------------------------------------------------------------------------------------------- what is written


class Order(Callback):
    """What was there when the scoring began."""

    def on_fit_end(self, trainer, pl_module):
        self.exported = Path(trainer.default_root_dir, "adapter", "adapter_model.safetensors").exists()


def test_the_adapter_is_exported_before_the_scoring(fit):
    order = Order()
    fit(1, order, AdapterExport())
    assert order.exported


def test_the_last_whole_iteration_is_saved_whatever_ends_the_run(fit, tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.current_epoch == 2:
                raise OSError("the disk of the prompts is gone")

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(signum) for signum in signals]
    with pytest.raises(OSError, match="gone"):
        fit(4, Fails())
    assert [signal.getsignal(signum) for signum in signals] == before
    fit(4, goes_on=True)
    resumed = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    fit(4)
    straight = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["state_dict"].keys() == straight["state_dict"].keys()
    assert all(torch.equal(value, straight["state_dict"][key]) for key, value in resumed["state_dict"].items())


def test_a_log_keeps_the_rows_before_the_checkpoint_and_drops_the_others(tmp_path):
    first = MetricsFile(tmp_path / "metrics.csv")
    for step in range(4):
        first.log_metrics({"loss": step / 3}, step)
        first.log_metrics({"val/red": 1.0 - step}, step)  # one row per step
        first.save()
    again = MetricsFile(tmp_path / "metrics.csv", steps=2)
    again.log_metrics({"loss": 2 / 3, "new": 1}, 2)
    again.finalize("success")
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "loss,new,step,val/red",
        "0.0,,0,1.0",
        f"{1 / 3},,1,0.0",
        f"{2 / 3},1,2,",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


# ------------------------------------------------------------------------------------------------------------- folders


def test_runs_that_start_at_the_same_instant_get_folders_of_their_own(tmp_path):
    claims, start = [], threading.Barrier(8)

    def run():
        start.wait()
        claims.append(Claim.fresh(tmp_path / "runs" / "run"))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {"run", *(f"run-{number}" for number in range(2, 9))}
    assert {claim.folder.name for claim in claims} == names == {path.name for path in (tmp_path / "runs").iterdir()}


def test_what_was_killed_before_its_first_checkpoint_is_taken_again(tmp_path):
    killed = Claim.fresh(tmp_path / "run")
    (killed.folder / "checkpoints").mkdir()
    assert Claim.fresh(tmp_path / "run").folder.name == "run-2"  # it may still live
    killed.release()
    again = Claim.fresh(tmp_path / "run")
    assert again.folder.name == "run"
    (again.folder / "checkpoints" / "last.ckpt").touch()
    again.release()
    assert Claim.fresh(tmp_path / "run").folder.name == "run-3"


def test_a_run_that_still_lives_is_not_gone_on_with(tmp_path):
    living = Claim.fresh(tmp_path / "run")
    with pytest.raises(ValueError, match=r"^another process works in run folder .*run; wait for its end, or stop it$"):
        Claim.of_run(tmp_path / "run")
    living.release()
    Claim.of_run(tmp_path / "run").release()


@pytest.mark.parametrize("where", ["", "run", "run/checkpoints", "elsewhere"])
def test_a_checkpoint_leads_to_its_folder_from_everywhere(tmp_path, monkeypatch, where):
    for folder in ("run/checkpoints", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    monkeypatch.chdir(tmp_path / where)
    assert folder_of(last) == tmp_path / "run"
    assert folder_of(Path(os.path.relpath(last))).resolve() == tmp_path / "run"


# ------------------------------------------------------------------------------------------------------------ settings


def test_settings_are_named_as_people_say_them():
    reward = {"class_path": "flowopd.RewardCallback", "init_args": {"name": "text", "weight": 0}}
    teacher = {"class_path": "flowopd.TeacherCallback", "init_args": {"tasks": ["text"]}}
    named = settings({"trainer": {"callbacks": [teacher, reward, teacher], "max_epochs": 3}, "ckpt_path": "last.ckpt"})
    assert named["trainer.callbacks.RewardCallback(text).weight"] == 0
    assert named["trainer.callbacks.TeacherCallback.tasks"] == named["trainer.callbacks.TeacherCallback#2.tasks"]
    assert named["trainer.max_epochs"] == 3
    assert "ckpt_path" not in named


def test_what_is_changed_is_said():
    before, now = (
        {"model.optimizer.lr": 0.1, "data.seed": 0, "a": 1},
        {"model.optimizer.lr": 0.2, "data.seed": 0, "a": 1},
    )
    assert check_changes(before, now) == "changed since the checkpoint, and takes effect: model.optimizer.lr 0.1 → 0.2"
    assert check_changes(before, before) == ""


SETTLED = {
    "seed_everything": (0, 1),
    "model.start": (None, "org/lora"),
    "model.start.weights": ([0.5, 0.5], [0.4, 0.6]),
    "model.lora.alpha": (8, 16),
    "model.backbone.path": ("org/a", "org/b"),
    "data.evaluation_count": (256, 8),
    "data.evaluation_prompts.text.split": ("test", "train"),
    "trainer.callbacks.EarlyStopping.patience": (3, 4),
    "trainer.callbacks.DriftMetrics.prompts_per_task": (8, 9),
}


@pytest.mark.parametrize("name", SETTLED)
def test_what_can_no_longer_be_changed_is_refused_by_name(name):
    before, now = SETTLED[name]
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} was .* when the checkpoint was made, now .*: give "):
        check_changes({name: before}, {name: now})


def test_what_only_moved_is_not_refused():
    moved = check_changes({"model.backbone.path": "/nowhere/any/more/base"}, {"model.backbone.path": "/here/base"})
    assert moved.endswith("model.backbone.path /nowhere/any/more/base → /here/base")
    assert check_changes({"model.backbone.dtype": "bfloat16"}, {"model.backbone.dtype": "float32"})


# ---------------------------------------------------------------------------------------------------- the command line


SMALL = {
    "trainer.accelerator": "cpu",
    "trainer.default_root_dir": "run",
    "trainer.max_epochs": "2",
    "trainer.check_val_every_n_epoch": "2",
    "updates_per_iteration": "1",
    "data.init_args.evaluation_count": "2",
    "data.init_args.prompts_per_iteration": "2",
    "data.init_args.batch_size": "2",
    "model.init_args.sampler.init_args.num_steps": "3",
    "model.init_args.sampler.init_args.eval_steps": "2",
    "model.init_args.sampler.init_args.window": "[0,2]",
    "model.init_args.sampler.init_args.trained": "[0,2]",
    "model.init_args.scheduler.init_args.T_max": "4",
}
MAIN_JOB = ["--config", str(CONFIGS / "tiles" / "opd.yaml")]
GO_ON = ["fit", "--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"]


def words(**changes: str) -> list[str]:
    return [word for key, value in (SMALL | changes).items() for word in (f"--{key}", value)]


def command(*given: str) -> None:
    before, sys.argv = sys.argv, ["flowopd", *given]
    try:
        main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of the main job."""
    home, before = tmp_path_factory.mktemp("finished"), Path.cwd()
    os.chdir(home)
    try:
        command("fit", *MAIN_JOB, *words())
    finally:
        os.chdir(before)
    return home / "run"


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "run")
    return Path("run")


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files, and when they were written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}" for path in files}


@pytest.fixture
def refused(capsys):
    """The one sentence that answers a command; it has touched nothing."""

    def sentence(*given: str) -> str:
        before = contents(Path())
        with pytest.raises(SystemExit) as stopped:
            command(*given)
        said = capsys.readouterr()
        assert stopped.value.code == 2
        assert "Traceback" not in said.err
        assert "takes effect" not in said.out
        assert contents(Path()) == before
        assert [path.name for path in Path().iterdir() if path.is_dir()] == ["run"]
        return said.err.strip().splitlines()[-1].removeprefix("flowopd: error: ")

    return sentence


def test_a_finished_run_that_goes_on_ends_the_same(run):
    kept = [path for path in run.rglob("*") if path.is_file() and path.suffix in (".csv", ".md", ".png", ".ckpt")]
    kept.remove(run / "report" / "report.md")  # tells that the run was begun twice, and how long that took
    before = {path: path.read_bytes() for path in kept}
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(run / "adapter")
    command(*GO_ON)
    assert {path: path.read_bytes() for path in kept} == before
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert again.keys() == adapter.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in adapter.items())
    assert [path.name for path in Path().iterdir()] == ["run"]


def test_more_iterations_take_the_schedule_along(run, capsys):
    command(*GO_ON, "--trainer.max_epochs", "3", "--model.init_args.scheduler.init_args.T_max", "8")
    said = capsys.readouterr().out
    assert (
        "changed since the checkpoint, and takes effect: model.scheduler.T_max 4 → 8, trainer.max_epochs 2 → 3" in said
    )
    rates = [line.split(",") for line in Path("run/metrics.csv").read_text().splitlines()]
    column = rates[0].index("lr-AdamW")
    fresh = torch.optim.SGD([torch.zeros(1)], 0.001)
    schedule = lr_scheduler.CosineAnnealingLR(fresh, 8)
    fresh.step()
    for _ in range(int(rates[-1][rates[0].index("step")]) // 1):
        schedule.step()
    assert float(rates[-1][column]) == fresh.param_groups[0]["lr"]


WRONG = {  # checkpoints that cannot be gone on with, and what is said
    "missing": ("nowhere.ckpt", r"^checkpoint 'nowhere.ckpt' does not exist$"),
    "a word of lightning": ("last", r"^checkpoint 'last' does not exist$"),
    "the adapter": (
        "run/adapter",
        r"^checkpoint 'run/adapter' is not one of lightning; expected <run>/checkpoints/last",
    ),
    "a table": ("run/results.csv", r"^checkpoint 'run/results.csv' is not one of lightning"),
    "weights": ("run/weights.ckpt", r"^checkpoint 'run/weights.ckpt' is not one of lightning"),
    "half": ("run/half.ckpt", r"^checkpoint 'run/half.ckpt' is not one of lightning"),
    "of another model": ("run/foreign.ckpt", r"^the checkpoint holds another adapter: .* has shape .* there, .* here$"),
}


@pytest.mark.parametrize(
    ("verb", "cases"),
    [
        ("fit", WRONG),
        ("test", WRONG),
        ("validate", ("missing", "the adapter")),
        ("predict", ("weights", "half")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_checkpoint_is_one_sentence_for_every_verb(run, refused, verb, cases):
    content = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    torch.save(content["state_dict"], "run/weights.ckpt")
    foreign = {f"{key.replace('attn', 'attention')}": value for key, value in content["state_dict"].items()}
    torch.save(content | {"state_dict": foreign}, "run/foreign.ckpt")
    Path("run/half.ckpt").write_bytes(Path("run/weights.ckpt").read_bytes()[:20_000])
    for path, expected in (WRONG[case] for case in cases):
        assert re.search(expected, refused(verb, *MAIN_JOB, *words(), "--ckpt_path", path))


REFUSED = {
    "fewer iterations": ({"trainer.max_epochs": "1"}, r"^the checkpoint has done 2 iterations, but trainer.max_epochs"),
    "another start": ({"model.init_args.start": "null"}, r"^model.start was .*Merge.*, now None; .*cannot change it"),
    "another seed": ({"seed_everything": "7"}, r"^seed_everything was 0 .*, now 7; .* \(it seeded the start\): give 0"),
    "another optimiser": (
        {"model.init_args.optimizer": "{class_path: torch.optim.SGD, init_args: {lr: 0.1}}"},
        r"^model.optimizer was AdamW, now SGD",
    ),
    "other held-out prompts": ({"data.init_args.evaluation_count": "3"}, r"^data.evaluation_count was 2 .*, now 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_change_touches_nothing(run, refused, case):
    changes, expected = REFUSED[case]
    assert re.search(expected, refused("fit", *MAIN_JOB, *words(**changes), "--ckpt_path", "run/checkpoints/last.ckpt"))


def test_a_run_goes_on_from_inside_of_its_checkpoints(run, monkeypatch):
    monkeypatch.chdir("run/checkpoints")
    more = ["--trainer.max_epochs", "3", "--trainer.limit_val_batches", "0"]
    command("fit", "--config", "../config.yaml", "--ckpt_path", "last.ckpt", *more)
    assert [path.name for path in Path().iterdir()] == ["last.ckpt"]
    assert [path.name for path in Path("../..").iterdir()] == ["run"]
    assert torch.load("last.ckpt", weights_only=True)["RolloutDataModule"]["iteration"] == 3


def test_a_metric_that_nobody_logs_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stop = "{class_path: EarlyStopping, init_args: {monitor: val/compositoin}}"
    with pytest.raises(SystemExit) as stopped:
        command("fit", *MAIN_JOB, *words(), f"--trainer.callbacks+={stop}")
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "Traceback" not in said
    assert re.search(r"flowopd: error: Early stopping conditioned on metric `val/compositoin` which is not avail", said)


def test_a_run_without_a_logger_leaves_no_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command("fit", *MAIN_JOB, *words(), "--trainer.logger", "false", "--trainer.limit_val_batches", "0")
    assert Path("run/checkpoints/last.ckpt").exists()
    assert not Path("run/metrics.csv").exists()
    assert not Path("run/tensorboard").exists()

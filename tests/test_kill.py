"""The law of interruption: whatever ends a run, and whenever, it goes on to the same end, to the bit, in one folder."""

import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

import flowopd.cli.run  # the children are forked after the imports
from flowopd.cli.main import main

CONFIG = Path(__file__).parent.parent / "configs" / "tiles" / "opd.yaml"
SMALL = {
    "trainer.accelerator": "cpu",
    "trainer.default_root_dir": "run",
    "trainer.max_epochs": "5",
    "trainer.check_val_every_n_epoch": "2",
    "updates_per_iteration": "2",
    "checkpoint_every": "2",
    "data.init_args.fused": "false",
    "data.init_args.evaluation_count": "2",
    "data.init_args.prompts_per_iteration": "4",
    "data.init_args.batch_size": "4",
    "model.init_args.sampler.init_args.num_steps": "3",
    "model.init_args.sampler.init_args.eval_steps": "2",
    "model.init_args.sampler.init_args.window": "[0,2]",
    "model.init_args.sampler.init_args.trained": "[0,2]",
}
FIT = ["fit", "--config", str(CONFIG), *(word for key, value in SMALL.items() for word in (f"--{key}", value))]
ENDS = {  # what a killed process may end with, unless it was done before
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {143},
    signal.SIGINT: {1},
}


def start(folder: Path, words: list[str]) -> int:
    """Run the command line in a forked process that has all imports behind it; return its process id."""
    listens, says = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        process = os.fork()
    if process:
        os.close(says)
        os.read(listens, 1)
        os.close(listens)
        return process
    code = 70
    try:
        os.chdir(folder)
        output = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False, buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["flowopd", *words]
        os.write(says, b".")
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def left(folder: Path) -> dict[str, object]:
    """What must be the same at the end."""
    texts = {name: (folder / "run" / name).read_bytes() for name in ("metrics.csv", "results.csv", "merge_report.csv")}
    tensors = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    return texts | {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


class Straight(NamedTuple):
    """A run that nobody interrupts: what it leaves, and how long it takes in all, and once it has a folder."""

    left: dict[str, object]
    seconds: float
    at_work: float


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Straight:
    assert flowopd.cli.run
    folder, began = tmp_path_factory.mktemp("straight"), time.monotonic()
    process = start(folder, FIT)
    wait_for(folder / "run")
    at_work = time.monotonic()
    assert end(process) == 0, (folder / "said.txt").read_text()
    return Straight(left(folder), time.monotonic() - began, time.monotonic() - at_work)


def wait_for(folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not folder.exists() and time.monotonic() < deadline:
        time.sleep(0.002)


def kill_and_go_on(folder: Path, how: signal.Signals, moment: float, at_work: bool) -> str:
    """Kill a run so many seconds after its start, or after it has made its folder, and go on.

    Returns:
        where the kill found it: before its first checkpoint, under way, or done.
    """
    process = start(folder, FIT)
    if at_work:
        wait_for(folder / "run")
    time.sleep(moment)
    os.kill(process, how)
    code = end(process)
    said, last = (folder / "said.txt").read_text(), folder / "run" / "checkpoints" / "last.ckpt"
    assert code in {0, *ENDS[how]}, said
    assert "Traceback" not in said
    go_on = FIT
    if last.exists():
        go_on = ["fit", "--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"]
        if how != signal.SIGKILL and code:
            assert re.search(rf"(interrupted|terminated); go on with: flowopd {' '.join(go_on)}\n", said)
    assert end(start(folder, go_on)) == 0, (folder / "said.txt").read_text()
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["run"]
    assert not list(folder.rglob("*.partial"))
    return "done" if code == 0 else "before a checkpoint" if go_on is FIT else "under way"


def test_a_run_that_is_stopped_goes_on_to_the_same_end(straight, tmp_path):
    kill_and_go_on(tmp_path, signal.SIGTERM, 0.3 * straight.at_work, at_work=True)
    assert left(tmp_path) == straight.left


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS)
def test_a_run_that_is_stopped_at_any_moment_goes_on_to_the_same_end(straight, tmp_path, how):
    draws, found = random.Random(int(how)), Counter[str]()
    for trial in range(20):
        folder = tmp_path / str(trial)
        folder.mkdir()
        at_work = trial % 4 > 0  # most of the time before is the parser's
        moment = draws.uniform(0, straight.at_work if at_work else straight.seconds)
        found[kill_and_go_on(folder, how, moment, at_work)] += 1
        assert left(folder) == straight.left, f"killed after {moment:.3f} s ({at_work=})"
    print(f"{how.name}: {dict(found)}; all went on to the same adapter, log and table")


def interrupted_imports(folder: Path, how: signal.Signals, moment: float) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child of a background shell would ignore it
    command = [sys.executable, "-m", "flowopd", *FIT]
    run = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    time.sleep(moment)
    run.send_signal(how)
    said, errors = run.communicate(timeout=60)
    assert run.returncode in (128 + how, 1 if how == signal.SIGINT else 143)
    assert "Traceback" not in errors + said
    assert not list(folder.iterdir())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_among_the_imports_is_no_traceback(tmp_path, how):
    interrupted_imports(tmp_path, how, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_anywhere_among_the_imports_is_no_traceback(tmp_path, how):
    for moment in range(10):
        interrupted_imports(tmp_path, how, 0.3 + 0.3 * moment)

"""A slip is one sentence: commands from a grammar of mistakes, and what each of them left behind."""

import hashlib
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grammar
import pytest
import yaml
from grammar import Case

from flowopd.cli.main import main

SEED = int(os.environ.get("FLOWOPD_FUZZ_SEED", "0"))
PATIENCE = 60  # seconds until a command counts as hung
LONGEST = 1000  # characters of a sentence
FOR_MACHINES = re.compile(
    r"0x[0-9a-f]{6}|<class '|\\n|Subtypes|NoneType|object_type|Namespace\(|typing\.|not iterable|unhashable|"
    r"has no attribute|not supported between|by zero|Parser key|codec can't"
)
COUNTS: Counter[str] = Counter()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a finished run of the recipe in ``finished/run``."""
    home = tmp_path_factory.mktemp("fuzz")
    (home / "finished").mkdir()
    with inside(home / "finished"):
        Path("recipe.yaml").write_text(yaml.safe_dump(grammar.recipe()))
        call(["fit", "--config", "recipe.yaml"])
    return home


@pytest.fixture(scope="module", autouse=True)
def told(request):
    """Say at the end how many commands ended in which way."""
    yield
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in COUNTS.most_common())
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{COUNTS.total()} slips: {outcomes}")


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder; leave the process as it was."""
    before, environment, argv = Path.cwd(), dict(os.environ), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


def call(words: list[str]) -> None:
    sys.argv = ["flowopd", *words]
    main()


class Hung(BaseException):
    """The command does not come to an end."""


def _ring(*_: object) -> None:
    raise Hung


def answer(words: list[str]) -> str:
    """How a command ends: ``done``, ``refused``, ``hung``, or an exception's name."""
    signal.signal(signal.SIGALRM, _ring)
    signal.alarm(PATIENCE)
    try:
        call(words)
    except SystemExit as stopped:
        return "refused" if stopped.code else "done"
    except Hung:
        return "hung"
    except BaseException as error:
        place = error.__traceback__
        while place.tb_next:
            place = place.tb_next
        where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
        return f"a traceback: {type(error).__name__} at {where}: {str(error)[:300]}"
    finally:
        signal.alarm(0)
    return "done"


def contents(folder: Path) -> dict[str, str]:
    """What lies in a folder: the hash of every file, the aim of every link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else "folder" if path.is_dir() else ""
        found[str(path.relative_to(folder))] = kind or hashlib.blake2b(path.read_bytes()).hexdigest()
    return found


def faults(case: Case, ending: str, said: str, errors: str, before: dict, after: dict) -> Iterator[str]:
    """What is wrong with the answer to a slip."""
    if ending not in ("done", "refused"):
        yield ending
        return
    if case.answer not in (ending, "either"):
        yield f"was {ending}"
    if "Traceback" in said + errors:
        yield "printed a traceback"
    goes_on = "--ckpt_path" in case.words and case.words[0] == "fit" and ending == "done"
    if lost := [name for name, content in before.items() if after.get(name) != content and not goes_on]:
        yield f"changed {lost}"
    if ending == "refused":
        yield from sentence_faults(case, said, errors)
        if new := sorted(after.keys() - before.keys()):
            yield f"left {new}"


def sentence_faults(case: Case, said: str, errors: str) -> Iterator[str]:
    lines = list(dict.fromkeys(errors.splitlines()))  # ranks say the same
    if case.words[0] == "check":
        lines = [line.replace("FAIL    ", "flowopd: error: ") for line in (said + errors).splitlines()]
    sentences = [line for line in lines if line.startswith("flowopd: error: ")]
    if len(sentences) != 1 or lines[-1] != sentences[0]:
        yield f"{len(sentences)} sentences: {errors[-1500:]}"
        return
    sentence = sentences[0].removeprefix("flowopd: error: ")
    if len(sentence) > LONGEST:
        yield f"a sentence of {len(sentence)} characters: {sentence[:300]}"
    if len(sentence) < 10:
        yield f"a sentence that says nothing: {sentence}"
    if ugly := FOR_MACHINES.search(sentence):
        yield f"a sentence for machines ({ugly[0]}): {sentence[:400]}"


def judged(case: Case, place: Path, capfd, give: Callable[[list[str]], str] = answer) -> list[str]:
    """What is wrong with the answer to a slip, given in a workplace of its own."""
    place.mkdir()
    if case.recipe is not None:
        (place / "recipe.yaml").write_text(yaml.safe_dump(case.recipe, sort_keys=False))
    if case.make is not None:
        case.make(place)
    before = contents(place)
    capfd.readouterr()
    with inside(place):
        ending = give(list(case.words))
    said, errors = capfd.readouterr()
    COUNTS[ending if ending in ("done", "refused", "hung") else "a traceback"] += 1
    found = list(faults(case, ending, said, errors, before, contents(place)))
    return [f"{case.kind}: {case.slip}: {fault}" for fault in found]


def in_a_process_of_its_own(words: list[str]) -> str:
    ended = subprocess.run([sys.executable, "-m", "flowopd", *words], timeout=4 * PATIENCE, check=False)
    return "refused" if ended.returncode else "done"


@pytest.mark.filterwarnings("ignore")
def test_a_slip_is_one_sentence_or_does_what_it_says(home, capfd):
    cases = [case for kind in grammar.KINDS for case in grammar.slips(kind, SEED, 1)]
    found = [fault for number, case in enumerate(cases) for fault in judged(case, home / f"quick-{number}", capfd)]
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", grammar.KINDS)
def test_every_kind_of_slip_is_one_sentence_or_does_what_it_says(kind, home, capfd):
    cases = grammar.slips(kind, SEED)
    found = [fault for number, case in enumerate(cases) for fault in judged(case, home / f"{kind}-{number}", capfd)]
    with capfd.disabled():
        print(f"\n{kind}: {len(cases)} slips, {len(found)} faults")
    assert not found, "\n".join(found)


TWO_RANKS = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.init_args.batch_size", "1")
ALONE = [
    Case("alone", "nonsense", ("fitt",)),
    Case("alone", "number", **grammar.fit(grammar.changed(grammar.recipe(), ("data", "init_args", "batch_size"), 0))),
    Case("alone", "two ranks", **grammar.fit(grammar.recipe(), *TWO_RANKS, "--model.init_args.start", "./nowhere")),
    Case("alone", "right", **grammar.fit(grammar.recipe(), *TWO_RANKS), answer="done"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.slip)
def test_a_slip_is_one_sentence_in_a_process_of_its_own(case, home, capfd):
    assert not judged(case, home / f"alone-{case.slip}", capfd, in_a_process_of_its_own)

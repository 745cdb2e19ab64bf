"""A grammar of slips: commands, configs, adapters, prompt files and checkpoints that somebody will give by mistake.

Each kind is a function that yields cases; ``slips`` draws from all of them by a seed. A case says what its answer must
be: ``refused`` (one sentence), ``done``, or ``either`` where a slip may also mean something.
"""

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from flowopd.tiles import asset

CONFIGS = Path(__file__).parent.parent / "configs" / "tiles"
Tree = dict[str, Any]
Make = Callable[[Path], None]  # puts something into the folder of a case


@dataclass(frozen=True)
class Case:
    """One command, what lies around it, and what its answer must be."""

    kind: str
    slip: str
    words: tuple[str, ...]
    answer: str = "refused"
    recipe: Tree | None = field(default=None, repr=False)  # written to recipe.yaml
    make: Make | None = field(default=None, repr=False)


# -------------------------------------------------------------------------------------------------------------- recipes


def recipe(name: str = "opd") -> Tree:
    """A recipe of the tiles world, cut down to one iteration of two prompts, without pictures and tables."""
    tree: Tree = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    model, data, trainer = tree["model"]["init_args"], tree["data"]["init_args"], tree["trainer"]
    data |= {"prompts_per_iteration": 2, "batch_size": 2, "evaluation_count": 2, "group_size": 1}
    trainer |= {"default_root_dir": "run", "max_epochs": 1, "check_val_every_n_epoch": 1, "accelerator": "cpu"}
    trainer["callbacks"] = [
        callback
        for callback in trainer["callbacks"]
        if callback["class_path"] not in ("flowopd.ImageGrid", "flowopd.ResultsTable")
    ]
    model["sampler"]["init_args"] |= {"num_steps": 3, "eval_steps": 2}
    if "window" in model["sampler"]["init_args"]:
        model["sampler"]["init_args"]["window"] = [0, 2]
    if "accumulate_grad_batches" in trainer:
        trainer["accumulate_grad_batches"] = 2
    if "updates_per_iteration" in tree:
        tree["updates_per_iteration"] = 1
    if name.startswith("teacher") or name == "grpo_mix":
        data |= {"group_size": 2, "batch_size": 4}
    return tree


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of everything in a recipe."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def changed(tree: Tree, path: tuple, value: Any) -> Tree:
    """A copy with another value there."""
    tree = copy.deepcopy(tree)
    at(tree, path[:-1])[path[-1]] = value
    return tree


def renamed(tree: Tree, path: tuple, name: str) -> Tree:
    """A copy with another key there, in its old place."""
    tree = copy.deepcopy(tree)
    home = at(tree, path[:-1])
    entries = [(name if key == path[-1] else key, value) for key, value in home.items()]
    home.clear()
    home.update(entries)
    return tree


def dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def misspelt(word: str, dice: random.Random) -> str:
    """A near miss: a letter too few, too many, or two in each other's place."""
    place = dice.randrange(max(len(word) - 1, 1))
    slips = (
        word[:place] + word[place + 1 :],
        word[:place] + word[place : place + 1] + word[place:],
        word[:place] + word[place + 1 : place + 2] + word[place : place + 1] + word[place + 2 :],
    )
    found = dice.choice(slips)
    return found if found not in (word, "") else word + "z"


def fit(tree: Tree, *words: str, verb: str = "fit") -> dict[str, Any]:
    return {"words": (verb, "--config", "recipe.yaml", *words), "recipe": tree}


# ---------------------------------------------------------------------------------------------------------------- words

FREE = {"prompts", "evaluation_prompts", "ratio"}  # their keys are the user's own names


def words(dice: random.Random) -> Iterator[Case]:
    """Keys, classes and options misspelt, at every depth."""
    for name in ("opd", "teacher_text", "cold_start_sft"):
        tree = recipe(name)
        for path in places(tree):
            key, value = path[-1], at(tree, path)
            if isinstance(key, str) and path[-2:-1] not in [(free,) for free in FREE]:
                slip = misspelt(key, dice)
                # the settings of a subclass whose class is not named are nobody's
                yield Case("words", f"{dotted(path)} → {slip}", **fit(renamed(tree, path, slip)))
            if key == "class_path":
                home, _, last = value.rpartition(".")
                slip = f"{home}.{misspelt(last, dice)}"
                yield Case("words", f"{value} → {slip}", **fit(changed(tree, path, slip)))
                slip = f"{misspelt(home, dice)}.{last}"
                yield Case("words", f"{value} → {slip}", **fit(changed(tree, path, slip)))
                yield Case("words", f"{value} → {last}", **fit(changed(tree, path, last)), answer="either")
                for other in ("flowopd.Prompt", "flowopd.core.guided", "builtins.int", "torch.nn.Linear", "os", ""):
                    yield Case("words", f"{value} → {other}", **fit(changed(tree, path, other)))
    for option in ("model.init_args.lora.rank", "data.batch_size", "trainer.max_epochs", "ckpt_path", "config"):
        yield Case("words", option, **fit(recipe(), f"--{misspelt(option, dice)}", "2"))
    for given in (
        ["--trainer.max_epochs"],
        ["stray"],
        ["--", "x"],
        ["-x"],
        ["--model"],
        ["--print_confg"],
        ["--data="],
    ):
        yield Case("words", " ".join(given), **fit(recipe(), *given))


# -------------------------------------------------------------------------------------------------------------- numbers

NUMBERS = (-1, 0, 1.5, 1e99, 10**20, float("nan"), float("inf"), float("-inf"), True, "two", "", [1], {}, None)
NEVER = (float("nan"), "two", [1], {})  # for a number
WRONG = {"a number": 7, "text": "seven", "a list": [7], "a table": {"seven": 7}, "nothing": None, "yes": True}


def numbers(dice: random.Random) -> Iterator[Case]:
    """Every number of a recipe, outside its range or no number at all."""
    for name in ("opd", "teacher_text", "cold_start_sft"):
        tree = recipe(name)
        for path in places(tree):
            value = at(tree, path)
            if isinstance(value, int | float) and not isinstance(value, bool):
                endless = {-1} if path[-1] == "max_epochs" else {}
                for number in (
                    number for number in NUMBERS if isinstance(number, list | dict) or number not in endless
                ):
                    answer = "refused" if any(number is never for never in NEVER) else "either"
                    yield Case(
                        "numbers", f"{dotted(path)} = {number!r}", **fit(changed(tree, path, number)), answer=answer
                    )


def types(dice: random.Random) -> Iterator[Case]:
    """Something of another type in every place of a recipe."""
    for name in ("opd", "cold_start_merge"):
        tree = recipe(name)
        for path in places(tree):
            for what, value in WRONG.items():
                if type(value) is not type(at(tree, path)):
                    yield Case("types", f"{dotted(path)} = {what}", **fit(changed(tree, path, value)), answer="either")


# ---------------------------------------------------------------------------------------------------------------- files


def written(name: str, content: bytes) -> Make:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return make


def is_folder(name: str) -> Make:
    return lambda folder: (folder / name).mkdir()


def is_broken_link(name: str) -> Make:
    return lambda folder: (folder / name).symlink_to("nowhere")


def is_nothing(folder: Path) -> None:
    """Nothing is there."""


FULL = yaml.safe_dump(recipe())
YAML: dict[str, Make] = {
    "missing": is_nothing,
    "empty": written("a.yaml", b""),
    "blank": written("a.yaml", b"\n\n  \n"),
    "folder": is_folder("a.yaml"),
    "broken link": is_broken_link("a.yaml"),
    "binary": written("a.yaml", bytes(range(256)) * 8),
    "nulls": written("a.yaml", b"\0" * 64),
    "latin-1": written("a.yaml", "trainer: {default_root_dir: caf\u00e9}".encode("latin-1")),
    "utf-16": written("a.yaml", FULL.encode("utf-16")),
    "list": written("a.yaml", b"- 1\n- 2\n"),
    "text": written("a.yaml", b"just words\n"),
    "number": written("a.yaml", b"7\n"),
    "json": written("a.yaml", json.dumps(recipe()).encode()[:-9]),
    "tab": written("a.yaml", b"trainer:\n\tmax_epochs: 3\n"),
    "colon": written("a.yaml", b"trainer: max_epochs: 3\n"),
    "open bracket": written("a.yaml", b"trainer: {max_epochs: 3\n"),
    "open quote": written("a.yaml", b'trainer: {default_root_dir: "x}\n'),
    "indent": written("a.yaml", b"trainer:\n  max_epochs: 3\n max_steps: 4\n"),
    "twice": written("a.yaml", (FULL + "trainer: {max_epochs: 3}\n").encode()),
    "anchor": written("a.yaml", b"trainer: *nowhere\n"),
    "python tag": written("a.yaml", b"trainer: !!python/object/apply:os.getcwd []\n"),
    "two documents": written("a.yaml", b"trainer: {max_epochs: 3}\n---\nmodel: x\n"),
    "itself": written("a.yaml", b"config: a.yaml\n"),
    "interpolation to nothing": written("a.yaml", b"trainer: {max_epochs: '${nowhere}'}\n"),
    "interpolation of nothing": written("a.yaml", b"trainer: {max_epochs: '${}'}\n"),
    "open interpolation": written("a.yaml", b"trainer: {max_epochs: '${trainer.'}\n"),
    "interpolation to itself": written("a.yaml", b"trainer: {max_epochs: '${trainer.max_epochs}'}\n"),
    "interpolation to a table": written("a.yaml", b"trainer: {max_epochs: '${trainer}'}\n"),
    "no model": written("a.yaml", b"trainer: {max_epochs: 1}\n"),
    "model alone": written("a.yaml", b"model: flowopd.OPDStudent\n"),
    "other key": written("a.yaml", b"fit: {trainer: {max_epochs: 1}}\n"),
    "deep": written("a.yaml", b"model: " + b"[" * 400 + b"]" * 400),
}


def files(dice: random.Random) -> Iterator[Case]:
    """Config files that are none."""
    for slip, make in YAML.items():
        for verb in ("fit", "test", "plan", "check"):
            yield Case("files", f"{verb}: {slip}", (verb, "--config", "a.yaml"), make=make)
        # after a whole one
        answer = "refused" if slip not in ("empty", "blank", "no model") else "either"
        yield Case("files", f"overlay: {slip}", **fit(recipe(), "--config", "a.yaml"), make=make, answer=answer)


# ------------------------------------------------------------------------------------------------------------- adapters


def adapter(folder: Path, **options: Any) -> Path:
    return Path(tiny.expert(folder / "adapter", str(asset("base")), **options))


def tensors_changed(change: Callable[[dict], dict]) -> Make:
    def make(folder: Path) -> None:
        file = adapter(folder) / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return make


def config_changed(**settings: Any) -> Make:
    def make(folder: Path) -> None:
        file = adapter(folder) / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return make


def file_changed(name: str, content: Callable[[bytes], bytes]) -> Make:
    def make(folder: Path) -> None:
        file = adapter(folder) / name
        file.write_bytes(content(file.read_bytes()))

    return make


def without(name: str) -> Make:
    return lambda folder: (adapter(folder) / name).unlink()


def poisoned(value: float) -> Callable[[dict], dict]:
    def change(tensors: dict) -> dict:
        first = next(iter(tensors))
        return tensors | {first: torch.full_like(tensors[first], value)}

    return change


def full_model(folder: Path) -> None:
    shutil.copytree(asset("base"), folder / "adapter")


WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
ADAPTERS: dict[str, Make] = {
    "missing": is_nothing,
    "empty folder": is_folder("adapter"),
    "a file": written("adapter", b"not a folder"),
    "broken link": is_broken_link("adapter"),
    "config alone": without(WEIGHTS),
    "tensors alone": without(SETTINGS),
    "truncated": file_changed(WEIGHTS, lambda data: data[: len(data) // 2]),
    "head alone": file_changed(WEIGHTS, lambda data: data[:64]),
    "empty file": file_changed(WEIGHTS, lambda data: b""),
    "text": file_changed(WEIGHTS, lambda data: b"<html>not found</html>"),
    "pointer": file_changed(
        WEIGHTS, lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    ),
    "no tensors": tensors_changed(lambda tensors: {}),
    "NaN": tensors_changed(poisoned(float("nan"))),
    "infinity": tensors_changed(poisoned(float("inf"))),
    "no B": tensors_changed(lambda tensors: {k: v for k, v in tensors.items() if "lora_A" in k}),
    "one factor lacks": tensors_changed(lambda tensors: dict(list(tensors.items())[1:])),
    "one too many": tensors_changed(lambda tensors: tensors | {"base_model.model.x.lora_A.weight": torch.ones(4, 4)}),
    "cut": tensors_changed(lambda tensors: {k: v[:1].contiguous() for k, v in tensors.items()}),
    "integers": tensors_changed(lambda tensors: {k: v.long() for k, v in tensors.items()}),
    "other layout": tensors_changed(
        lambda tensors: {k.replace("base_model.model.", "lora."): v for k, v in tensors.items()}
    ),
    "config empty": file_changed(SETTINGS, lambda data: b""),
    "config a list": file_changed(SETTINGS, lambda data: b"[]"),
    "config broken": file_changed(SETTINGS, lambda data: data[:-9]),
    "config bare": file_changed(SETTINGS, lambda data: b"{}"),
    "config binary": file_changed(SETTINGS, lambda data: bytes(range(256))),
    "rank 0": config_changed(r=0),
    "rank -1": config_changed(r=-1),
    "rank text": config_changed(r="four"),
    "rank null": config_changed(r=None),
    "other rank": config_changed(r=16),
    "alpha null": config_changed(lora_alpha=None),
    "alpha NaN": config_changed(lora_alpha=float("nan")),
    "alpha text": config_changed(lora_alpha="eight"),
    "no targets": config_changed(target_modules=[]),
    "targets null": config_changed(target_modules=None),
    "other targets": config_changed(target_modules=["nothing_of_that_name"]),
    "peft type": config_changed(peft_type="IA3"),
    "peft nonsense": config_changed(peft_type="LORE"),
    "peft null": config_changed(peft_type=None),
    "a key of later": config_changed(invented_in_the_future=1),
    "base full": full_model,
    "DoRA": lambda folder: adapter(folder, use_dora=True) and None,
    "bias": lambda folder: adapter(folder, bias="lora_only") and None,
    "all zero": lambda folder: adapter(folder, std=0.0) and None,
}
EITHER_ADAPTERS = {
    "alpha null",
    "a key of later",
    "no targets",
    "targets null",
    "other targets",
    "other layout",
    "all zero",
    "other rank",
    "config bare",
    "bias",
    "DoRA",
    "integers",
}
GIVEN_AS = {
    "start": ("model", "init_args", "start"),
    "teacher": ("trainer", "callbacks", 5, "init_args", "teacher", "init_args", "path"),
    "anchor": ("trainer", "callbacks", 7, "init_args", "teacher", "init_args", "path"),
    "member": ("model", "init_args", "start", "init_args", "adapters", 0),
}


def adapters(dice: random.Random) -> Iterator[Case]:
    """Folders that are no LoRA of this base, wherever an adapter may be given."""
    tree = recipe()
    for slip, make in ADAPTERS.items():
        answer = "either" if slip in EITHER_ADAPTERS else "refused"
        for role, path in GIVEN_AS.items():
            yield Case("adapters", f"{role}: {slip}", **fit(changed(tree, path, "./adapter")), make=make, answer=answer)
    for merge in MERGES:
        given = changed(tree, ("model", "init_args", "start", "init_args"), merge)
        yield Case("adapters", f"merge of {merge}", **fit(given))


SHIPPED = ["${tiles:teacher_composition}", "${tiles:teacher_text}"]
MERGES: list[Tree] = [
    {"adapters": []},
    {"adapters": "${tiles:teacher_text}"},
    {"adapters": SHIPPED, "weights": [1.0]},
    {"adapters": SHIPPED, "weights": [1.0, float("nan")]},
    {"adapters": SHIPPED, "weights": [1.0, float("inf")]},
    {"adapters": SHIPPED, "weights": [0.0, 0.0]},
    {"adapters": SHIPPED, "method": "tees"},
    {"adapters": SHIPPED, "method": "ties", "density": 0.0},
    {"adapters": SHIPPED, "method": "ties", "density": 1.5},
    {"adapters": SHIPPED, "method": "dare_linear", "density": -0.5},
    {"adapters": SHIPPED, "rank": 0},
    {"adapters": SHIPPED, "rank": -3},
    {"adapters": SHIPPED, "seed": -1, "method": "dare_linear"},
]


# -------------------------------------------------------------------------------------------------------- prompt files

RIGHT = b"two red circle and three blue square\n"
PROMPTS: dict[str, tuple[str, Make]] = {
    "missing": ("p.txt", is_nothing),
    "folder": ("p.txt", is_folder("p.txt")),
    "broken link": ("p.txt", is_broken_link("p.txt")),
    "empty": ("p.txt", written("p.txt", b"")),
    "blank": ("p.txt", written("p.txt", b"\n \n\t\n")),
    "latin-1": ("p.txt", written("p.txt", RIGHT + "un caf\u00e9\n".encode("latin-1"))),
    "utf-16": ("p.txt", written("p.txt", RIGHT.decode().encode("utf-16"))),
    "nulls": ("p.txt", written("p.txt", b"\0" * 99)),
    "binary": ("p.txt", written("p.txt", bytes(range(256)))),
    "unknown word": ("p.txt", written("p.txt", RIGHT + b"two pink circle and three blue square\n")),
    "json": ("p.json", written("p.json", b'[{"prompt": "two red circle and three blue square"}]')),
    "csv": ("p.csv", written("p.csv", b"prompt\n" + RIGHT)),
    "null prompt": ("p.jsonl", written("p.jsonl", b'{"prompt": null}\n')),
    "no prompt": ("p.jsonl", written("p.jsonl", b'{"text_of": "x"}\n')),
    "number": ("p.jsonl", written("p.jsonl", b'{"prompt": 7}\n')),
    "list": ("p.jsonl", written("p.jsonl", b'["a"]\n')),
    "plain text": ("p.jsonl", written("p.jsonl", RIGHT)),
    "cut": ("p.jsonl", written("p.jsonl", b'{"prompt": "two red\n')),
    "empty prompt": ("p.jsonl", written("p.jsonl", b'{"prompt": ""}\n')),
    "huge line": ("p.txt", written("p.txt", b"word " * 100_000)),
}


def prompt_files(dice: random.Random) -> Iterator[Case]:
    """Prompt files that hold no prompts."""
    for slip, (path, make) in PROMPTS.items():
        for parse in (None, "flowopd.tiles.parse"):
            source = {"path": path, "task": "composition"} | ({"parse": parse} if parse else {})
            tree = changed(
                recipe(),
                ("data", "init_args", "prompts", "composition"),
                {"class_path": "flowopd.PromptFile", "init_args": source},
            )
            answer = "either" if slip in ("huge line", "unknown word") and not parse else "refused"
            yield Case("prompt files", f"{slip}, parse {parse}", **fit(tree), make=make, answer=answer)
    for parse in (
        "flowopd.tiles.prase",
        "os",
        "os.nothing",
        "nowhere.parse",
        "flowopd.tiles.BASE",
        7,
        "builtins.len",
        "",
    ):
        source = {"path": "p.txt", "task": "composition", "parse": parse}
        tree = changed(
            recipe(),
            ("data", "init_args", "prompts", "composition"),
            {"class_path": "flowopd.PromptFile", "init_args": source},
        )
        yield Case("prompt files", f"parse {parse!r}", **fit(tree), make=written("p.txt", RIGHT))


# ---------------------------------------------------------------------------------------------------------- checkpoints


def ckpt(change: Callable[[Tree], Any]) -> Callable[[Path, Path], None]:
    """Another checkpoint than the good one."""

    def make(good: Path, path: Path) -> None:
        torch.save(change(torch.load(good, weights_only=False)), path)

    return make


def ckpt_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    return lambda good, path: path.write_bytes(change(good.read_bytes())) and None


def lacks(key: str) -> Callable[[Path, Path], None]:
    return ckpt(lambda content: {k: v for k, v in content.items() if k != key})


def first_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path, Path], None]:
    def edit(content: Tree) -> Tree:
        key = next(iter(content["state_dict"]))
        return content | {"state_dict": content["state_dict"] | {key: change(content["state_dict"][key])}}

    return ckpt(edit)


CHECKPOINTS: dict[str, Callable[[Path, Path], None]] = {
    "missing": lambda good, path: None,
    "text": ckpt_bytes(lambda data: b"not one"),
    "empty": lambda good, path: path.touch(),
    "truncated": ckpt_bytes(lambda data: data[: len(data) // 2]),
    "half eaten": ckpt_bytes(lambda data: data[len(data) // 2 :]),
    "garbled": ckpt_bytes(lambda data: data[:2000] + b"\0" * 4000 + data[6000:]),
    "folder": lambda good, path: path.mkdir(),
    "adapter folder": lambda good, path: shutil.copytree(good.parent.parent / "adapter", path) and None,
    "broken link": lambda good, path: path.symlink_to("nowhere"),
    "adapter file": lambda good, path: shutil.copy(good.parent.parent / "adapter" / WEIGHTS, path) and None,
    "config": lambda good, path: shutil.copy(good.parent.parent / "config.yaml", path) and None,
    "nothing inside": ckpt(lambda content: {}),
    "a list": ckpt(lambda content: [1, 2]),
    "a tensor": ckpt(lambda content: torch.ones(3)),
    "a state dict": ckpt(lambda content: content["state_dict"]),
    "no state": lacks("state_dict"),
    "no loops": lacks("loops"),
    "no optimiser": lacks("optimizer_states"),
    "no callbacks": lacks("callbacks"),
    "no data": lacks("RolloutDataModule"),
    "no version": lacks("pytorch-lightning_version"),
    "of the future": ckpt(lambda content: content | {"pytorch-lightning_version": "99.0.0"}),
    "of no version": ckpt(lambda content: content | {"pytorch-lightning_version": "x"}),
    "other shape": first_tensor(lambda tensor: tensor[:1]),
    "NaN": first_tensor(lambda tensor: tensor * float("nan")),
    "empty state": ckpt(lambda content: content | {"state_dict": {}}),
    "state text": ckpt(lambda content: content | {"state_dict": "x"}),
    "an object": ckpt(lambda content: content | {"hyper_parameters": Path("x")}),
    "last": lambda good, path: None,
}
GOES_ON = {"no callbacks", "no data", "of the future", "no version"}  # perhaps


def checkpoints(dice: random.Random) -> Iterator[Case]:
    """Checkpoints that are none, or of something else, for every verb that reads one."""
    for slip, make in CHECKPOINTS.items():
        for verb in ("fit", "test", "validate", "predict"):
            for name in ("x.ckpt", "run/checkpoints/x.ckpt"):
                answer = "either" if slip in GOES_ON or verb != "fit" else "refused"
                if slip in ("missing", "text", "empty", "truncated", "folder", "broken link", "other shape", "a list"):
                    answer = "refused"
                given = name if slip != "last" else dice.choice(("last", "best", "hpc", "http://127.0.0.1:9/x.ckpt"))
                yield Case(
                    "checkpoints",
                    f"{verb} {given}: {slip}",
                    **fit(recipe(), "--trainer.max_epochs", "2", "--ckpt_path", given, verb=verb),
                    make=beside_a_run(make, name),
                    answer=answer,
                )
    for name in ("teacher_text", "cold_start_sft", "cold_start_merge"):
        for verb in ("fit", "test"):
            words = ("--trainer.max_epochs", "2", "--ckpt_path", "run/checkpoints/last.ckpt")
            made = beside_a_run(lambda good, path: None, "x")
            yield Case("checkpoints", f"{verb}: of opd in {name}", **fit(recipe(name), *words, verb=verb), make=made)


def beside_a_run(make: Callable[[Path, Path], None], name: str) -> Make:
    """A finished run in ``run``, and the checkpoint."""

    def prepare(folder: Path) -> None:
        shutil.copytree(folder.parent / "finished" / "run", folder / "run", symlinks=True)
        make(folder / "run" / "checkpoints" / "last.ckpt", folder / name)

    return prepare


# -------------------------------------------------------------------------------------------------------------- trainer

TRAINER: dict[str, list[str]] = {
    "accelerator": ["cpuu", "gpu", "tpu", "mps", "7", "null", "[]"],
    "strategy": [
        "nonsense",
        "fsdp_native",
        "deepspeed",
        "dp",
        "ddp2",
        "7",
        "{}",
        "lightning.pytorch.strategies.XLAStrategy",
    ],
    "devices": ["0", "-5", "two", "[0,3]", "[]", "'0,3'", "1.5", "null", "{}"],
    "num_nodes": ["0", "-1", "two", "1.5"],
    "precision": ["17", "half", "bf16-true", "16-true", "64-true", "16-mixed", "fp8", "null", "[]"],
    "logger": ["false", "true", "[]", "nonsense", "{}", "7", "{class_path: flowopd.EMA}"],
    "callbacks": [
        "null",
        "[]",
        "{}",
        "7",
        "nonsense",
        "[7]",
        "[flowopd.EMA]",
        "{class_path: flowopd.EMA}",
        "[torch.nn.Linear]",
    ],
    "fast_dev_run": ["true", "-1", "1", "two"],
    "max_epochs": ["-2", "0", "1.5", "two", "nan", "1e99", "null"],
    "min_epochs": ["-2", "5", "two"],
    "max_steps": ["-5", "0", "1", "1.5", "two"],
    "min_steps": ["-5", "two"],
    "max_time": ["nonsense", "00:00", "00:00:00:00", "99:99:99:99", "-1", "{}", "{seconds: 0}", "{secs: 1}"],
    "limit_train_batches": ["0", "-1", "1.5", "0.5", "1", "nan", "two"],
    "limit_val_batches": ["-1", "1.5", "0.5", "1", "two"],
    "limit_test_batches": ["-1", "1.5", "two"],
    "limit_predict_batches": ["-1", "two"],
    "overfit_batches": ["-1", "1", "0.5", "1.5", "two"],
    "val_check_interval": ["0", "-1", "2.5", "7", "0.5", "two"],
    "check_val_every_n_epoch": ["0", "-1", "null", "two"],
    "num_sanity_val_steps": ["-1", "-2", "1", "two"],
    "log_every_n_steps": ["0", "-1", "two"],
    "enable_checkpointing": ["false", "two"],
    "enable_progress_bar": ["true", "two"],
    "enable_model_summary": ["true"],
    "accumulate_grad_batches": ["0", "-1", "1000", "3", "1.5", "two", "{0: 2}"],
    "gradient_clip_val": ["-1", "nan", "inf", "two", "0"],
    "gradient_clip_algorithm": ["nonsense", "value", "7"],
    "deterministic": ["true", "warn", "two"],
    "benchmark": ["true", "two"],
    "inference_mode": ["false", "two"],
    "use_distributed_sampler": ["false", "two"],
    "profiler": ["nonsense", "simple", "7"],
    "detect_anomaly": ["true", "two"],
    "barebones": ["true"],
    "plugins": ["nonsense", "7", "[]", "[flowopd.EMA]"],
    "sync_batchnorm": ["true", "two"],
    "reload_dataloaders_every_n_epochs": ["0", "1", "-1", "two"],
    "default_root_dir": ["null", "7", "''", "/dev/null/x", "recipe.yaml", "recipe.yaml/run", "[]", "/proc/run"],
    "model_registry": ["x"],
}
MORE: list[list[str]] = [
    ["--checkpoint_every", "0"],
    ["--checkpoint_every", "two"],
    ["--updates_per_iteration", "0"],
    ["--updates_per_iteration", "7"],
    ["--updates_per_iteration", "two"],
    ["--seed_everything", "-1"],
    ["--seed_everything", "two"],
    ["--seed_everything", "99999999999999999999"],
    ["--seed_everything", "false"],
    ["--seed_everything", "true"],
    ["--seed_everything", "1.5"],
    ["--weights_only", "two"],
]
CALLBACKS: list[Tree] = [
    {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/nothing"}},
    {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/txt", "mode": "maxx"}},
    {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"monitor": "val/nothing"}},
    {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_top_k": -7}},
    {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor", "init_args": {"logging_interval": "hour"}},
    {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": "nonsense"}},
    {"class_path": "flowopd.EMA"},  # a second one
    {"class_path": "flowopd.Guard", "init_args": {"limits": {"distill/loss": float("nan")}}},
    {"class_path": "flowopd.Guard", "init_args": {"drift": {"nothing": [0, 1]}}},
    {"class_path": "flowopd.Guard", "init_args": {"drift": {"sharpness": [1, 0]}}},
    {"class_path": "flowopd.Guard", "init_args": {"on_alarm": "scream"}},
    {"class_path": "flowopd.Guard", "init_args": {"growth": -1}},
    {"class_path": "flowopd.DriftMetrics", "init_args": {"prompts_per_task": 0}},
    {"class_path": "flowopd.ImageGrid", "init_args": {"prompts_per_task": 0}},
    {"class_path": "flowopd.ImageGrid", "init_args": {"every": -1}},
    {"class_path": "flowopd.Progress", "init_args": {"figures": -1}},
]


def trainers(dice: random.Random) -> Iterator[Case]:
    """Options of the trainer."""
    for option, values in TRAINER.items():
        for value in values:
            answer = "refused" if value in ("nonsense", "two") else "either"
            yield Case("trainer", f"{option} {value}", **fit(recipe(), f"--trainer.{option}", value), answer=answer)
    for given in MORE:
        yield Case("trainer", " ".join(given), **fit(recipe(), *given), answer="either")
    for callback in CALLBACKS:
        tree = recipe()
        tree["trainer"]["callbacks"].append(callback)
        answer = "refused" if "init_args" in callback else "either"
        yield Case("trainer", str(callback), **fit(tree), answer=answer)
    yield Case("trainer", "a folder that is a file", **fit(recipe()), make=written("run", b"mine"), answer="either")
    yield Case("trainer", "a folder that leads nowhere", **fit(recipe()), make=is_broken_link("run"), answer="either")


# ---------------------------------------------------------------------------------------------------------------- tasks

TASKED = {
    "teacher": ("trainer", "callbacks", 6, "init_args", "tasks"),
    "reward": ("trainer", "callbacks", 2, "init_args", "tasks"),
    "training reward": ("trainer", "callbacks", 2, "init_args", "tasks"),
}


def tasks(dice: random.Random) -> Iterator[Case]:
    """Names of tasks that no task has."""
    data = ("data", "init_args")
    for slip in ("txt", "Text", "text ", "", "composition,text", "texts", 7, None):
        for role in ("teacher", "reward"):
            answer = "either" if slip is None else "refused"
            yield Case("tasks", f"{role} of {slip!r}", **fit(changed(recipe(), TASKED[role], [slip])), answer=answer)
        path = ("trainer", "callbacks", 2, "init_args", "tasks")
        yield Case("tasks", f"training reward of {slip!r}", **fit(changed(recipe("teacher_text"), path, [slip])))
        for shares in ({slip: 1}, {"composition": 1, slip: 1}, {"composition": 1, "text": 1, slip: 1}):
            yield Case("tasks", f"ratio {shares}", **fit(changed(recipe(), (*data, "ratio"), shares)))
    for shares in (
        {},
        {"composition": 1},
        {"composition": 0, "text": 0},
        {"composition": -1, "text": 2},
        {"composition": 0.5, "text": 0.5},
        [1, 1],
        "1:1",
    ):
        yield Case("tasks", f"ratio {shares}", **fit(changed(recipe(), (*data, "ratio"), shares)), answer="either")
    for where in ("prompts", "evaluation_prompts"):
        yield Case("tasks", f"no {where}", **fit(changed(recipe(), (*data, where), {})), answer="either")
        for slip in ("txt", "Text", ""):
            yield Case(
                "tasks", f"{where} of {slip!r}", **fit(renamed(recipe(), (*data, where, "text"), slip)), answer="either"
            )
        source = {"class_path": "flowopd.tiles.TilesPrompts", "init_args": {"task": "txt"}}
        yield Case("tasks", f"{where} that are unknown", **fit(changed(recipe(), (*data, where, "text"), source)))
    for role in ("teacher", "reward"):
        for empty in ([], "text", {"text": 1}):
            yield Case("tasks", f"{role} of {empty!r}", **fit(changed(recipe(), TASKED[role], empty)), answer="either")


# ---------------------------------------------------------------------------------------------------------------- verbs

TOOLS: list[str] = [
    "data",
    "data nothing --out x.jsonl",
    "data geneval",
    "data geneval --out x.txt",
    "data geneval --out recipe.jsonl",
    "data geneval --out",
    "data geneval --out /dev/null/x.jsonl",
    "data geneval --out x.jsonl --count 0",
    "data geneval --out x.jsonl --count -3",
    "data geneval --out x.jsonl --count two",
    "data geneval --out x.jsonl --count nan",
    "data geneval --out x.jsonl --split tset",
    "data geneval --out x.jsonl --split train --count 3 --seed -1",
    "data geneval --out x.jsonl --seed two",
    "data geneval --outt x.jsonl",
    "data geneval x.jsonl",
    "data ocr --out x.jsonl --split val",
    "data ocr --out x.jsonl --count 0",
    "data ocr --out x.jsonl --count 3 --seed -1",
    "data ocr_paper --out x.jsonl --source nowhere.txt",
    "data ocr_paper --out x.jsonl --source recipe.yaml --sha256 00",
    "data ocr_paper --out x.jsonl --source http://127.0.0.1:9/x",
    "data ocr_paper --out x.jsonl --source ftp://nowhere/x",
    "data ocr_paper --out x.jsonl --source .",
    "data pickapic --out x.jsonl --sfw perhaps --source recipe.yaml",
    "data pickapic --out x.jsonl --source empty.txt",
    "data pickapic --out x.jsonl --source binary.txt",
    "data drawbench --out x.jsonl --source binary.txt",
    "data drawbench --out folder.jsonl --source recipe.yaml",
    "data compbench --out x.jsonl --category colour",
    "data compbench --out x.jsonl --source nowhere",
    "data compbench --out x.jsonl --sha256 00",
    "convert",
    "convert --source x.pth",
    "convert --source x.pth --out y",
    "convert --source recipe.yaml --out y",
    "convert --source . --out y",
    "convert --source empty.txt --out y",
    "convert --source recipe.yaml --out folder.jsonl",
    "convert --sorce x --out y",
    "convert --source run/checkpoints/last.ckpt --out y",
    "convert --source run/adapter/adapter_model.safetensors --out y",
    "convert --source https://127.0.0.1:9/x.pth --out y",
    "serve",
    "serve --reward",
    "serve --reward flowopd.tiles.Crispnes",
    "serve --reward flowopd.EMA",
    "serve --reward nowhere.Reward",
    "serve --reward flowopd.tiles.Composition --reward.strict perhaps",
    "serve --reward flowopd.tiles.Composition --reward.strcit true",
    "serve --reward flowopd.tiles.Crispness --port 0",
    "serve --reward flowopd.tiles.Crispness --port -1",
    "serve --reward flowopd.tiles.Crispness --port 99999",
    "serve --reward flowopd.tiles.Crispness --port two",
    "serve --reward flowopd.tiles.Crispness --host nowhere",
    "serve --reward flowopd.tiles.Crispness --workers 0",
    "serve --reward flowopd.tiles.Crispness --devices 0",
    "serve --reward flowopd.tiles.Crispness --timeout -1",
    "serve --reward flowopd.tiles.Crispness --timeout nan",
    "serve --reward flowopd.tiles.Crispness --accelerator gpuu",
    "serve --reward flowopd.tiles.Crispness --api_key_env NOT_SET_ANYWHERE",
    "serve --config nowhere.yaml",
    "serve --config recipe.yaml",
    "serve --reward flowopd.rewards.OCR --reward.workers -1",
    "serve --reward flowopd.rewards.RemoteReward --reward.url nonsense",
    "serve --reward flowopd.rewards.Weighted",
]
VERBS = ("fit", "validate", "test", "predict", "plan", "check")
NONSENSE = (
    "fitt",
    "train",
    "Fit",
    "",
    " ",
    "--",
    "-v",
    "--fit",
    "--verion",
    "fit.yaml",
    "hlep",
    "evaluate",
    "\u00e9\u4f60",
    "a" * 5000,
)


def verbs(dice: random.Random) -> Iterator[Case]:
    """Verbs that are none, verbs without their words, and the tools."""
    for nonsense in NONSENSE:
        yield Case("verbs", nonsense[:20], (nonsense,))
        yield Case("verbs", f"{nonsense[:20]} --config", (nonsense, "--config", "recipe.yaml"), recipe=recipe())
    for verb in VERBS:
        yield Case("verbs", verb, (verb,))
        yield Case("verbs", f"{verb} --config", (verb, "--config"))
        yield Case("verbs", f"{verb} {verb}", (verb, verb))
        yield Case(
            "verbs", f"{verb} --config x --config", (verb, "--config", "recipe.yaml", "--config"), recipe=recipe()
        )
        yield Case("verbs", f"{verb} --help x", (verb, "--model.help", "flowopd.OPDStudnet"))
        yield Case(
            "verbs", f"{verb} bare", (verb, "--model", "flowopd.OPDStudent", "--data", "flowopd.RolloutDataModule")
        )
        yield Case("verbs", f"{verb} print", (verb, "--config", "recipe.yaml", "--print_config"), "done", recipe())
        yield Case(
            "verbs", f"{verb} --print_config=x", (verb, "--config", "recipe.yaml", "--print_config=x"), recipe=recipe()
        )
        yield Case(
            "verbs",
            f"{verb} foreign model",
            **fit(recipe(), "--model", "lightning.pytorch.demos.boring_classes.BoringModel", verb=verb),
            answer="either",
        )
    for line in TOOLS:
        yield Case("verbs", line, tuple(line.split()), recipe=recipe(), make=around_tools)


def around_tools(folder: Path) -> None:
    (folder / "recipe.jsonl").write_bytes(b"mine\n")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "folder.jsonl").mkdir()
    (folder / "folder.jsonl" / "mine").write_bytes(b"mine\n")
    shutil.copytree(folder.parent / "finished" / "run", folder / "run", symlinks=True)


# ---------------------------------------------------------------------------------------------------------------- draws

KINDS: dict[str, tuple[Callable[[random.Random], Iterator[Case]], int]] = {  # and how many of each are drawn
    "verbs": (verbs, 60),
    "words": (words, 60),
    "numbers": (numbers, 60),
    "types": (types, 40),
    "files": (files, 40),
    "adapters": (adapters, 50),
    "prompt files": (prompt_files, 25),
    "checkpoints": (checkpoints, 50),
    "trainer": (trainers, 80),
    "tasks": (tasks, 35),
}


def slips(kind: str, seed: int, count: int | None = None) -> list[Case]:
    """Cases of a kind, drawn by a seed; as many as the long fuzz takes, unless told otherwise."""
    dice = random.Random(f"{kind} {seed}")
    cases = list(KINDS[kind][0](dice))
    return dice.sample(cases, min(count or KINDS[kind][1], len(cases)))

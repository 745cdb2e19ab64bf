"""``flowopd push``: a finished run as a model of the hub."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowopd.cli.words import WordParser

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from PIL import Image

    from flowopd.evaluation import Shots

HELP = """Make a model of the hub of a finished run: the adapter for peft, diffusers and ComfyUI, pictures of
held-out prompts, scores, the licences of what it learnt from, and a card that tells all of it. It
is written to RUN/hub first."""
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
PICTURES = 8
"""Sample pictures at most."""
SMALLEST = 256
"""Pixels a side of a sample picture; smaller ones are shown larger, pixel by pixel."""


def main() -> None:
    """Entry point of ``flowopd push``."""
    words = _parser().parse_args(sys.argv[2:])
    folder = make(Path(words.run), words.repository, words.license, words.results and Path(words.results))
    print(f"wrote {folder}", flush=True)
    if not words.dry_run:
        print(f"pushed: {upload(folder, words.repository, words.private)}")


def _parser() -> WordParser:
    reads = WordParser(prog="flowopd push", description=HELP, allow_abbrev=False)
    reads.add_argument("run", metavar="RUN", help="the folder of a finished fit")
    reads.add_argument("repository", metavar="USER/NAME", help="of the hub; made if it is not there")
    reads.add_argument("--dry-run", "--dry_run", action="store_true", help="write the folder, and push nothing")
    reads.add_argument("--private", action="store_true", help="if the repository is made: nobody else sees it")
    reads.add_argument("--license", metavar="ID", help="of the adapter; default: the base's, where the hub tells it")
    reads.add_argument(
        "--results", metavar="FOLDER", help="of a flowopd test whose tables to show; default: the run's own"
    )
    return reads


def make(run: Path, repository: str, license_id: str | None = None, results: Path | None = None) -> Path:
    """Write the folder of a run as the hub shall have it.

    Args:
        run: folder of a finished fit.
        repository: ``user/name``.
        license_id: of the adapter.
        results: folder whose ``results.md`` has the scores, such as one of benchmarks, with intervals.

    Raises:
        ValueError: if that is no name, or there is no adapter.
    """
    from flowopd.report.words import near

    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"{repository!r} is no repository of the hub; expected user/name")
    if not (run / "adapter" / "README.md").is_file():
        raise ValueError(f"{str(run)!r} holds no adapter; expected the folder of a finished fit")
    if results is not None and not (results / "results.md").is_file():
        raise ValueError(f"{str(results)!r} has no results.md; expected the folder of a flowopd test")
    folder = run / "hub"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run / "adapter", folder)
    _copy_for_comfyui(folder, repository)
    samples = _samples(run, folder)
    card = _card(folder, repository, samples)
    parts = [_pictures(run, folder, samples), _scores(results or run), _sources(run, card, license_id)]
    text = "\n\n".join([card.text.strip(), *filter(None, parts)]) + "\n"
    card.text = re.sub(r"^\|.*", lambda row: near(row[0], run), text, flags=re.MULTILINE)  # where it lies here is ours
    card.save(folder / "README.md")
    return folder


def upload(folder: Path, repository: str, private: bool = False) -> str:
    """Push a folder to the hub, with the token and the endpoint of huggingface_hub; returns the address.

    Raises:
        ValueError: saying what stands between us and the hub.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="A LoRA adapter made by flowopd")
    except Exception as error:  # the hub raises many kinds; all of them mean: not pushed
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot push to {repository!r}: {first}; is the hub reachable, and are you logged in (`hf auth login`, or "
            f"HF_TOKEN)? What is to be pushed is in {folder}"
        ) from error
    return str(address)


# --------------------------------------------------------------------------------------------------------------- files


def _copy_for_comfyui(folder: Path, repository: str) -> None:
    """A file of the adapter's own name, which one may put beside others."""
    from flowopd.models.adapters.files import DIFFUSERS_WEIGHTS

    (folder / "comfyui").mkdir()
    shutil.copyfile(folder / DIFFUSERS_WEIGHTS, folder / "comfyui" / f"{repository.partition('/')[2]}.safetensors")


def _samples(run: Path, folder: Path) -> dict[str, str]:
    """Write the last pictures of what was trained, the last model of a sheet; returns their files by prompt."""
    shots = _last_shots(run)
    if shots is None:
        return {}
    (folder / "images").mkdir(exist_ok=True)
    found = dict[str, str]()
    step = max(1, len(shots.prompts) // PICTURES)
    trained = list(shots.pictures.values())[-1]
    for prompt, picture in list(zip(shots.prompts, trained, strict=True))[::step][:PICTURES]:
        file = f"images/{len(found)}.png"
        _enlarged(picture).save(folder / file)
        found.setdefault(prompt, file)
    return found


def _last_shots(run: Path) -> Shots | None:
    from flowopd.evaluation import Shots

    shots = run / "images" / "shots"
    files = [shots / "models.png", *sorted(shots.glob("iteration_*.png"), reverse=True)]
    return next((Shots.read(file) for file in files if file.is_file() and file.with_suffix(".json").is_file()), None)


def _enlarged(picture: Image.Image) -> Image.Image:
    from PIL import Image

    times = -(-SMALLEST // max(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


# ---------------------------------------------------------------------------------------------------------------- card


def _card(folder: Path, repository: str, samples: Mapping[str, str]) -> ModelCard:
    """The adapter's card, as somebody reads it who has it from the hub."""
    from huggingface_hub import ModelCard

    card: ModelCard = ModelCard.load(folder / "README.md")
    card.text = card.text.replace("# A LoRA adapter made by flowopd", f"# {repository.partition('/')[2]}", 1)
    card.text = re.sub(
        r"^adapter = .*$", lambda _: f"adapter = {json.dumps(repository)}", card.text, flags=re.MULTILINE
    )
    if samples:
        card.text = card.text.replace('"PROMPT"', json.dumps(next(iter(samples)), ensure_ascii=False), 1)
        card.data["widget"] = [{"text": prompt, "output": {"url": file}} for prompt, file in samples.items()]
    if card.data.get("base_model"):
        card.data["base_model_relation"] = "adapter"
    return card


def _pictures(run: Path, folder: Path, samples: Mapping[str, str]) -> str:
    """All models on the same prompts and noise, and the samples."""
    parts = ["## Pictures"]
    if (sheet := run / "images" / "models.png").is_file():
        shutil.copyfile(sheet, folder / "images" / "models.png")
        parts.append("Every row a model, on the same prompts and noise:\n\n![all models](images/models.png)")
    parts += ["<Gallery />"] if samples else []
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _scores(folder: Path) -> str:
    """The tables of a run, as it wrote them."""
    file = folder / "results.md"
    if not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8").strip()
    kl = "`fixed_kl/…` is the distance to a teacher at its own states, in nats per latent dimension; 0 is the teacher."
    told = [kl] if "fixed_kl/" in text else []
    if "[" not in text:
        told.append("No intervals are known of these scores; `flowopd test` of benchmarks gives them.")
    return "\n\n".join(["## Scores", *told, re.sub(r"^## ", "### ", text, flags=re.MULTILINE)])


def _sources(run: Path, card: ModelCard, license_id: str | None) -> str:
    """What the adapter was made of, and under which licences; the header gets the adapter's own."""
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"), resolve=False)
    named = card.data.get("base_model")
    base = _facts(named) if isinstance(named, str) else {}
    if license_id or "license" in base:
        card.data["license"] = license_id or base["license"]
    for name in ("license_name", "license_link"):
        if not license_id and name in base:
            card.data[name] = base[name]
    rows = [("base", _base_of(config)), *((path, path) for path in dict.fromkeys(_adapters(config)))]
    told = "\n".join(f"| {name} | {_licence(path)} |" for name, path in rows)
    return (
        f"## Made of\n\n| what | licence |\n|---|---|\n{told}\n\nWhat these allow decides how the adapter may be used."
    )


def _adapters(config: Any) -> Iterator[str]:  # noqa: ANN401
    """Paths of all that teaches, and of what the student starts from."""
    callbacks = [one.get("init_args") or {} for one in config["trainer"].get("callbacks") or []]
    yield from _paths([config["model"]["init_args"].get("start"), *(one.get("teacher") for one in callbacks)])


def _paths(value: Any) -> Iterator[str]:  # noqa: ANN401
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name in ("path", "adapter") or not isinstance(inner, str):
                yield from _paths(inner)


def _base_of(config: Any) -> str:  # noqa: ANN401
    return str(config["model"]["init_args"]["backbone"]["init_args"].get("path", "of its own"))


def _licence(path: str) -> str:
    """The licence of a model of the hub, or of a folder with a card, in words."""
    facts = _facts(path)
    named = " ".join(filter(None, [facts.get("license"), facts.get("license_name") and f"({facts['license_name']})"]))
    return f"{named}: {facts['license_link']}" if named and "license_link" in facts else named or "not known"


def _facts(path: str) -> dict[str, str]:
    """What a model's card says of its licence; nothing, where there is no card or the hub does not answer."""
    from huggingface_hub import HfApi, ModelCard

    file = Path(path) / "README.md"
    try:
        if Path(path).exists():
            data: Any = ModelCard.load(file).data if file.is_file() else {}
        else:
            data = HfApi().model_info(path, timeout=10).card_data or {} if REPOSITORY.fullmatch(path) else {}
    except Exception:  # a licence that cannot be found out is not known
        return {}
    names: Sequence[str] = ("license", "license_name", "license_link")
    return {name: str(data.get(name)) for name in names if data.get(name)}

"""Prompt sets that others publish as plain text: where they are, under which licence, and how they are fetched."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import requests

from flowopd.prompts.files import lines_of

# A commit in the address fixes what is read there.
FLOW_GRPO = "https://raw.githubusercontent.com/yifan123/flow_grpo/c7bb5fee2ef663eee08393759c8cb8a0e027f5e3/dataset"
COMPBENCH = "https://raw.githubusercontent.com/Karine-Huang/T2I-CompBench"


@dataclass(frozen=True)
class PublishedSet:
    """Prompts at an address, one per line.

    Args:
        address: a URL, with ``{split}`` where there are several.
        licence: what is known of it.
    """

    address: str
    licence: str


PICKAPIC = PublishedSet(
    f"{FLOW_GRPO}/pickscore/{{split}}.txt",
    "no licence of its own: texts of Pick-a-Pic's users, unfiltered, some not safe for work; the repository is MIT",
)
PICKAPIC_SFW = PublishedSet(
    f"{FLOW_GRPO}/pickscore_sfw/{{split}}.txt",
    "no licence of its own: texts of Pick-a-Pic's users, filtered to be safe for work; the repository is MIT",
)
DRAWBENCH = PublishedSet(
    f"{FLOW_GRPO}/drawbench/{{split}}.txt", "unclear: published with Imagen without one; do not redistribute"
)
PAPER_OCR = PublishedSet(f"{FLOW_GRPO}/ocr/{{split}}.txt", "MIT (the repository's); written by a language model")

_OLD, _NEW = "7710d059c3391fe97fbf9e2ad3813ed0e7d87979", "fc2c9b9f8ec357dcf1bb1b382c0df017afe9cd8c"
_COMMITS = {
    **dict.fromkeys(("color", "shape", "texture", "spatial", "complex"), _OLD),
    **dict.fromkeys(("3d_spatial", "numeracy"), _NEW),
    "non_spatial": "41388b8b6ae716108ebb507133930c1f030990c3",
}
COMPBENCH_SETS = {
    category: PublishedSet(f"{COMPBENCH}/{commit}/examples/dataset/{category}_val.txt", "MIT")
    for category, commit in _COMMITS.items()
}


def fetch(source: str, sha256: str | None = None) -> tuple[bytes, str]:
    """Read a file or a web address.

    Args:
        source: a path, or an address that starts with http:// or https://.
        sha256: what the bytes must hash to, in hexadecimal.

    Returns:
        The bytes and their sha256.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if the address does not answer with it, or the hash is another.
    """
    data = _download(source) if source.startswith(("http://", "https://")) else _read(source)
    found = hashlib.sha256(data).hexdigest()
    if sha256 and found != sha256.lower():
        raise ValueError(f"{source} has sha256 {found}, expected {sha256}; it changed, or arrived damaged")
    return data, found


def texts(data: bytes, source: str) -> list[str]:
    """The prompts of a plain-text set in their order; what is repeated counts once.

    Raises:
        ValueError: if there is none, or a line is not UTF-8.
    """
    found = [line for line in dict.fromkeys(lines_of(data, source)) if line]
    if not found:
        raise ValueError("the source holds no prompt; expected plain text, one prompt per line")
    return found


def _read(path: str) -> bytes:
    if not Path(path).is_file():
        raise FileNotFoundError(f"prompt file {path!r} does not exist")
    return Path(path).read_bytes()


def _download(address: str) -> bytes:
    try:
        answer = requests.get(address, timeout=60)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise ValueError(f"no prompts from {address} ({error}); download them by hand and name the --source") from error
    return answer.content

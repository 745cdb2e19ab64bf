"""Write a report: ``report.html``, ``report.md`` and its pictures."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from flowopd.report.blocks import Page
from flowopd.report.pages import page_of_run, page_of_runs
from flowopd.report.runs import read_runs


def write(folders: Sequence[Path | str], out: Path | str | None = None, title: str = "") -> Path:
    """Write the report of one run, or of several side by side.

    Args:
        folders: of runs: finished, stopped in the middle, or still running.
        out: where to; default: ``report`` in the folder of the run, or here if there are several.
        title: of the page of several.

    Returns:
        The page, ``<out>/report.html``; it opens from the disk and asks nobody for anything.

    Raises:
        ValueError: if there is no run, one is named twice, or a folder is no run's or has no figures yet.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("there is no run to report on; give one run folder or several")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a run folder is given twice; give each once")
    runs = read_runs(paths)
    page = page_of_run(runs[0]) if len(runs) == 1 else page_of_runs(runs, title or "Runs side by side")
    place = Path(out) if out is not None else (paths[0] / "report" if len(paths) == 1 else Path("report"))
    return _write(page, place)


def _write(page: Page, place: Path) -> Path:
    """Pictures first, so that what names them never stands without them; those that an earlier report had go last."""
    place.mkdir(parents=True, exist_ok=True)
    pictures = {picture.file: picture.data for picture in page.pictures()}
    earlier = _named(place / "report.md") - pictures.keys()
    for file, data in pictures.items():
        (place / file).write_bytes(data)
    for name in ("report.md", "report.html"):
        partial = place / f"{name}.partial"
        partial.write_text(_templates().get_template(f"{name}.jinja").render(page=page), encoding="utf-8")
        partial.replace(place / name)
    for file in earlier:
        (place / file).unlink(missing_ok=True)
    return place / "report.html"


def _named(page: Path) -> set[str]:
    """Pictures beside an earlier page that it names."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    return set(re.findall(r"(?<!\\)\]\(([a-z0-9_-]+\.(?:png|jpg))\)", text))


def _templates() -> Environment:
    """HTML escapes whatever it shows; Markdown by its filter."""
    templates = Environment(
        loader=PackageLoader("flowopd.report"),
        autoescape=lambda name: bool(name and name.endswith(".html.jinja")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["md"] = markdown
    return templates


def markdown(text: str) -> str:
    r"""A text that Markdown shows as it stands, in one line.

    >>> markdown("a|b <i>*c*")
    'a\\|b &lt;i&gt;\\*c\\*'
    """
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))

"""A hook of mkdocs: the READMEs of the repository are pages of the site as they stand, so that a thing is said once."""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PICTURES = "src/flowopd/tiles/assets"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|<)([^)#\s]+)(#[^)\s]*)?\)")


def pages() -> dict[str, str]:
    """Where every included file stands in the site, by its path in the repository."""
    found = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
    found |= {"configs/README.md": "recipes/index.md", "configs/scaling.md": "recipes/scaling.md"}
    found |= {f"configs/{path.parent.name}/README.md": f"recipes/{path.parent.name}.md" for path in _below("configs/*")}
    found |= {"tests/benchmarks/README.md": "inside/benchmarks.md"}
    for path in _below("src/flowopd/**"):
        inside = path.parent.relative_to(ROOT / "src" / "flowopd").as_posix()
        found[_name(path)] = f"inside/{inside}.md"
    found |= {_name(path): f"rewards/{path.name}" for path in ROOT.glob("src/flowopd/rewards/pages/*.md")}
    return found | {"src/flowopd/rewards/README.md": "rewards/index.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the included pages, and the pictures of the built-in world."""
    for source, page in pages().items():
        text = relinked((ROOT / source).read_text(encoding="utf-8"), source)
        files.append(File.generated(config, page, content=text))
    for path in (ROOT / PICTURES).glob("*.png"):
        files.append(File.generated(config, f"pictures/{path.name}", abs_src_path=str(path)))
    return files


def relinked(text: str, source: str) -> str:
    """A file's text whose links lead to pages of the site; what the site does not hold is named, and no link."""
    known = pages() | {f"docs/{path.name}": path.name for path in (ROOT / "docs").glob("*.md")}
    known |= {_name(path): f"pictures/{path.name}" for path in (ROOT / PICTURES).glob("*.png")}
    here = PurePosixPath(source).parent

    def lead(found: re.Match[str]) -> str:
        words, target, anchor = found[1], os.path.normpath(here / found[2]), found[3] or ""
        target = f"{target}/README.md" if (ROOT / target).is_dir() else target
        if target not in known:
            return words
        return f"[{words}]({os.path.relpath(known[target], PurePosixPath(pages()[source]).parent)}{anchor})"

    return LINK.sub(lead, text)


def _below(folder: str) -> list[Path]:
    return [path for path in sorted(ROOT.glob(f"{folder}/README.md")) if path.parent not in (ROOT / "configs",)]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()

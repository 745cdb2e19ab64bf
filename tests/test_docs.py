"""The site of the documentation builds without a warning, its links lead somewhere, and it asks nobody for anything."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs", reason='needs pip install "flowopd[docs]"')
pytest.importorskip("mkdocstrings", reason='needs pip install "flowopd[docs]"')

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a page leads to, what it loads, and which places it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.places |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links |= {given["href"]} if tag == "a" and given.get("href") else set()
        self.loaded |= {given["href"]} if tag == "link" and given.get("href") else set()
        self.loaded |= {given["src"]} if given.get("src") else set()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_link_leads_to_a_file_and_a_place_in_it(pages):
    dead = []
    for path, page in pages.items():
        for link in page.links | page.loaded:
            at = urlsplit(link)
            target = (path.parent / unquote(at.path)).resolve() if at.path else path
            if not (at.scheme or at.netloc or leads(target, unquote(at.fragment), pages)):
                dead.append(f"{path.name}: {link}")
    assert dead == []


def leads(target: Path, place: str, pages: dict[Path, Page]) -> bool:
    """Whether there is such a file, with such a place if it is a page."""
    return target.is_file() and (not place or target not in pages or place in pages[target].places)


def test_nothing_is_asked_of_anybody(site, pages):
    assert [link for page in pages.values() for link in page.loaded if urlsplit(link).netloc] == []
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import )[\"']?https?:", styles) == []


def test_the_api_has_what_a_recipe_names(pages):
    (training,) = [page for path, page in pages.items() if path.match("api/training.html")]
    assert {"flowopd.training.OPDStudent", "flowopd.training.RolloutDataModule"} <= training.places


def test_examples_of_docstrings_are_code(site):
    assert "&gt;&gt;&gt;" not in re.sub(
        r"<code.*?</code>", "", (site / "api" / "core.html").read_text(), flags=re.DOTALL
    )


@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
def test_the_search_works_from_the_disk(site, tmp_path):
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    page = f"{(site / 'index.html').as_uri()}?q=seesaw"
    command = [BROWSER, *quiet, f"--user-data-dir={tmp_path}", "--virtual-time-budget=8000", "--dump-dom", page]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert re.search(
        r'class="md-search-result__link"[^>]*concepts\.html|concepts\.html[^>]*md-search-result__link', shown
    )

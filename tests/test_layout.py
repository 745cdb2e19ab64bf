"""The laws of the folders: imports point down, nothing unpickles, everything ships, help is instant.

The package is read here as text (ast), never imported, so a module that breaks a law is named even if it cannot run.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "flowopd"
CONFIGS = ROOT / "configs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

FLOORS = [  # from the ground up
    {"core"},
    {"records"},
    {"models", "rewards", "prompts"},
    {"teachers", "rollouts"},
    {"tiles", "evaluation", "testing"},
    {"report"},
    {"training.ranks"},
    {"training"},  # the story
    {"training.callbacks"},
    {"preflight"},
    {"cli", "__main__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS, start=1) for name in names}
ROOFS = {"training"}  # packages whose __init__ names everything below them
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


class Import(NamedTuple):
    """``module``, as it is imported on ``line``; ``local`` where a function does it."""

    module: str
    line: int
    local: bool


class Module(NamedTuple):
    """A module of the package, ``name`` being its path below ``flowopd``: ``core.paths``."""

    name: str
    path: Path

    @property
    def folder(self) -> str:
        return self.name.split(".")[0]

    @property
    def floor(self) -> int | None:
        roofs = [FLOOR[name] for name in FLOOR if self.name in ROOFS and name.split(".")[0] == self.name]
        return max(roofs) if roofs else floor_of(self.name)

    @property
    def package(self) -> list[str]:
        """The package that a relative import starts from."""
        return ["flowopd", *self.path.relative_to(PACKAGE).parent.parts]

    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), filename=str(self.path))

    def imports(self) -> list[Import]:
        return [Import(name, node.lineno, local) for node, local in walk(self.tree()) for name in self.targets(node)]

    def targets(self, node: ast.AST) -> list[str]:
        """The modules that a statement imports; ``from flowopd import core`` imports ``flowopd.core``."""
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if not isinstance(node, ast.ImportFrom):
            return []
        start = self.package[: len(self.package) - node.level + 1] if node.level else []
        source = ".".join([*start, *([node.module] if node.module else [])])
        return [f"{source}.{alias.name}" for alias in node.names] if source == "flowopd" else [source]


def walk(tree: ast.AST, local: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below ``tree``, and whether it stands in a function."""
    for node in ast.iter_child_nodes(tree):
        yield node, local
        yield from walk(node, local or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def floor_of(name: str) -> int | None:
    """The floor of a module, by the longest name that has one."""
    parts = name.split(".")
    known = [FLOOR.get(".".join(parts[:length])) for length in range(len(parts), 0, -1)]
    return next((floor for floor in known if floor is not None), None)


def modules() -> list[Module]:
    paths = sorted(PACKAGE.rglob("*.py"))
    names = [".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return [Module(name, path) for name, path in zip(names, paths, strict=True)]


MODULES = modules()
FLOORED = [module for module in MODULES if module.name != "__init__"]  # the roof is lazy and may name everything
every_module = pytest.mark.parametrize("module", MODULES, ids=[module.name for module in MODULES])
every_floored_module = pytest.mark.parametrize("module", FLOORED, ids=[module.name for module in FLOORED])


def top(name: str) -> str:
    return name.split(".")[0]


@every_floored_module
def test_imports_point_down(module):
    assert module.floor is not None, f"{module.path.name} has no floor: give it one in FLOORS"
    upward = []
    for found in module.imports():
        source, *target = found.module.split(".")
        if source == "flowopd" and target != ["__version__"]:
            # `flowopd` itself re-exports from every floor: only the command line may use it.
            floor = (floor_of(".".join(target)) if target else None) or len(FLOORS)
            if floor > module.floor:
                upward.append(f"line {found.line}: {found.module}")
    assert not upward, f"{module.name} stands on floor {module.floor} and imports from above: {upward}"


@every_module
def test_only_training_and_the_command_line_know_lightning(module):
    if module.folder in {"training", "preflight", "cli"}:
        return
    found = [f"line {found.line}: {found.module}" for found in module.imports() if top(found.module) in LIGHTNING]
    assert not found


@pytest.mark.parametrize("module", [m for m in MODULES if m.folder == "core"], ids=lambda module: module.name)
def test_core_knows_torch_and_the_standard_library_only(module):
    known = sys.stdlib_module_names | {"torch", "flowopd"}
    found = [f"line {found.line}: {found.module}" for found in module.imports() if top(found.module) not in known]
    assert not found


@every_module
def test_what_a_module_imports_at_once_is_declared(module):
    """An optional package is imported by the function that needs it, which can then say how to get it."""
    declared = {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in PROJECT["dependencies"]}
    distributions = packages_distributions()
    foreign = {top(found.module) for found in module.imports() if not found.local}
    foreign -= sys.stdlib_module_names | {"flowopd"}
    undeclared = {name for name in foreign if not declared & {normal(d) for d in distributions.get(name, [name])}}
    assert not undeclared


def normal(distribution: str) -> str:
    """The name as an index spells it: Open_CLIP.torch → open-clip-torch."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


@every_module
def test_nothing_unpickles(module):
    found = [f"line {found.line}: {found.module}" for found in module.imports() if top(found.module) in UNPICKLERS]
    found += [f"line {node.lineno}: {ast.unparse(node)}" for node, _ in walk(module.tree()) if may_unpickle(node)]
    assert not found, f"{module.name} may run what a file says; use safetensors, JSON or weights_only=True: {found}"


def may_unpickle(node: ast.AST) -> bool:
    """Is this ``torch.load`` without ``weights_only=True``, or ``allow_pickle=`` anything but False?"""
    if isinstance(node, ast.ImportFrom):  # under its own name it would escape the next lines
        return node.module == "torch" and any(alias.name == "load" for alias in node.names)
    if not isinstance(node, ast.Call):
        return False
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    loads = ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True"
    return loads or keywords.get("allow_pickle", "False") != "False"


def test_the_unpickling_law_catches_what_it_names():
    def caught(source):
        return [may_unpickle(node) for node, _ in walk(ast.parse(source))].count(True) == 1

    assert caught("torch.load(path)")
    assert caught("torch.load(path, weights_only=False)")
    assert caught("from torch import load")
    assert caught("np.load(path, allow_pickle=True)")
    assert not caught("torch.load(path, weights_only=True)")
    assert not caught("json.load(file)")


@pytest.mark.parametrize(
    "folder", sorted({m.path.parent for m in MODULES} - {PACKAGE}), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_every_folder_with_code_has_a_readme(folder):
    assert (folder / "README.md").is_file()


def test_the_wheel_ships_everything_below_the_package_and_the_recipes(tmp_path):
    """Weights, tables and prompt files too: an installed copy draws tiles without a checkout."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    shipped = {name for name in ZipFile(wheel).namelist() if name.startswith("flowopd/")}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    recipes = {f"flowopd/recipes/{path.relative_to(CONFIGS).as_posix()}" for path in CONFIGS.rglob("*.*")}
    assert shipped == {path.relative_to(PACKAGE.parent).as_posix() for path in files} | recipes


def test_help_imports_no_heavy_package():
    """``flowopd --help`` answers at once: torch alone would take seconds."""
    module, function = PROJECT["scripts"]["flowopd"].split(":")
    program = f"""
import sys
from {module} import {function} as main
sys.argv = ["flowopd", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("heavy:", *sorted({{"torch", "torchvision", "lightning", "diffusers", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert last == "heavy:"
    assert "fit" in done.stdout

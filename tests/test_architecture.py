"""What keeps the code base the shape it was drawn in."""

from __future__ import annotations

import ast
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sized
from importlib import import_module
from pathlib import Path

import pytest

import tiedconv
from tiedconv.data.layouts import all_layouts
from tiedconv.exporting import all_formats
from tiedconv.families import Family, all_families
from tiedconv.schemes import Scheme, all_schemes

PACKAGE = Path(tiedconv.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS: dict[str, int] = {
    **dict.fromkeys(["errors", "memory", "version"], 0),
    **dict.fromkeys(["expr", "scaling"], 1),
    **dict.fromkeys(["plan", "grouping", "generated", "applied", "features"], 2),
    **dict.fromkeys(["linalg", "metric", "leastsquares", "gauge", "schemes", "families"], 3),
    "limits": 3,
    **dict.fromkeys(
        [
            "anatomy",
            "answering",
            "recipe",
            "budget",
            "search",
            "planner",
            "files",
            "binding",
            "evaluated",
            "applying",
            "pictures",
            "checkpoint",
            "run_folder",
            "scratch",
            "writing",
        ],
        4,
    ),
    **dict.fromkeys(["sources", "data", "training", "calibration", "detection"], 5),
    **dict.fromkeys(
        [
            "loading",
            "calibrate",
            "fits",
            "trials",
            "streaming",
            "convert",
            "finetune",
            "evaluate",
            "report",
            "exporting",
            "contender",
            "against",
            "bench",
            "export",
            "verify",
            "demo",
        ],
        6,
    ),
    **dict.fromkeys(["progressive", "pricing", "compare", "sensitivity", "watching"], 6),
    **dict.fromkeys(["cli", "__main__"], 7),
}
TOP = 8  # the package's own __init__, which shows what the rest makes

# Who may import what from outside; everything else is open to all.
ONLY = {
    "torchvision": {"sources"},
    "timm": {"sources"},
    "transformers": {"sources"},
    "typer": {"cli"},
    "rich": {"cli"},
    "sklearn": {"demo"},
    "datasets": {"data"},
    "webdataset": {"data"},
    "matplotlib": {"demo", "pictures", "watching"},
}
# With the module ready to be imported by `sources.torchvision_compat`, these use it as well.
COMPAT = {"data", "demo"}


def unit(path: Path) -> str:
    """The module or folder of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, inside functions too, under its absolute name."""
    package = ["tiedconv", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            if name == "tiedconv":
                yield from ((f"tiedconv.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield name, node.lineno


each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


@each_file
def test_imports_point_down(path: Path) -> None:
    here = unit(path)
    level = TOP if here == "__init__" else LAYERS.get(here)
    assert level is not None, f"{here} has no layer: add it to the table of this test"
    for name, line in imports(path):
        if not name.startswith("tiedconv"):
            continue
        there = name.split(".")[1] if "." in name else "__init__"
        if there == here or (there == "__version__" and here == "cli"):
            continue
        where = f"{path.name}:{line} imports {name}"
        assert there in LAYERS, f"{where}: import from the module that defines it"
        assert LAYERS[there] <= level, where
        pair = {here, there}
        assert pair != {"schemes", "families"}, where
        assert not (here in ("families", "gauge", "linalg") and there == "schemes"), where
        assert not (here == "linalg" and there == "gauge"), where


@each_file
def test_heavy_libraries_are_imported_in_one_place_each(path: Path) -> None:
    here = unit(path)
    uses_compat = any(name.endswith("torchvision_compat") for name, _ in imports(path))
    for name, line in imports(path):
        top = name.split(".")[0]
        if top not in ONLY or here in ONLY[top]:
            continue
        allowed = top == "torchvision" and here in COMPAT and uses_compat
        assert allowed, f"{path.name}:{line} imports {name}"


@each_file
def test_modules_are_short_and_documented(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 420
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
        if not isinstance(node, ast.ClassDef):
            continue
        bases = {b.id for b in node.bases if isinstance(b, ast.Name)}
        for method in node.body:
            public = isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
            # What a method overrides says what it does.
            if public and not bases and isinstance(method, ast.FunctionDef):
                assert ast.get_docstring(method), f"{path.name}: {node.name}.{method.name}"


@each_file
def test_nothing_prints_and_nothing_is_caught_blindly(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno} catches everything"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"print", "eval", "exec"}, f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("pickle", "load"), ("pickle", "loads")}


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("schemes", "SCHEME"),
        ("families", "FAMILY"),
        ("exporting", "FORMAT"),
        ("data.layouts", "LAYOUT"),
    ],
)
def test_each_file_of_a_folder_holds_exactly_one(folder: str, kind: str) -> None:
    package = import_module(f"tiedconv.{folder}")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    for name in names:
        path = PACKAGE.joinpath(*folder.split("."), f"{name}.py")
        defined = [
            target.id
            for node in ast.parse(path.read_text("utf-8")).body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name) and target.id.isupper() and target.id[0] != "_"
        ]
        assert defined == [kind], path.name
    listing: dict[str, Callable[[], Sized]] = {
        "schemes": all_schemes,
        "families": all_families,
        "exporting": all_formats,
        "data.layouts": all_layouts,
    }
    assert len(listing[folder]()) == len(names)


def test_schemes_and_families_are_what_they_should_be() -> None:
    for name, scheme in all_schemes().items():
        assert issubclass(scheme, Scheme)
        assert scheme.name == name
        assert scheme.looks_for
        assert scheme() == scheme()  # every option has a default
        assert scheme.__doc__
    families = all_families()
    assert all(isinstance(f, Family) and f.looks_for for f in families)
    assert len({f.name for f in families}) == len(families)
    assert [f.last for f in families] == sorted(f.last for f in families)


def test_all_that_is_public_is_there_and_documented() -> None:
    assert sorted(tiedconv.__all__) == list(tiedconv.__all__) or len(set(tiedconv.__all__)) == len(
        tiedconv.__all__
    )
    for name in tiedconv.__all__:
        value = getattr(tiedconv, name)
        assert isinstance(value, str) or inspect.getdoc(value)


def test_the_api_page_documents_exactly_what_is_public() -> None:
    page = PACKAGE.parent / "docs" / "api.md"
    if not page.exists():
        pytest.skip("docs/api.md is not written yet")
    documented = re.findall(r"^### `tiedconv\.(\w+)", page.read_text("utf-8"), re.MULTILINE)
    assert sorted(documented) == sorted(tiedconv.__all__)


def test_importing_tiedconv_imports_no_model_library() -> None:
    heavy = ["torchvision", "timm", "transformers", "typer", "rich", "scipy", "sklearn",
             "matplotlib", "PIL", "datasets", "webdataset", "tensorboard"]  # fmt: skip
    code = f"import sys, tiedconv; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_the_package_says_that_it_is_typed_and_which_version_it_is() -> None:
    assert (PACKAGE / "py.typed").exists()
    project = PACKAGE.parent / "pyproject.toml"
    if project.exists():
        assert f'version = "{tiedconv.__version__}"' in project.read_text("utf-8")

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
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import tiedconv
from tiedconv.data.layouts import all_layouts
from tiedconv.exporters import all_formats
from tiedconv.families import Family, all_families
from tiedconv.outputs import all_output_kinds
from tiedconv.schemes import Scheme, all_schemes
from tiedconv.tasks import all_tasks

PACKAGE = Path(tiedconv.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Which folders a folder imports from: all of them below it, so that no import points up.
IMPORTS: dict[str, str] = {
    "wording": "",
    "errors": "wording",
    "version": "",
    "core": "errors",
    "numerics": "core errors",
    "families": "core errors",
    "runtime": "core errors",
    "schemes": "core errors numerics runtime",
    "planning": "core errors families io numerics runtime schemes utils",
    "io": "core errors families runtime",
    "utils": "errors io",
    "integrations": "core errors io runtime version",
    "sources": "errors integrations io runtime",
    "data": "errors io sources",
    "training": "core data errors io runtime utils",
    "detection": "data errors training",
    "outputs": "data detection errors runtime training",
    "tasks": "data detection errors outputs runtime sources training",
    "calibration": "core data errors io numerics outputs runtime training",
    "conversion": "calibration core data errors families io numerics planning runtime schemes"
    " sources utils version",
    "exporters": "core errors io runtime sources version",
    "timing": "core errors exporters io runtime utils",
    "commands": "calibration conversion core data detection errors exporters families"
    " integrations io numerics outputs planning runtime schemes sources tasks timing training utils"
    " version",
    "loggers": "commands errors io training utils",
    "pages": "commands core errors io loggers sources training utils version",
    "cli": "calibration commands conversion errors io loggers pages planning sources training utils"
    " version wording",
    "__main__": "cli",
    "__init__": "calibration commands conversion core errors io pages planning runtime sources"
    " training utils version",
}

# Who may import what from outside; everything else is open to all.
ONLY = {
    "torchvision": {"sources"},
    "timm": {"sources"},
    "transformers": {"sources", "integrations"},
    "typer": {"cli"},
    "rich": {"cli"},
    "jinja2": {"pages"},
    "sklearn": {"commands"},
    "datasets": {"data"},
    "webdataset": {"data"},
    "matplotlib": {"commands", "utils", "loggers"},
}
# With the module ready to be imported by `sources.torchvision_compat`, these use it as well.
COMPAT = {"data", "commands"}


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


def test_each_folder_imports_only_what_the_table_says() -> None:
    found: dict[str, set[str]] = {}
    for path in FILES:
        here = unit(path)
        for name, line in imports(path):
            if not name.startswith("tiedconv."):
                continue
            there = name.split(".")[1]
            where = f"{path.relative_to(PACKAGE)}:{line} imports {name}"
            assert there in IMPORTS, f"{where}: import from the module that defines it"
            assert there == here or there in IMPORTS[here].split(), where
            found.setdefault(here, set()).add(there)
    for here, allowed in IMPORTS.items():
        unused = set(allowed.split()) - found.get(here, set()) - {"errors"}
        assert not unused, f"{here} does not import {unused} any more: shorten the table"


def test_the_table_of_folders_has_no_circle_and_names_every_folder() -> None:
    TopologicalSorter({k: v.split() for k, v in IMPORTS.items()}).prepare()  # or raises CycleError
    there = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/*.py")}
    assert there == IMPORTS.keys()
    assert {p.stem for p in PACKAGE.glob("*.py")} == {
        "__init__", "__main__", "errors", "version", "wording",
    }  # fmt: skip


def test_modules_of_a_folder_import_each_other_without_a_circle() -> None:
    names = {
        ".".join(("tiedconv", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in FILES
    }
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    graph = {
        name: {other for other, _ in imports(path) if other in names and other != name}
        for name, path in names.items()
        if path.name != "__init__.py"
    }
    TopologicalSorter(graph).prepare()  # or raises CycleError


def test_no_function_hides_a_module_of_its_name() -> None:
    for module in pkgutil.walk_packages(tiedconv.__path__, "tiedconv."):
        if module.name.endswith("__main__"):
            continue
        loaded = import_module(module.name)
        parent, _, name = module.name.rpartition(".")
        assert getattr(import_module(parent), name) is loaded, f"{module.name} is hidden"


def test_heavy_libraries_are_imported_in_one_place_each() -> None:
    for path in FILES:
        here = unit(path)
        uses_compat = any(name.endswith("torchvision_compat") for name, _ in imports(path))
        for name, line in imports(path):
            top = name.split(".")[0]
            if top not in ONLY or here in ONLY[top]:
                continue
            allowed = top == "torchvision" and here in COMPAT and uses_compat
            assert allowed, f"{path.name}:{line} imports {name}"


def test_modules_are_short_and_documented() -> None:
    for path in FILES:
        text = path.read_text("utf-8")
        assert len(text.splitlines()) <= 420, path.name
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
                # What a method overrides documents it.
                if public and not bases and isinstance(method, ast.FunctionDef):
                    assert ast.get_docstring(method), f"{path.name}: {node.name}.{method.name}"


def test_nothing_prints_and_nothing_is_caught_blindly() -> None:
    for path in FILES:
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
        ("exporters", "FORMAT"),
        ("data.layouts", "LAYOUT"),
        ("outputs", "OUTPUT"),
        ("tasks", "TASK"),
    ],
)
def test_each_file_of_a_folder_holds_exactly_one(folder: str, kind: str) -> None:
    package = import_module(f"tiedconv.{folder}")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    names = [name for name in names if (folder, name) != ("families", "inspect")]
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
        "exporters": all_formats,
        "data.layouts": all_layouts,
        "outputs": all_output_kinds,
        "tasks": all_tasks,
    }
    assert len(listing[folder]()) == len(names)


def test_schemes_and_families_are_what_they_should_be() -> None:
    for name, scheme in all_schemes().items():
        assert issubclass(scheme, Scheme)
        assert scheme.name == name
        assert scheme.pattern
        assert scheme() == scheme()  # every option has a default
        assert scheme.__doc__
    families = all_families()
    assert all(isinstance(f, Family) and f.pattern for f in families)
    assert len({f.name for f in families}) == len(families)
    assert [f.last for f in families] == sorted(f.last for f in families)


def test_all_that_is_public_is_there_and_documented() -> None:
    assert sorted(tiedconv.__all__) == list(tiedconv.__all__)
    for name in tiedconv.__all__:
        value = getattr(tiedconv, name)
        assert isinstance(value, str) or inspect.getdoc(value)


def test_the_api_page_documents_exactly_what_is_public() -> None:
    page = PACKAGE.parent / "docs" / "api.md"
    if not page.exists():
        pytest.skip("docs/api.md is not written yet")
    documented = re.findall(r"^### `tiedconv\.(\w+)", page.read_text("utf-8"), re.MULTILINE)
    assert sorted(documented) == sorted(tiedconv.__all__)


def test_importing_tiedconv_imports_no_heavy_library() -> None:
    heavy = ["torch", "numpy", "torchvision", "timm", "transformers", "typer", "rich", "scipy",
             "sklearn", "matplotlib", "PIL", "datasets", "webdataset", "tensorboard"]  # fmt: skip
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

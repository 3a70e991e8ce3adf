"""Commands in README and docs: each option exists, and each command that can be run here runs."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_helpers import run
from doc_blocks import PAGES, PROGRAMS, ROOT, Block, blocks, inline_code
from doc_world import make_doc_world, stand_in

from tiedconv.cli import app

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {
    verb: {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    for verb, command in COMMANDS.items()
}
# Options in the text of pages that are of other programs.
FOREIGN = {
    "--nnodes", "--nproc-per-node", "--multi_gpu", "--num_processes",  # torchrun, accelerate
    "--logdir",  # tensorboard
    "--order-seed",  # the tests
    "--version",  # of tiedconv itself
}  # fmt: skip
# Commands that do not run here, and why. All others do.
NOT_RUN = {
    r"^tiedconv push ": "uploads; tests/sources/test_repository.py uploads to a server of its own",
    r"hf:uoft-cs/cifar100": "downloads; tests/data reads such data sets from folders",
    r"mymodels:adamixer": "weights of 128 x 128; tests/schemes has the scheme at small sizes",
    r"--resume": "continues an interrupted run; tests/training interrupts some",
    r"^tiedconv demo$": "trains for minutes; tests/docs/test_tutorial.py runs it",
}
# Optional runtimes, without which a page's commands don't run.
RUNTIMES = {"edge.md": ("executorch", "coremltools")}
OF_BENCHMARKS = {
    option
    for path in (ROOT / "benchmarks").glob("*.py")
    for option in re.findall(r'"(--[a-z][\w-]*)"', path.read_text("utf-8"))
}
TUTORIAL = "tutorial.md"  # its commands run as they stand, in a test of its own
SHELL = [b for page in PAGES for b in blocks(page) if b.language == "sh"]
BY_PAGE = {page: [b for b in SHELL if b.page == page] for page in PAGES}


def tiedconv_commands(found: list[Block]) -> list[list[str]]:
    return [c for b in found for c in b.commands if c[0] == "tiedconv"]


@pytest.mark.parametrize("block", SHELL, ids=lambda b: b.name)
def test_each_command_is_one_that_exists(block: Block) -> None:
    for command in block.commands:
        program = command[0].split("/")[-1]
        assert program in PROGRAMS, command
        {
            "tiedconv": _parsed, "torchrun": _launched, "pip": _installed, "python": _script,
            "make": _made, "hf": lambda _: None,  # another project's program
        }[program](command)  # fmt: skip


def _parsed(command: list[str]) -> None:
    verb, *words = command[1:]
    words = ["90%" if w == "BUDGET" else w for w in words]
    COMMANDS[verb].make_context(verb, words)


def _launched(command: list[str]) -> None:
    at = command.index("-m")
    assert {w for w in command[:at] if w.startswith("--")} <= FOREIGN
    _parsed(command[at + 1 :])


def _installed(command: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for word in command[2:]:
        if word.endswith(".txt"):
            assert (ROOT / word).is_file()
        elif match := re.fullmatch(r"(?:tiedconv|\.)\[([\w,-]+)\]", word):
            assert set(match[1].split(",")) <= set(extras["optional-dependencies"])
        else:
            assert word in ("-r", "."), command


def _script(command: list[str]) -> None:
    """A program of the repository, whose options stand in it or in what it shares."""
    script = ROOT / command[1]
    texts = [p.read_text("utf-8") for p in {script, *script.parent.glob("*.py")}]
    for word in command[2:]:
        assert not word.startswith("--") or any(f'"{word}"' in text for text in texts), word


def _made(command: list[str]) -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    assert all(re.search(rf"^{target}:", text, re.MULTILINE) for target in command[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_in_the_text_exist(page: Path) -> None:
    every = set().union(*OPTIONS.values()) | FOREIGN
    for code in inline_code(page):
        of_benchmarks = page.name in ("results.md", "zoo.md") or code.startswith("python bench")
        known = every | (OF_BENCHMARKS if of_benchmarks else set())
        if (match := re.match(r"tiedconv ([a-z]+)\b", code)) and match[1] in COMMANDS:
            known = OPTIONS[match[1]]
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert option in known, (page.name, code)


def why_not(command: list[str]) -> str | None:
    text = " ".join(command)
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, text)), None)


def test_each_exception_is_needed() -> None:
    every = [" ".join(c) for c in tiedconv_commands(SHELL)]
    assert all(any(re.search(pattern, text) for text in every) for pattern in NOT_RUN)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("timm", "transformers", "onnx", "openvino", "pycocotools", "sklearn"):
        pytest.importorskip(package)
    root = tmp_path_factory.mktemp("docs") / "world"
    root.mkdir()
    make_doc_world(root)
    return root


RUN = [p for p in PAGES if p.name != TUTORIAL and tiedconv_commands(BY_PAGE[p])]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda p: p.name)
def test_the_commands_of_a_page_run_in_their_order(
    page: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With small models, images and budgets in place of those that the page names; each section
    begins in a folder of its own.
    """
    for package in RUNTIMES.get(page.name, ()):
        pytest.importorskip(package)
    headings = [found.start() for found in re.finditer("^## ", page.read_text("utf-8"), re.M)]
    lines = [page.read_text("utf-8").count("\n", 0, start) + 1 for start in headings]
    for block in BY_PAGE[page]:
        folder = tmp_path / str(sum(line < block.line for line in lines))
        if not folder.exists():
            shutil.copytree(made, folder)
        monkeypatch.chdir(folder)
        for command in tiedconv_commands([block]):
            if why_not(command) is None:
                run(*stand_in(command))

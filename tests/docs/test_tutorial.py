"""The tutorial, run as it is printed, in an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from doc_blocks import ROOT, Block, blocks

PAGE = ROOT / "docs" / "tutorial.md"
BLOCKS = blocks(PAGE)
# Lines that may read otherwise elsewhere: which form a search takes for a group of layers follows
# from last digits, and so does the step at which a training was best.
UNSTABLE = re.compile(
    r"^(\S+\.\* .*|conv_proj.*|other weights.*|kept as it was.*)$"  # rows of groups
    r"|^(Kept as it was|Ended with).* where its loss|^The start was kept"
)


def steps() -> Iterator[tuple[Block, str]]:
    """Each block that is run, and the output that the page prints for it, if any."""
    for block, after in pairwise([*BLOCKS, BLOCKS[-1]]):
        if block.language in ("sh", "python"):
            yield block, after.text if after.language == "text" else ""


def test_there_are_six_steps_after_the_demo() -> None:
    run = [block for block, _ in steps() if not block.text.startswith("pip ")]
    assert [b.language for b in run] == ["sh"] * 6 + ["python"]
    assert all(len(b.commands) == 1 for b in run if b.language == "sh")
    assert len(re.findall(r"^## \d\. ", PAGE.read_text("utf-8"), re.MULTILINE)) == 6


@pytest.mark.slow
def test_the_tutorial_runs_as_printed(tmp_path: Path) -> None:
    for package in ("sklearn", "matplotlib", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    said: dict[str, str] = {}
    for block, printed in steps():
        if block.text.startswith("pip "):
            continue  # what it installs is there
        words = ["-c", block.text] if block.language == "python" else _module(block.commands[0])
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (block.name, done.stdout, done.stderr)
        _is_as_printed(printed, done.stdout, block.name)
        said[block.text.split()[1]] = done.stdout
    share = re.search(r"Wrote compact\.safetensors \([\d.]+ kB, ([\d.]+) % of", said["convert"])
    assert share is not None
    assert 9.0 < float(share[1]) <= 10.0
    dense = re.search(r"^vit, dense .* ([\d.]+) %$", said["demo"], re.MULTILINE)
    end = re.search(r"^top-1 ([\d.]+)%", said["tiedconv"], re.MULTILINE)
    assert dense is not None
    assert end is not None
    assert float(end[1]) > float(dense[1]) - 2.0
    names = {"compact.safetensors", "finetuned.safetensors", "report.html", "model.onnx"}
    assert names <= {path.name for path in tmp_path.iterdir()}


def _module(command: list[str]) -> list[str]:
    assert command[0] == "tiedconv"
    return ["-m", *command]


def _is_as_printed(printed: str, said: str, where: str) -> None:
    """Each stable line of the page is there, in this order; numbers aside."""
    found = iter([_masked(line) for line in said.splitlines()])
    for line in printed.splitlines():
        if line != "..." and not UNSTABLE.search(line):
            masked = _masked(line)
            assert masked in found, f"{where} prints no {line!r} at its place:\n{said}"


def _masked(line: str) -> str:
    """A line without its numbers, widths of columns and lengths of rules."""
    line = re.sub(r"─+", "─", line)
    line = re.sub(r"\d[\d,.]*(?:e[+-]?\d+)?", "#", line)
    line = re.sub(r"# [kM]?B\b", "# B", line)
    return " ".join(line.split())

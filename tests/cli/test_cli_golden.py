"""What the commands print, to the letter.

After a wanted change: `TIEDCONV_UPDATE_GOLDEN=1 pytest tests/test_cli_golden.py`, then read the
difference before it is committed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from cli_helpers import MODEL_ARGS, SPEC, World, plain, run

GOLDEN = Path(__file__).parent / "golden"
WIDEST = 120  # characters, of a table


def check(name: str, text: str) -> None:
    """Compare with `golden/<name>`, or write it if asked to."""
    path = GOLDEN / name
    if os.environ.get("TIEDCONV_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    assert text == path.read_text("utf-8")


def output_of(*arguments: object) -> str:
    """Standard output without what differs from machine to machine."""
    text = plain(run(*arguments).stdout)
    text = re.sub(r"(- made with ).*", r"\1...", text)
    text = re.sub(r"\b0\.\d{3}\b", "0.###", text)  # errors of fits
    return re.sub(r"the file takes up [\d.]+ kB, [\d.]+ %", "the file takes up ..., ... %", text)


def tables(text: str) -> list[str]:
    """The lines of the table of groups."""
    lines = text.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("──"))
    last = next(i for i, line in enumerate(lines) if line.startswith("whole model"))
    return lines[rule - 1 : last + 1]


@pytest.mark.parametrize("model", ["resnet50", "vit_b_16"])
def test_dry_run(model: str) -> None:
    text = output_of("convert", model, "--scheme", "tied", "--dry-run")
    assert max(map(len, tables(text))) <= WIDEST
    check(f"dry-run-{model}.txt", text)


def test_dry_run_with_a_budget() -> None:
    check(
        "dry-run-lors.txt",
        output_of("convert", "timm:deit_tiny_patch16_224", "--scheme", "lors", "--params", "50%",
             "--dry-run"),
    )  # fmt: skip


def test_dry_run_as_json() -> None:
    check(
        "dry-run-tiny.json",
        output_of(
            "convert", SPEC, *MODEL_ARGS, "--scheme", "tied", "--rank", 2, "--dry-run", "--json"
        ),
    )


def test_report(world: World) -> None:
    text = output_of("report", world.tied)
    assert max(map(len, tables(text))) <= WIDEST
    check("report-tiny.txt", text)


def test_report_as_markdown(world: World) -> None:
    check("report-tiny.md", output_of("report", world.tied, "--format", "md", "--all-groups"))

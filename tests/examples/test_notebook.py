"""The notebook runs from its first cell to its last, and is committed with what it then shows."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tiedconv.ipynb"


def shown(cell: Any) -> str:
    """What a cell shows, without numbers and rows of tables, which follow from last digits."""
    texts = [out.get("text") or out["data"].get("text/html", "") for out in cell["outputs"]]
    text = re.sub(r"\d[\d,.]*", "#", "".join("".join(text) for text in texts))
    return re.sub(r"(?s)<t(?:head|body)>.*?</t(?:head|body)>", "", text)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of the kernel's own packages
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    for package in ("ipykernel", "sklearn"):
        pytest.importorskip(package)
    # The kernel is a process of its own, in an empty folder.
    paths = [str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    committed, again = (nbformat.read(NOTEBOOK, 4) for _ in range(2))
    nbformat.validate(committed)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(again, timeout=600, kernel_name="python3", resources=where).execute()
    for one, other in zip(code_cells(committed), code_cells(again), strict=True):
        if "print(report)" not in one.source:  # rows follow from the search
            assert shown(one) == shown(other), one.source
    assert list(tmp_path.iterdir()) == []


def test_the_notebook_is_small_and_shows_its_outputs() -> None:
    text = NOTEBOOK.read_text("utf-8")
    assert len(text) < 40_000
    assert not re.search(r"/(tmp|home|root|Users)/", text)
    outputs = "".join(shown(cell) for cell in code_cells(json.loads(text)))
    assert "<table>" in outputs
    assert "the same outputs, bit for bit" in outputs

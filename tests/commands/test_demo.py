"""The demo: every file it leaves is whole and says what was done."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiedconv
from tiedconv.commands.demo import MODELS, run_demo

pytest.importorskip("sklearn", reason="the demo needs the extra demo")
pytest.importorskip("matplotlib", reason="the demo needs the extra demo")


@pytest.mark.slow
def test_the_demo_trains_converts_finetunes_and_reports(tmp_path: Path) -> None:
    progress: list[tuple[float, float, str]] = []
    done = run_demo(tmp_path / "out", quick=True, on_stage=lambda *what: progress.append(what))
    assert len(done.rows) == sum(1 + len(recipes) for _, _, recipes in MODELS.values())
    assert len({what for _, _, what in progress}) == len(done.stages) == 2 + len(done.rows)
    assert [work for work, _, _ in progress] == sorted(work for work, _, _ in progress)
    assert progress[-1][0] == pytest.approx(progress[-1][1])
    assert "vit at 25 %" in done.title
    assert done.test_images == 355
    assert done.picture.read_bytes().startswith(b"\x89PNG")
    for row in done.rows:
        assert row.path.stat().st_size == row.file_bytes
        if row.converted is None:
            continue
        report = tiedconv.report(row.path)
        assert report.stored == row.parameters
        assert report.top1 == row.finetuned
        assert row.ratio < 0.65
        assert [entry["step"] for entry in report.history] == ["convert", "finetune"]
        assert all(check.passed for check in tiedconv.verify(row.path))
    assert not list((tmp_path / "out").glob("*.run"))
    assert not list((tmp_path / "out").glob(".*.part"))

"""Files are moved into place complete, and the folder is synced after the move."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tiedconv.errors import OutputError
from tiedconv.io.atomic import replacing, replacing_files


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was synced, in order: "file" or the names in a folder at that moment."""
    seen: list[str] = []
    original = os.fsync

    def record(handle: int) -> None:
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        seen.append(" ".join(sorted(os.listdir(handle))) if folder else "file")
        original(handle)

    monkeypatch.setattr(os, "fsync", record)
    return seen


def visible(names: str) -> list[str]:
    return [name for name in names.split() if not name.startswith(".")]


@pytest.mark.skipif(os.name == "nt", reason="Windows does not open folders")
@pytest.mark.parametrize("force", [False, True])
def test_the_folder_is_synced_after_the_file_is_in_place(
    force: bool, tmp_path: Path, synced: list[str]
) -> None:
    with replacing(tmp_path / "a.txt", force=force) as temp:
        temp.write_text("x")
        assert synced == []
    assert len(synced) == 2
    assert synced[0] == "file"
    assert visible(synced[1]) == ["a.txt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows does not open folders")
def test_the_folder_is_synced_after_several_files_are_in_place(
    tmp_path: Path, synced: list[str]
) -> None:
    with replacing_files(tmp_path / "b.onnx") as folder:
        (folder / "b.onnx").write_text("x")
        (folder / "b.onnx.data").write_text("y")
    assert synced[:2] == ["file", "file"]
    assert visible(synced[2]) == ["b.onnx", "b.onnx.data"]
    assert len(synced) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.onnx", "b.onnx.data"]


@pytest.mark.parametrize("fails", ["open", "fsync"])
def test_systems_that_do_not_sync_folders_are_tolerated(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original_open, original_fsync = os.open, os.fsync

    def no_folder(path: str | Path, *rest: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied")
        return original_open(path, *rest)

    def no_sync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        original_fsync(handle)

    monkeypatch.setattr(os, fails, no_folder if fails == "open" else no_sync)
    with replacing(tmp_path / "a.txt") as temp:
        temp.write_text("x")
    assert (tmp_path / "a.txt").read_text() == "x"


def test_a_file_that_can_not_be_synced_is_not_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    (tmp_path / "a.txt").write_text("old")
    with (
        pytest.raises(OutputError) as caught,
        replacing(tmp_path / "a.txt", force=True) as temp,
    ):
        temp.write_text("new")
    assert caught.value.code == "output-not-written"
    assert (tmp_path / "a.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1

"""The folder of an interrupted run: what is the run's own goes, what is others' stays."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from error_codes import raises

from tiedconv.errors import UserError
from tiedconv.io.atomic import replacing
from tiedconv.io.run_dir import CALIBRATION, CURVE, FIT, RunDir

OWN = [
    "step-000000012.safetensors",
    "step-000000012.pt",
    CURVE,
    CALIBRATION,
    f"1/{CALIBRATION}",
    FIT,
    f"0/{FIT}",
]


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    made = RunDir.beside(tmp_path / "out.safetensors")
    for part in ("0", "1"):
        (made.path / part).mkdir(parents=True)
    return made


def killed_while_writing(path: Path) -> None:
    child = os.fork()
    if child == 0:
        with replacing(path, force=True):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.skipif(os.name == "nt", reason="forks and signals are those of POSIX")
@pytest.mark.parametrize("name", OWN)
def test_what_a_killed_process_was_writing_goes(folder: RunDir, name: str) -> None:
    killed_while_writing(folder.path / name)
    assert [p for p in folder.path.rglob("*") if p.is_file()]
    assert folder.kept() == []
    folder.close()
    assert not folder.path.exists()


@pytest.mark.parametrize("name", OWN)
def test_only_what_a_run_keeps_is_removed(folder: RunDir, name: str) -> None:
    (folder.path / name).touch()
    (folder.path / "notes.txt").touch()
    (folder.path / ".notes.txt.part").touch()
    folder.close()
    assert (folder.path / name).exists()
    folder.clear()
    assert {p.name for p in folder.path.iterdir()} == {"notes.txt", ".notes.txt.part"}


def test_what_can_be_gone_on_from_is_named(folder: RunDir) -> None:
    folder.require_new()
    (folder.path / CURVE).touch()
    folder.require_new()  # a picture's points are nothing to go on from
    (folder.path / OWN[0]).touch()
    with raises(UserError, "run-interrupted"):
        folder.require_new()


def test_a_folder_that_is_not_there_is_no_trouble(tmp_path: Path) -> None:
    folder = RunDir.beside(tmp_path / "out.safetensors")
    assert folder.kept() == []
    folder.require_new()
    folder.clear()

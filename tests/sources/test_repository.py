"""Compact files on the hub: pushed with a card, fetched, loaded. The hub is a folder here."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from cli_helpers import World, plain, refused, run
from error_codes import raises

import tiedconv
from tiedconv.errors import CheckpointError, OutputError
from tiedconv.sources.repository import FILE


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the client's calls read and write in place of the hub."""
    root = tmp_path / "hub"

    def create_repo(self: Any, repo_id: str, **options: Any) -> None:
        (root / repo_id).mkdir(parents=True, exist_ok=True)
        (root / repo_id / "private").write_text(str(options["private"]))

    def create_commit(self: Any, repo_id: str, operations: Any, **_: Any) -> Any:
        for each in operations:
            given = each.path_or_fileobj
            data = given if isinstance(given, bytes) else Path(given).read_bytes()
            (root / repo_id / each.path_in_repo).write_bytes(data)
        return SimpleNamespace(commit_url=f"commit of {repo_id}")

    def download(repo_id: str, name: str, revision: str | None = None) -> str:
        path = root / repo_id / (revision or "") / name
        if not path.exists():
            raise FileNotFoundError(f"404: no {name} in {repo_id}")
        return str(path)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return root


def test_what_is_pushed_is_loaded(hub: Path, world: World) -> None:
    shown = plain(run("push", world.tied, "me/small", "--license", "mit", "--private").output)
    assert "commit of me/small" in shown
    assert (hub / "me/small" / FILE).read_bytes() == world.tied.read_bytes()
    assert (hub / "me/small/private").read_text() == "True"
    back, model = tiedconv.load("hub:me/small"), tiedconv.load(world.tied)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(back(x), model(x))
    assert tiedconv.transform("hub:me/small") == tiedconv.transform(world.tied)
    assert (hub / "me/small/README.md").read_text() == tiedconv.card(
        world.tied, repository="me/small", license="mit"
    )


def test_a_revision_is_another_file(hub: Path, world: World) -> None:
    tiedconv.push(world.tied, "me/small")
    (hub / "me/small/v1").mkdir()
    shutil.copy(hub / "me/small" / FILE, hub / "me/small/v1")
    assert tiedconv.load("hub:me/small@v1")
    with raises(CheckpointError, "repository-unreadable"):
        tiedconv.load("hub:me/small@v2")


@pytest.mark.parametrize(
    ("name", "code"),
    [("hub:small", "repository-invalid"), ("hub:me/other", "repository-unreadable")],
)
def test_a_repository_that_is_none_is_told(name: str, code: str, hub: Path) -> None:
    with raises(CheckpointError, code):
        tiedconv.load(name)


def test_a_hub_that_refuses_is_one_line(
    hub: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("401: log in")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    refused("push", world.tied, "me/small", error_code="push-failed")
    with raises(OutputError, "push-failed"):
        tiedconv.push(world.tied, "me/small")


def test_nothing_damaged_is_pushed(hub: Path, world: World, tmp_path: Path) -> None:
    broken = tmp_path / "b.safetensors"
    broken.write_bytes(world.tied.read_bytes()[:1000])
    with pytest.raises(CheckpointError):
        tiedconv.push(broken, "me/small")
    assert not hub.exists()


def test_a_card_says_what_the_file_records(world: World, tmp_path: Path) -> None:
    tuned = tmp_path / "t.safetensors"
    words = ("--teacher", "none", "--steps", 2, "--batch-size", 4, "--workers", 0, "--no-picture")
    run("finetune", world.tied, "--data", world.data, "-o", tuned, "--device", "cpu", *words)
    text, told = run("card", tuned, "--license", "mit").output, tiedconv.report(tuned)
    front = text.split("---")[1]
    assert "license: mit" in front
    assert "base_model" not in front  # weights of a file: no repository is known
    assert f"{told.original:,}" in text
    assert f"{told.file_bytes:,}" in text
    assert told.top1 is not None
    assert f"Top-1 {100 * told.top1:.2f} %" in text
    assert "tiedconv convert" in text
    assert "tiedconv finetune" in text
    assert str(tmp_path) not in text
    assert "Nothing was measured" in tiedconv.card(world.tied)

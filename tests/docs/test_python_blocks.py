"""Python in README and docs runs as it stands, block after block, with small stand-ins."""

from __future__ import annotations

import ast
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import run, tiny_images, tiny_model
from doc_blocks import PAGES, Block, blocks
from doc_world import make_doc_world
from safetensors import safe_open
from torch import nn
from torch.utils.data import TensorDataset

BLOCKS = {p: [b for b in blocks(p) if b.language == "python"] for p in PAGES}
# Pages whose blocks do not run here, and why. All others do.
NOT_RUN = {
    "api.md": "signatures, made by scripts/api_docs.py; tests/test_contributing.py compares them",
    "tutorial.md": "runs with the commands before it, in tests/docs/test_tutorial.py",
}
# A block that needs what can't be had here, by a part of it.
NOT_RUN_BLOCKS = {
    'tiedconv.load("hub:USER/NAME")': "downloads; tests/sources/test_repository.py has a server",
    "from executorch.runtime": "an optional runtime; tests/exporters/test_edge.py runs it",
    "coremltools.models.MLModel": "runs on Apple's devices alone",
    "import tensorrt": "needs a GPU",
}


def _classifier() -> dict[str, Any]:
    """What a reader has: a model, images, labels, a loss."""
    return {
        "my_model": tiny_model(), "images": tiny_images(), "labels": torch.tensor([0, 1, 2, 0]),
        "loss": nn.functional.cross_entropy,
        "photos": TensorDataset(torch.randn(16, 3, 32, 32), torch.zeros(16)),
    }  # fmt: skip


def _exported() -> dict[str, Any]:
    run("export", "tied.safetensors", "-o", "model.onnx", "--force")
    return {"images": tiny_images().numpy()}


def _two_towers() -> dict[str, Any]:
    from towers import clip, pairs

    samples = pairs(8)

    def processor(text: Any, images: Any = None, **_: Any) -> dict[str, Any]:
        if images is None:
            ids = torch.tensor([s["input_ids"] for s in samples[: len(text)]])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        sample = samples[text]
        return {n: sample[n] for n in ("pixel_values", "input_ids", "attention_mask")}

    return {
        "clip": clip(), "processor": processor, "names": ["red", "blue"],
        "pairs": [(i, "a photo") for i in range(len(samples))],
    }  # fmt: skip


# Words of blocks that stand for what a reader has: published weights, and a budget for them.
WORDS = {'"timm:tf_efficientnet_lite0", bytes="14%"': '"doc_world:small_vit", bytes="70%"'}
STAND_INS: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": _classifier,
    "how-to.md": _classifier,
    "deployment.md": _exported,
    "outputs.md": _two_towers,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("timm", "transformers", "onnxruntime", "webdataset"):
        pytest.importorskip(package)
    root = tmp_path_factory.mktemp("docs") / "world"
    root.mkdir()
    make_doc_world(root)
    (root / "shards").mkdir()
    return root


def why_not(block: Block) -> str | None:
    found = (why for part, why in NOT_RUN_BLOCKS.items() if part in block.text)
    return NOT_RUN.get(block.page.name) or next(found, None)


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCKS[p]], ids=lambda p: p.name)
def test_each_block_is_python(page: Path) -> None:
    for block in BLOCKS[page]:
        text = f"def {block.text.rstrip()}: ..." if page.name == "api.md" else block.text
        ast.parse(text, block.name)


def test_each_exception_is_needed() -> None:
    every = [block for found in BLOCKS.values() for block in found]
    assert all(any(part in block.text for block in every) for part in NOT_RUN_BLOCKS)
    assert all(any(word in block.text for block in every) for word in WORDS)
    assert all(any(block.page.name == name for block in every) for name in NOT_RUN)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(not why_not(b) for b in BLOCKS[p])], ids=lambda p: p.name
)
def test_the_blocks_of_a_page_run(
    page: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    namespace = {"__name__": "a_page", **STAND_INS.get(page.name, dict)()}
    for block in BLOCKS[page]:
        if why_not(block) is None:
            Path("compact.safetensors").unlink(missing_ok=True)
            text = block.text
            for word, instead in WORDS.items():
                text = text.replace(word, instead)
            exec(compile(text, block.name, "exec"), namespace)
    LEFT.get(page.name, lambda _: None)(namespace)


def _shards_hold_all_photos(_: dict[str, Any]) -> None:
    written = 0
    for shard in Path("shards").glob("*.tar"):
        with tarfile.open(shard) as file:
            written += sum(name.endswith(".jpg") for name in file.getnames())
    assert written == len(list(Path("photos/train").rglob("*.jpg"))) > 0


def _a_session_ran(namespace: dict[str, Any]) -> None:
    assert namespace["logits"].shape == (4, 3)


def _embeddings_are_written(_: dict[str, Any]) -> None:
    with safe_open("classes.safetensors", "pt") as file:
        assert file.get_tensor("classes").shape == (2, 16)


# What the blocks of a page have made.
LEFT: dict[str, Callable[[dict[str, Any]], None]] = {
    "data.md": _shards_hold_all_photos,
    "deployment.md": _a_session_ran,
    "outputs.md": _embeddings_are_written,
}

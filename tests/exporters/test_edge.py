"""Files for phones: each stored tensor is in them once, and they give the same outputs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import figures, refused, run
from covering import slow_unless
from error_codes import raises
from export_helpers import MODEL_ARGS, SPEC, with_image_size
from micro import all_micros
from torch import nn

import tiedconv
from tiedconv.errors import CheckpointError, UserError
from tiedconv.exporters import Job, all_formats
from tiedconv.exporters._format import stored_bytes
from tiedconv.exporters._one_image import apply_all_factors, one_image_program
from tiedconv.runtime.outputs import ONLY, named_outputs

WAYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tied": ("timm-vit", "tied", {}),
    "lors": ("timm-vit", "lors", {"rank": 2}),
    "lowrank": ("torchvision-vit", "lowrank", {"rank": 3}),
    "shared": ("timm-vit", "shared", {}),
    "basis, tied": ("hf-vit", "basis", {"tie": True, "params": "75%"}),
    "kernels tied": ("torchvision-resnet", "tied", {}),
    "kernels low rank": ("timm-resnet", "lowrank", {"rank": 3}),
    "kernels lors": ("torchvision-resnet", "lors", {"rank": 2}),
    "kernels shared": ("torchvision-resnet", "shared", {}),
}


def has(name: str) -> bool:
    try:
        all_formats()[name].check()
    except UserError:
        return False
    return True


executorch = pytest.mark.skipif(not has("executorch"), reason="ExecuTorch is not installed")
coreml = pytest.mark.skipif(not has("coreml"), reason="coremltools is not installed")


def made(way: str) -> tuple[nn.Module, torch.Tensor]:
    name, scheme, options = WAYS[way]
    micro = all_micros()[name]
    model = tiedconv.convert(micro.model(), scheme, **options).eval()
    return model, torch.randn(2, *micro.input().shape[1:])


@pytest.mark.parametrize("way", ["tied", "kernels low rank"])
def test_the_program_for_one_image_reads_each_tensor_as_it_is_stored(way: str) -> None:
    model, images = made(way)
    with torch.no_grad():
        expected = named_outputs(model(images[:1]))[ONLY]
    apply_all_factors(model)
    program = one_image_program(model, images, (ONLY,))
    found = program.module()(images[:1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    given = set(program.graph_signature.user_inputs)
    stored = [n for n in program.graph.nodes if n.op == "placeholder" and n.name not in given]
    moves = ("view", "reshape", "permute", "transpose")
    alone = [next(iter(node.users)) for node in stored if len(node.users) == 1]
    assert not [node for node in alone if getattr(node.target, "_opname", None) in moves]


@executorch
@pytest.mark.parametrize("way", slow_unless(WAYS, ("tied", "kernels shared")))
def test_executorch_holds_each_tensor_once(way: str, tmp_path: Path) -> None:
    form = all_formats()["executorch"]
    model, images = made(way)
    with torch.no_grad():
        expected = named_outputs(model(images))[ONLY]
    stored = stored_bytes(model, "float32")
    job = Job(copy.deepcopy(model), images, tmp_path, "m.pte", (ONLY,))
    written = form.write(job)
    assert written.weight_bytes == form.held_bytes(job.path) <= 1.02 * stored
    assert written.facts["delegated"] > 0
    found = form.run(job.path, images)
    torch.testing.assert_close(found[ONLY], expected, rtol=1e-4, atol=1e-4)
    damaged = tmp_path / "d.pte"
    damaged.write_bytes(job.path.read_bytes()[:100])
    with raises(CheckpointError, "file-damaged"):
        form.tensors(damaged)


@coreml
@pytest.mark.parametrize(
    "way", slow_unless(("tied", "lors", "lowrank", "kernels low rank"), ("tied",))
)
def test_core_ml_holds_each_tensor_once(way: str, tmp_path: Path) -> None:
    form = all_formats()["coreml"]
    model, images = made(way)
    stored = stored_bytes(model, "float32")
    job = Job(copy.deepcopy(model), images, tmp_path, "m.mlpackage.zip", (ONLY,))
    form.write(job)
    assert form.held_bytes(job.path) <= 1.05 * stored
    assert form.why_not_run()
    damaged = tmp_path / "d.zip"
    damaged.write_bytes(b"PK")
    with raises(CheckpointError, "file-damaged"):
        form.tensors(damaged)


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edge") / "m.safetensors"
    model = tiedconv.convert(SPEC, "tied", model_args=MODEL_ARGS, weights="none")
    tiedconv.save(with_image_size(model), path)
    return path


@executorch
def test_executorch_by_the_commands(compact: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pte"
    wrote = figures("export", compact, "-o", path)
    assert wrote["format"] == "executorch"
    assert wrote["difference"] < 1e-4
    checks = figures("verify", compact, "--against", path)["checks"]
    assert all(check["passed"] for check in checks)
    rows = figures("bench", compact, "--runtime", "executorch", "--rounds", 3)["rows"]
    assert [row["model"] for row in rows] == ["dense", "compact"]


@coreml
def test_core_ml_by_the_commands(compact: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.mlpackage.zip"
    wrote = figures("export", compact, "--to", "coreml", "-o", path)
    assert wrote["difference"] is None
    assert "Apple" in wrote["not_checked"]
    told = run("verify", compact, "--against", path, "--json", code=3).stdout
    checks = json.loads(told)["checks"]
    assert [c["name"] for c in checks if c["passed"] is None] == ["outputs"]


@pytest.mark.parametrize("name", ["tflite", "litert", "tensorrt", "mlmodel", "torchscript"])
def test_who_asks_for_another_runtime_hears_what_to_do(
    compact: Path, name: str, tmp_path: Path
) -> None:
    told = refused(
        "export", compact, "-o", tmp_path / "m", "--to", name, error_code="unknown-format"
    )
    assert "docs/edge.md" in str(told) or name in ("mlmodel", "torchscript")


@pytest.mark.parametrize("name", ["executorch", "coreml"])
def test_images_and_text_at_once_are_refused(name: str, tmp_path: Path) -> None:
    model, images = made("tied")
    job = Job(model, images, tmp_path, "m", (ONLY,), text=torch.zeros(2, 4, dtype=torch.int64))
    with raises(UserError, "model-not-exportable"):
        all_formats()[name].write(job)

"""Exports of files with packed integers: ONNX and OpenVINO keep them, INT4 where they fit."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import MODEL_ARGS, SPEC, World, figures, run
from error_codes import raises

import tiedconv
from tiedconv.core.packed_codes import unpacked
from tiedconv.errors import VerifyError
from tiedconv.exporters import Job, all_formats
from tiedconv.runtime.dequantize import dequantized
from tiedconv.runtime.tie import state_of

pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")


@pytest.fixture(
    scope="module", params=["4", *(pytest.param(p, marks=pytest.mark.slow) for p in ("8", None))]
)
def rounded(
    world: World, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """The tiny ViT as integers: of 4 bits at most, of 8, and with low ranks."""
    path = tmp_path_factory.mktemp("integers") / "m.safetensors"
    bits = ["--bits", request.param] if request.param else []
    size = {"4": "18%", "8": "40%", None: "10%"}[request.param]
    weights = ("--weights", world.weights, "--bytes", size, *bits)
    run("convert", SPEC, *MODEL_ARGS, *weights, "-o", path)
    return path


def test_the_integers_are_those_of_the_file(rounded: Path) -> None:
    model = tiedconv.load(rounded)
    plan = state_of(model).plan
    codes = {n: unpacked(model.get_parameter(n).detach(), c.shape, c.bits)
             for n, c in plan.codes.items()}  # fmt: skip
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        floats, integers = dequantized(model)
        assert torch.allclose(floats(x), expected, atol=1e-6)
    assert Counter(t.values.numel() for t in integers.values()) == Counter(
        each.numel() for each in codes.values()
    )
    tables = [t for t in integers.values() if t.axis == 1]
    assert [t.values.ndim for t in tables] == [3]  # positions, which have a scale a token
    own = dict(floats.named_parameters())
    for name, found in integers.items():
        shape = [1] * found.values.ndim
        shape[found.axis] = -1
        rows = found.scales.reshape(shape)
        product = found.values.float() * rows
        product = product if found.columns is None else product * found.columns
        assert torch.allclose(own[name].detach().reshape(product.shape), product, rtol=1e-6)
        assert int(found.values.abs().max()) <= 2 ** (found.bits - 1)


@pytest.mark.parametrize("output", ["m.onnx", pytest.param("m.xml", marks=pytest.mark.slow)])
def test_they_stay_integers_and_give_the_same_outputs(
    rounded: Path, tmp_path: Path, output: str
) -> None:
    path = tmp_path / output
    wrote = figures("export", rounded, "-o", path)
    integers = dequantized(tiedconv.load(rounded))[1]
    assert wrote["facts"]["packed"] == len(integers)
    assert not wrote["facts"]["integers_as_floats"]
    assert wrote["difference"] < 1e-5
    assert wrote["weight_bytes"] < 0.6 * wrote["stored_bytes"]
    found = figures("verify", rounded, "--against", path)["checks"]
    checks = {check["name"]: check["detail"] for check in found}
    told = float(re.search(r"([\d.]+) x stored", checks["size"])[1])  # type: ignore[index]
    assert told == pytest.approx(wrote["weight_bytes"] / wrote["stored_bytes"], abs=1e-3)
    if output == "m.onnx":
        held = {n: v.const_value for n, v in ir.load(path).graph.initializers.items()}
        kinds = Counter(str(t.dtype) for n, t in held.items() if n in integers)
        assert kinds["INT4"] == sum(i.bits == 4 for i in integers.values())
        assert kinds["INT8"] == sum(i.bits == 8 for i in integers.values())


@pytest.mark.slow
def test_an_older_opset_has_no_int4(world: World, tmp_path: Path) -> None:
    model, path = tmp_path / "m.safetensors", tmp_path / "m.onnx"
    weights = ("--weights", world.weights, "--bytes", "18%", "--bits", 4)
    run("convert", SPEC, *MODEL_ARGS, *weights, "-o", model)
    wrote = figures("export", model, "-o", path, "--opset", 20)
    assert wrote["facts"]["opset"] == 20
    held = [v.const_value for v in ir.load(path).graph.initializers.values()]
    assert not any(str(t.dtype) == "INT4" for t in held)
    assert any(t.numpy().dtype == np.int8 for t in held)


@pytest.mark.slow
def test_a_format_without_integers_says_so(rounded: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    if all_formats()["pt2"].why_not_run() is not None:
        pytest.skip("pt2 can't be run")
    assert figures("export", rounded, "-o", path)["facts"]["integers_as_floats"]


@pytest.mark.parametrize("first", [0x80, 0x50])
def test_weights_that_begin_like_a_pickle_or_an_archive_are_opened(
    tmp_path: Path, first: int
) -> None:
    """One raw tensor in 256 begins with the byte that a pickle begins with."""

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            raw = np.zeros(64, dtype=np.uint8)
            raw[0], raw[1], raw[3] = first, 0x4B, 0x3F
            self.weight = torch.nn.Parameter(torch.from_numpy(raw.view(np.float32)).clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    program = torch.export.export(Linear(), (torch.ones(16),))
    program._example_inputs = None
    torch.export.save(program, tmp_path / "m.pt2")
    held = all_formats()["pt2"].tensors(tmp_path / "m.pt2")
    assert [t.numel() for t in held.values()] == [16]


def test_a_table_that_is_resized_first_stays_floats(tmp_path: Path) -> None:
    """As of DINOv2 at another size: of integers ONNX Runtime can't resize it."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=70, mlp_ratio=2
    )  # fmt: skip
    model = Dinov2Model(config).eval()
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    tied = tiedconv.convert(model, "auto", bytes="50%", bits=8).eval()
    images = torch.randn(1, 3, 42, 42)
    with torch.no_grad():
        expected = tied(images).last_hidden_state
    floats, integers = dequantized(tied)
    table = "embeddings.position_embeddings"
    assert integers[table].axis == 1
    job = Job(floats, images, tmp_path, "m.onnx", ("last_hidden_state",), integers=integers)
    form = all_formats()["onnx"]
    assert form.write(job).facts["packed"] == len(integers) - 1
    found = form.run(job.path, images)
    assert found is not None
    assert torch.allclose(found["last_hidden_state"], expected, atol=1e-4)


def test_an_export_that_does_not_run_is_an_error(
    rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(type(all_formats()["onnx"]), "run", fails)
    with raises(VerifyError, "export-does-not-run"):
        tiedconv.export(rounded, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())

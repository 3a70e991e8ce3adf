"""Exports stay as small as the compact file, and give the same logits."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from cli_helpers import World, figures, files_of, refused, run, write_images
from covering import slow_unless
from error_codes import raises
from export_helpers import MODEL_ARGS, SPEC, with_image_size
from micro import Micro, all_micros
from torch import Tensor, nn
from towers import bert, clip

import tiedconv
from tiedconv import exporters as exporting
from tiedconv.commands._reference import images_for, outputs_differ_by, outputs_of, reference
from tiedconv.commands.verify_export import _size as check_size
from tiedconv.errors import CheckpointError, UserError, VerifyError
from tiedconv.exporters import Job, _onnx_lower, all_formats
from tiedconv.exporters._format import stored_bytes
from tiedconv.exporters._onnx_lower import onnx_graph
from tiedconv.runtime.forward_check import further_inputs
from tiedconv.runtime.outputs import named_outputs
from tiedconv.runtime.tie import dense_state_dict, set_state, state_of
from tiedconv.sources import Source
from tiedconv.sources.models import source_of

WAYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tied": ("timm-vit", "tied", {}),
    "tied over a core": ("timm-vit", "tied", {"base_rank": 0.5}),
    "attention in one": ("torchvision-vit", "tied", {}),
    "lors": ("timm-vit", "lors", {"rank": 2}),
    "lors, bases": ("timm-vit", "lors", {"bases": 2, "rank": 0.1, "groups": "adjacent:3"}),
    "basis, tied": ("hf-vit", "basis", {"tie": True, "params": "75%"}),
    "lowrank": ("torchvision-vit", "lowrank", {"rank": 3}),
    "shared": ("timm-vit", "shared", {}),
    "narrow": ("timm-vit", "narrow", {}),
    "narrow kernels": ("torchvision-resnet", "narrow", {"width": 0.3}),
    "(in, out)": ("hf-imagegpt", "tied", {}),
    "kernels tied": ("torchvision-resnet", "tied", {}),
    "kernels low rank": ("timm-resnet", "lowrank", {"rank": 3}),
    "kernels lors": ("torchvision-resnet", "lors", {"rank": 2}),
    "grouped kernels": ("torchvision-resnext", "lowrank", {"rank": 2}),
    "kernels of a basis": ("torchvision-resnet", "basis", {"params": "85%"}),
}
IMAGES = {k: v for k, v in WAYS.items() if v[0] != "hf-imagegpt"}


def images_of(micro: Micro, count: int = 2) -> Tensor:
    shape = micro.input().shape[1:]
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(3))


def made(way: str) -> tuple[Micro, nn.Module]:
    name, scheme, options = WAYS[way]
    micro = all_micros()[name]
    return micro, tiedconv.convert(micro.model(), scheme, **options).eval()


def session(path: Path, **options: Any) -> ort.InferenceSession:
    chosen = ort.SessionOptions()
    chosen.log_severity_level = 3
    for name, value in options.items():
        setattr(chosen, name, value)
    return ort.InferenceSession(path, chosen, providers=["CPUExecutionProvider"])


def initializers(graph: ir.Graph) -> dict[str, np.ndarray]:
    return {n: v.const_value.numpy() for n, v in graph.initializers.items()}  # type: ignore[union-attr]


TRACE = _onnx_lower.trace
TRACED: dict[str, ir.Model] = {}


def trace_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a model of this way is traced once: it is slow, and alike for all lowerings."""

    def traced(*given: Any) -> ir.Model:
        if way not in TRACED:
            TRACED[way] = TRACE(*given)
        return TRACED[way].clone()

    monkeypatch.setattr(_onnx_lower, "trace", traced)


FAST = ("tied",)


@pytest.mark.parametrize("way", slow_unless(IMAGES, FAST))
def test_onnx_holds_each_stored_tensor_once_and_gives_the_same_logits(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    micro, model = made(way)
    plan = state_of(model).plan
    trace_once(way, monkeypatch)
    for lower in ("always", "never"):
        graph, lowered = onnx_graph(copy.deepcopy(model), {"images": images_of(micro)}, lower=lower)
        assert set(lowered.factored) | set(lowered.materialized) == plan.weights.keys()
        assert not (lower == "never" and lowered.factored)
        held = initializers(graph.graph)
        assert plan.factors.keys() <= held.keys()
        assert not plan.weights.keys() & held.keys()
        for name in plan.factors:
            mine, stored = held[name], model.get_parameter(name).detach().numpy()
            assert np.array_equal(np.sort(mine.ravel()), np.sort(stored.ravel()))
        assert sum(a.nbytes for a in held.values()) <= stored_bytes(model, "float32") + 1024
        ir.save(graph, tmp_path / "m.onnx")
        for count in (2, 3):  # any number of images
            x = images_of(micro, count)
            (found,) = session(tmp_path / "m.onnx").run(None, {"images": x.numpy()})
            with torch.no_grad():
                expected = micro.forward(model, x)
            assert torch.allclose(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["tied", "lors", "basis, tied"])
def test_with_factors_applied_nothing_is_left_for_onnx_runtime_to_double(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its optimised model holds what it keeps in memory."""
    micro, model = made(way)
    trace_once(way, monkeypatch)
    sizes = {}
    for lower in ("always", "never"):
        graph, _ = onnx_graph(copy.deepcopy(model), {"images": images_of(micro)}, lower=lower)
        ir.save(graph, tmp_path / "m.onnx")
        session(tmp_path / "m.onnx", optimized_model_filepath=str(tmp_path / "o.onnx"))
        held = initializers(ir.load(tmp_path / "o.onnx").graph)
        sizes[lower] = sum(a.nbytes for n, a in held.items() if a.ndim >= 2)
    stored = sum(t.nbytes for t in model.state_dict().values())
    assert sizes["always"] <= 1.02 * stored
    assert sizes["never"] > 1.1 * stored


@pytest.mark.slow
def test_auto_applies_where_it_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"tied": False, "lowrank": True, "lors": False, "kernels tied": False,
                "kernels low rank": True}  # fmt: skip
    for way, applied in expected.items():
        micro, model = made(way)
        trace_once(way, monkeypatch)
        _, lowered = onnx_graph(model, {"images": images_of(micro)}, lower="auto")
        assert bool(lowered.factored) == applied, way
    micro, model = made("tied")
    trace_once("tied", monkeypatch)
    for lower, one_copy in (("auto", False), ("always", True)):
        _, lowered = onnx_graph(copy.deepcopy(model), {"images": images_of(micro)}, lower=lower)
        assert lowered.one_copy == one_copy


# Files


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compact file of a tied ViT."""
    path = tmp_path_factory.mktemp("export") / "m.safetensors"
    model = tiedconv.convert(SPEC, "tied", model_args=MODEL_ARGS, weights="none")
    tiedconv.save(with_image_size(model), path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_each_format_of_the_folder_writes_checks_and_reports(compact: Path, here: Path) -> None:
    stored = stored_bytes(tiedconv.load(compact), "float32")
    for name, form in all_formats().items():
        output = f"{name}{form.endings[0]}"
        wrote = figures("export", compact, "-o", output, "--to", name)
        assert wrote["format"] == name
        beside = [f for f in here.iterdir() if f.stem == name]  # OpenVINO writes a pair
        assert wrote["size"] == sum(f.stat().st_size for f in beside)
        assert form.compact == (wrote["weight_bytes"] <= 1.02 * stored)
        if name == "dense":
            assert (wrote["difference"], wrote["not_checked"]) == (None, form.why_not_run())
        else:
            assert wrote["difference"] < 1e-4
            assert wrote["not_checked"] is None
        held = sum(t.nbytes for t in form.tensors(Path(output)).values())
        once = 1.01 if name == "openvino" else 1.0  # it stores equal small constants once
        assert wrote["weight_bytes"] <= held <= once * wrote["weight_bytes"]
    # Nothing else is left beside them.
    assert all(not f.startswith(".") for f in files_of(here))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("output", "dtype", "share", "off"),
    [("m.onnx", "float16", 0.5, 2e-2), ("m.onnx", "int8", 0.3, 0.1),
     ("m.xml", "float16", 0.5, 2e-2), ("m.safetensors", "float16", 0.5, 2e-2),
     ("m.safetensors", "bfloat16", 0.5, 5e-2)],
)  # fmt: skip
def test_narrower_weights_keep_the_ties(
    compact: Path, here: Path, monkeypatch: pytest.MonkeyPatch, output: str, dtype: str,
    share: float, off: float,
) -> None:  # fmt: skip
    to = ["--to", "compact"] if output.endswith("safetensors") else []
    wrote = figures("export", compact, "-o", output, "--dtype", dtype, *to)
    whole = stored_bytes(tiedconv.load(compact), "float32")
    assert wrote["weight_bytes"] <= 1.02 * stored_bytes(tiedconv.load(compact), dtype)
    assert wrote["weight_bytes"] < (share + 0.12) * whole  # norms and biases stay wide
    assert 0 < wrote["difference"] < off
    against = [output] if to else [compact, "--against", output]
    run("verify", *against)
    # Rounding explains a difference; what it does not explain is an error, however small.
    expected = reference(tiedconv.load(compact), images_for(tiedconv.load(compact)), dtype)
    assert expected.tolerance < 0.05
    form = type(all_formats()[wrote["format"]])
    plain = form.run

    def run_off(self: Any, path: Path, images: Tensor, text: Any) -> dict[str, Tensor]:
        logits, exact = plain(self, path, images)["logits"], expected.exact["logits"]
        return {"logits": logits + 1.5 * expected.tolerance * exact.abs().max().clamp(min=1.0)}

    monkeypatch.setattr(form, "run", run_off)
    command = ["export", compact, "-o", f"n.{output}", "--dtype", dtype, *to]
    refused(*(command if to else ["verify", *against]), error_code="outputs-differ", code=1)


class Flat(nn.Module):
    """It takes features rather than images."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 4)` to `(n, 4)`."""
        if self.error is not None:
            raise self.error
        return self.blocks(x)  # type: ignore[no-any-return]


def flat_file(path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> Path:
    """A compact file of it, whose source builds one that raises `error`."""
    model = tiedconv.convert(Flat(), "shared")
    set_state(model, source=Source("flat_models:build").to_json())
    tiedconv.save(model, path)
    module = ModuleType("flat_models")
    module.build = lambda: Flat(error)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flat_models", module)
    return path


def test_what_could_not_be_compared_is_reported(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = flat_file(here / "flat.safetensors", monkeypatch)
    command = ("export", file, "-o", "m.safetensors", "--to", "compact", "--trust-code")
    assert "Not checked: the outputs. The model can't take images" in run(*command).stdout
    wrote = figures(*command, "--force")
    assert wrote["difference"] is None
    assert "224 x 224" in wrote["not_checked"]
    found = json.loads(run("verify", file, "--trust-code", "--json", code=3).stdout)
    assert found["not_checked"] == ["outputs"]
    check = next(c for c in found["checks"] if c["name"] == "outputs")
    assert check["passed"] is None
    assert check["detail"].startswith("not checked: ")
    text = run("verify", file, "--trust-code", code=3).stdout
    assert "--   outputs  not checked: The model can't take images" in text
    assert text.endswith("5 checks passed, not checked: outputs.\n")
    # The model can't be built without --trust-code.
    found = figures("verify", file, "--allow-unchecked")
    assert found["not_checked"] == ["model"]


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("full"),
              RuntimeError("DefaultCPUAllocator: can't allocate memory"), KeyError("block")]
)  # fmt: skip
def test_a_lack_of_memory_or_a_bug_is_not_a_check_that_was_skipped(
    here: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    file = flat_file(here / "flat.safetensors", monkeypatch, error)
    with pytest.raises(type(error)):
        tiedconv.export(file, "m.safetensors", "compact", trust_code=True)
    with pytest.raises(type(error)):
        tiedconv.verify(file, trust_code=True)
    assert files_of(here) == {"flat.safetensors"}


def test_verify_uses_as_many_images_as_it_was_given(compact: Path, here: Path) -> None:
    write_images(here / "images", train=4, val=2)
    for count in (2, 5):
        checks = tiedconv.verify(compact, images=here / "images", count=count)
        outputs = [c.detail for c in checks if c.name == "outputs"]
        assert outputs[1].endswith(f"on {count} given images")


def test_equal_tensors_are_found_without_holding_their_bytes(here: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(512, 512, generator=generator) for i in range(8)}
    stored = sum(t.nbytes for t in tensors.values())
    tracemalloc.start()
    try:
        check_size(here, tensors, stored, stored)
        assert tracemalloc.get_traced_memory()[1] < tensors["t0"].nbytes
    finally:
        tracemalloc.stop()
    for twin in (tensors["t3"].clone(), tensors["t3"].T.contiguous()):
        with pytest.raises(VerifyError) as caught:
            check_size(here, {**tensors, "twin": twin}, stored, 2 * stored)
        assert caught.value.code == "tie-lost"
        assert "t3 and twin" in caught.value.what


def test_a_half_precision_file_loads_to_float32(compact: Path, here: Path) -> None:
    tiedconv.export(compact, "h.safetensors", "compact", dtype="float16")
    model = tiedconv.load("h.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    whole = tiedconv.load(compact)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, whole.state_dict()[name], rtol=1e-3, atol=1e-6)
    assert "float16" in run("report", "h.safetensors").stdout


READER = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tiedconv", "timm", "transformers", "torchvision"}:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
"""
READERS = {
    "m.pt2": "import torch\nx, y = torch.load('xy.pt')\n"
    "found = torch.export.load('m.pt2').module()(x)\n",
    "m.onnx": "import torch, onnxruntime\nx, y = torch.load('xy.pt')\n"
    "found = torch.from_numpy(onnxruntime.InferenceSession('m.onnx')"
    ".run(None, {'images': x.numpy()})[0])\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("output", READERS)
def test_files_run_where_there_is_no_tiedconv(compact: Path, here: Path, output: str) -> None:
    tiedconv.export(compact, output)
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.save((x, tiedconv.load(compact)(x)), "xy.pt")
    code = f"{READER}{READERS[output]}assert torch.allclose(found, y, atol=1e-4), (found, y)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_large_models_keep_their_tensors_beside(
    compact: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiedconv.exporters.onnx.EXTERNAL_ABOVE", 1000)
    wrote = figures("export", compact, "-o", "m.onnx")
    assert files_of(here) == {"m.onnx", "m.onnx.data"}
    assert wrote["difference"] < 1e-4
    assert wrote["size"] == sum(f.stat().st_size for f in here.iterdir())
    run("verify", compact, "--against", "m.onnx")


# Errors


def test_what_can_not_be_exported_is_refused(compact: Path, here: Path) -> None:
    for output, options, code in (
        ("m.bin", [], "format-not-named"),
        ("m.onnx", ["--to", "tflite"], "unknown-format"),
        ("m.pth", ["--to", "onnx"], "extension-mismatch"),
        ("m.pt2", ["--dtype", "int8"], "dtype-unsupported"),
        ("m.onnx", ["--dtype", "int4"], "unknown-dtype"),
        ("m.onnx", ["--lower", "some"], "unknown-lower"),
    ):
        refused("export", compact, "-o", output, *options, error_code=code)
    assert not files_of(here)


@pytest.mark.parametrize("error", [AssertionError(), KeyError("x"), RuntimeError("a\nb")])
def test_what_torch_can_not_export_is_reported(
    compact: Path, here: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("torch.export.export", failing)
    refused("export", compact, "-o", "m.pt2", error_code="model-not-exportable")
    assert not files_of(here)


def test_a_missing_package_is_named(
    compact: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(
        "export",
        compact,
        "-o",
        "m.onnx",
        error_code="missing-extra",
        words=["pip install 'tiedconv[onnx]'"],
    )


@pytest.mark.slow
def test_a_lost_tie_or_other_logits_leave_no_file(
    compact: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pt2 = all_formats()["pt2"]
    write = type(pt2).write

    def doubled(self: Any, job: Job) -> exporting.Written:
        wrote = write(self, job)
        return exporting.Written(wrote.tensors, wrote.parameters, 2 * wrote.weight_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(type(pt2), "write", doubled)
        refused("export", compact, "-o", "m.pt2", error_code="tie-lost", code=1)
    with monkeypatch.context() as patch:
        patch.setattr(type(pt2), "run", lambda self, path, images: {"logits": torch.ones(2, 5)})
        refused("export", compact, "-o", "m.pt2", error_code="outputs-differ", code=1)
    assert not files_of(here)


@pytest.mark.slow
def test_numbers_too_large_for_half_are_named(here: Path) -> None:
    model = tiedconv.convert(SPEC, "tied", model_args=MODEL_ARGS, weights="none")
    with torch.no_grad():
        model.get_parameter("head.weight")[0, 0] = 1e6
    tiedconv.save(with_image_size(model), "m.safetensors")
    for output, to in (("h.safetensors", "compact"), ("h.onnx", "onnx")):
        with pytest.raises(UserError) as caught:
            tiedconv.export("m.safetensors", output, to, dtype="float16")
        assert caught.value.code == "dtype-overflow"
        assert "head.weight" in caught.value.what
    tiedconv.export("m.safetensors", "b.safetensors", "compact", dtype="bfloat16")
    assert files_of(here) == {"m.safetensors", "b.safetensors"}


@pytest.mark.slow
def test_an_interrupted_export_leaves_what_was_there(
    compact: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        Path(next(here.glob(".m.onnx*")), "half").write_text("half")
        raise KeyboardInterrupt

    Path("m.onnx").write_text("mine")
    monkeypatch.setattr("onnx_ir.save", interrupted)
    assert run("export", compact, "-o", "m.onnx", "--force", code=130).stderr.startswith("Interr")
    assert files_of(here) == {"m.onnx"}
    assert Path("m.onnx").read_text() == "mine"


# verify --against


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_verify_compares_a_compact_file_with_another(compact: Path, here: Path, dtype: str) -> None:
    tiedconv.export(compact, "h.safetensors", "compact", dtype=dtype)
    checks = figures("verify", compact, "--against", "h.safetensors")["checks"]
    assert {"size", "outputs"} <= {c["name"] for c in checks if c["passed"]}
    other = tiedconv.convert(SPEC, "tied", model_args=MODEL_ARGS, weights="none", seed=1)
    tiedconv.save(with_image_size(other), "other.safetensors")
    command = ("verify", "other.safetensors", "--against", "h.safetensors")
    refused(*command, error_code="outputs-differ", words=["h.safetensors"], code=1)


@pytest.mark.slow
def test_verify_tells_an_export_from_another(compact: Path, here: Path) -> None:
    other = tiedconv.convert(SPEC, "tied", model_args=MODEL_ARGS, weights="none", seed=1)
    tiedconv.save(with_image_size(other), "other.safetensors")
    for output in ("m.onnx", "m.pt2", "m.pth"):
        tiedconv.export(compact, output)
        checks = figures("verify", compact, "--against", output)["checks"]
        assert all(c["passed"] for c in checks)
        names = [c["name"] for c in checks]
        assert names[-1] == ("against" if output == "m.pth" else "memory")
        differs = "tensors-differ" if output == "m.pth" else "outputs-differ"
        command = ("verify", "other.safetensors", "--against", output)
        refused(*command, error_code=differs, words=[output], code=1)
    with pytest.raises(CheckpointError) as caught:
        tiedconv.verify(compact, against="gone.onnx")
    assert caught.value.code == "file-not-found"
    for name in ("m.onnx", "m.pt2", "m.pth"):
        Path(name).write_bytes(Path(name).read_bytes()[:5000])
        refused("verify", compact, "--against", name, error_code="file-damaged", words=[name])


@pytest.mark.slow
def test_verify_finds_a_tensor_that_is_held_twice(compact: Path, here: Path) -> None:
    tiedconv.export(compact, "m.onnx")
    model = ir.load("m.onnx")
    name, value = max(
        model.graph.initializers.items(),
        key=lambda kv: kv[1].const_value.nbytes,  # type: ignore[union-attr]
    )
    twin = ir.Value(name="twin", type=value.type, const_value=ir.Tensor(
        value.const_value.numpy().T.copy()  # type: ignore[union-attr]
    ))  # fmt: skip
    twin.shape = ir.Shape(twin.const_value.shape)  # type: ignore[union-attr]
    model.graph.register_initializer(twin)
    ir.save(model, "m.onnx")
    with pytest.raises(VerifyError) as caught:
        tiedconv.verify(compact, against="m.onnx")
    assert caught.value.code == "tie-lost"
    assert name in caught.value.what
    assert "twin" in caught.value.what


def test_a_dense_file_can_be_read_by_others(compact: Path, here: Path) -> None:
    before = os.umask(0o022)
    try:
        for name in ("open.safetensors", "open.pth"):
            run("export", compact, "-o", name)
            assert (here / name).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_a_changed_number_of_a_dense_file_is_found(compact: Path, here: Path) -> None:
    state = dense_state_dict(tiedconv.load(compact))
    state["head.bias"] = state["head.bias"] + 1e-6
    torch.save(state, "m.pth")
    with pytest.raises(VerifyError) as caught:
        tiedconv.verify(compact, against="m.pth")
    assert caught.value.code == "tensors-differ"
    assert "head.bias differs" in caught.value.what
    del state["head.bias"]
    torch.save(state, "m.pth")
    with pytest.raises(VerifyError) as caught:
        tiedconv.verify(compact, against="m.pth")
    assert caught.value.code == "tensors-differ"
    assert "head.bias is missing" in caught.value.what


class Detector(nn.Module):
    """Boxes and integers beside the logits, and features if they are asked for."""

    def __init__(self, random: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(3))
        self.boxes, self.random = nn.Linear(96, 4), random

    def forward(self, images: Tensor) -> dict[str, Any]:
        """`(n, 3, H, W)` to a dict."""
        x = images.mean((2, 3)).repeat(1, 32)
        if self.random:
            x = x + torch.rand_like(x)
        for layer in self.layers:
            x = layer(x).relu()
        return {
            "logits": x,
            "pred_boxes": self.boxes(x).sigmoid(),
            "states": (x * 2, {"last": x + 1}),
            "nothing": None,
        }


NAMES = ("logits", "pred_boxes", "states.0", "states.1.last")


def detector_file(path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    model = tiedconv.convert(Detector(**options), "lors", rank=2)
    tiedconv.save(model, path)
    monkeypatch.setattr(
        "tiedconv.sources.models.skeleton_of", lambda *_, **__: Detector(**options).eval()
    )
    monkeypatch.setattr(
        "tiedconv.commands.verify.skeleton_of", lambda *_, **__: Detector(**options).eval()
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pt2", "onnx", "xml"])
def test_an_export_has_all_outputs_unless_some_are_asked_for(
    here: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    file = detector_file(here / "d.safetensors", monkeypatch)
    done = tiedconv.export(file, here / f"a.{ending}")
    assert done.outputs == NAMES
    assert done.difference is not None
    x = images_for(tiedconv.load(file))
    form = all_formats()[done.format]
    found, expected = form.run(here / f"a.{ending}", x), named_outputs(tiedconv.load(file)(x))
    assert tuple(found) == tuple(expected) == NAMES
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    checks = tiedconv.verify(file, against=here / f"a.{ending}")
    assert all(check.passed for check in checks)
    few = tiedconv.export(file, here / f"b.{ending}", outputs=["pred_boxes", "logits"])
    assert few.outputs == ("pred_boxes", "logits")
    missing = [c for c in tiedconv.verify(file, against=here / f"b.{ending}") if c.passed is None]
    assert len(missing) == 1
    assert "states.0" in missing[0].detail
    with raises(UserError, "unknown-output", "pred_masks", "pred_boxes"):
        tiedconv.export(file, here / f"c.{ending}", outputs=["pred_masks"])
    assert not (here / f"c.{ending}").exists()


def test_a_model_that_is_random_in_evaluation_is_seeded(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = detector_file(here / "d.safetensors", monkeypatch, random=True)
    assert all(check.passed for check in tiedconv.verify(file))
    model, x = tiedconv.load(file), torch.rand(2, 3, 8, 8)
    state = torch.get_rng_state()
    one, other = outputs_of(model, x), outputs_of(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert outputs_differ_by(one, other) == 0


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pt2", "onnx", "xml"])
def test_a_model_of_two_towers_has_two_inputs(ending: str, here: Path) -> None:
    clip().save_pretrained(here / "clip")  # type: ignore[operator]
    spec = f"hf:{here / 'clip'}"
    tiedconv.save(tiedconv.convert(spec, "lowrank", rank=8), here / "c.safetensors")
    done = tiedconv.export("c.safetensors", f"c.{ending}", outputs=["image_embeds", "text_embeds"])
    assert done.difference is not None
    model, images = tiedconv.load("c.safetensors"), torch.randn(3, 3, 32, 32)
    text = further_inputs(model, images)["input_ids"]
    assert text.shape == (3, 20)  # as many tokens as it takes
    found = all_formats()[done.format].run(here / f"c.{ending}", images, text)
    expected = model(pixel_values=images, input_ids=text)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
    checks = tiedconv.verify("c.safetensors", against=f"c.{ending}", original=spec)
    assert {check.name: check.passed for check in checks}["blocks"]
    assert all(check.passed is not False for check in checks)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_a_model_of_text_is_verified_and_exported(ending: str, here: Path) -> None:
    bert().save_pretrained(here / "bert")  # type: ignore[operator]
    spec = f"hf:{here / 'bert'}"
    tiedconv.save(tiedconv.convert(spec, "lowrank", rank=8), here / "b.safetensors")
    assert all(check.passed for check in tiedconv.verify("b.safetensors", original=spec))
    done = tiedconv.export("b.safetensors", f"b.{ending}")
    assert done.difference is not None
    assert done.difference < 1e-4
    checks = tiedconv.verify("b.safetensors", against=f"b.{ending}")
    assert all(check.passed for check in checks)
    if ending == "onnx":
        assert [given.name for given in session(here / "b.onnx").get_inputs()] == ["input_ids"]


class Attending(nn.Module):
    """A model of transformers' kind, whose attention can be computed in two ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.way = nn.Linear(12, 16), nn.Linear(16, 12), "sdpa"

    def set_attn_implementation(self, way: str) -> None:
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x.flatten(1)).relu())
        return out


def test_attention_is_computed_step_by_step_where_the_exporter_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export = torch.onnx.export

    def only_eager(wrapped: Any, *arguments: Any, **options: Any) -> Any:
        if wrapped.model.way != "eager":
            raise torch.onnx.OnnxExporterError("can't decompose")
        return export(wrapped, *arguments, **options)

    monkeypatch.setattr(torch.onnx, "export", only_eager)
    model = tiedconv.convert(Attending().eval(), "lowrank", rank=4)
    graph, lowered = onnx_graph(model, {"images": torch.randn(2, 3, 2, 2)})
    assert {*lowered.factored, *lowered.materialized} == {"up.weight", "down.weight"}
    assert graph.graph.outputs


@pytest.mark.slow
def test_two_towers_are_measured(here: Path) -> None:
    clip().save_pretrained(here / "clip")  # type: ignore[operator]
    tiedconv.save(tiedconv.convert(f"hf:{here / 'clip'}", "lowrank", rank=8), "c.safetensors")
    found = tiedconv.bench("c.safetensors", runtimes=("eager",), batches=(1,), rounds=3)
    assert all(row.timings[0].seconds > 0 for row in found.rows)


def test_an_onnx_file_says_how_images_are_prepared_and_what_its_outputs_are(
    world: World, here: Path
) -> None:
    run("finetune", world.tied, "--data", world.data, "-o", "f.safetensors", "--teacher", "none",
        "--steps", 1, "--batch-size", 4, "--workers", 0, "--device", "cpu")  # fmt: skip
    run("export", "f.safetensors", "-o", "f.onnx")
    told = ir.load("f.onnx").metadata_props
    assert json.loads(told["class_names"]) == ["blue", "green", "red"]
    prepared = source_of(state_of(tiedconv.load("f.safetensors")).source).preprocess
    assert prepared is not None
    assert json.loads(told["preprocess"]) == prepared.to_json()


class Chained(nn.Module):
    """Layers right behind one another, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.mix = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.never = nn.Conv2d(16, 16, 3)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 3, h, w)` to `(n, 8)`."""
        pixels = self.mix(self.stem(x)).mean((2, 3))
        return self.head(self.down(self.up(pixels)))


@pytest.mark.slow
@pytest.mark.parametrize("lower", ["always", "never"])
def test_layers_right_behind_one_another_and_unused_ones_can_be_exported(
    lower: str, tmp_path: Path
) -> None:
    model = tiedconv.convert(Chained().eval(), "lowrank", rank=4)
    names = state_of(model).plan.weights.keys()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    graph, lowered = onnx_graph(copy.deepcopy(model), {"images": x}, lower=lower)
    assert set(lowered.factored) | set(lowered.materialized) == names - {"never.weight"}
    assert len(lowered.factored) == (5 if lower == "always" else 0)
    ir.save(graph, tmp_path / "m.onnx")
    (found,) = session(tmp_path / "m.onnx").run(None, {"images": x.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_that_draws_random_numbers_is_refused() -> None:
    class Random(Chained):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.rand_like(x))

    model = tiedconv.convert(Random().eval(), "lowrank", rank=4)
    with raises(UserError, "model-not-exportable"):
        onnx_graph(model, {"images": torch.randn(2, 3, 8, 8)})

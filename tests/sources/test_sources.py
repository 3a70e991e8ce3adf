"""Models from torchvision, timm, transformers and functions; weights files; no network."""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from error_codes import raises
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tiedconv import sources
from tiedconv.commands.convert_file import convert_file
from tiedconv.errors import CheckpointError, MissingExtra, PlanError, SourceError, UserError
from tiedconv.errors import WeightsError as BadWeights
from tiedconv.planning.recipe import Recipe
from tiedconv.sources import (
    TRUSTED,
    Preprocess,
    Source,
    describe,
    fit_to,
    load_into,
    open_source,
    parse_model_args,
    read_weights,
    sha256_of_file,
    skeleton,
    skip_init,
)

# Functions of this module stand for a user's.
HERE = __name__


def small_net(width: int = 3, classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Linear(width, classes))


small_net.preprocess = Preprocess(32, None).to_json()  # type: ignore[attr-defined]


def no_model() -> str:
    return "not a model"


def again(source: Source) -> Source:
    """Through the text that a file would hold."""
    return Source.from_json(json.loads(json.dumps(source.to_json())))


def equal_states(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- importing ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_model_library_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, tiedconv.sources as s\n"
        "libraries = {'torchvision', 'timm', 'transformers', 'huggingface_hub'}\n"
        "assert not libraries & set(sys.modules), libraries & set(sys.modules)\n"
        "s.describe('squeezenet1_1')\n"
        "assert not libraries - {'torchvision'} & set(sys.modules)\n"
        "from tiedconv.sources.torchvision_compat import import_torchvision\n"
        "tv = import_torchvision()\n"
        "assert tv is import_torchvision() and tv.ops and tv.extension\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize(("package", "spec"), [("timm", "timm:resnet18"), ("transformers", "hf:x")])
def test_missing_library(monkeypatch: pytest.MonkeyPatch, package: str, spec: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with raises(MissingExtra, "missing-extra", package):
        describe(spec)


# --- skipping initialisation -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "kwargs"),
    [
        ("timm:swin_tiny_patch4_window7_224", {"embed_dim": 24}),
        ("timm:eva02_tiny_patch14_224", {"depth": 2}),
        ("mobilenet_v3_small", {}),
    ],
)
def test_skip_init_leaves_buffers_and_shapes_as_they_are(spec: str, kwargs: dict[str, Any]) -> None:
    plain, _ = open_source(spec, kwargs, weights="none")
    skipped, _ = describe(spec, kwargs)
    buffers = dict(skipped.named_buffers())
    assert len(buffers) > 0
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(buffers.pop(name), buffer, rtol=0, atol=0)
    assert not buffers
    shapes = {name: value.shape for name, value in skipped.state_dict().items()}
    assert shapes == {name: value.shape for name, value in plain.state_dict().items()}
    assert all(value.isfinite().all() for value in skipped.state_dict().values())


class RandomDraws(TorchDispatchMode):
    """Counts the random values that are drawn within it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            self.count += args[0].numel()
        return func(*args, **(kwargs or {}))


def test_skip_init_draws_next_to_nothing_and_ends() -> None:
    with RandomDraws() as skipped:
        describe("vit_b_16")
    assert skipped.count < 1e6  # of 86 million parameters
    with RandomDraws() as drawn:
        model, _ = open_source("vit_b_16", weights="none")
    assert drawn.count > 80e6
    assert model.get_parameter("encoder.layers.encoder_layer_0.mlp.0.weight").std() > 0


def test_skip_init_spares_random_buffers_and_constant_fills() -> None:
    with skip_init():
        linear = nn.Linear(4, 4)
        nn.init.ones_(linear.bias)
        nn.init.trunc_normal_(linear.weight, mean=9.0, std=0.1, a=8.9, b=9.1)
        buffer = torch.empty(100).normal_()
    assert linear.bias.eq(1).all()
    assert buffer.std() > 0.5


def test_seed_decides_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    one, _ = open_source(f"{HERE}:small_net", weights="none", seed=1)
    same, _ = open_source(f"{HERE}:small_net", weights="none", seed=1)
    other, _ = open_source(f"{HERE}:small_net", weights="none", seed=2)
    assert equal_states(one, same)
    assert not equal_states(one, other)
    assert torch.equal(state, torch.get_rng_state())


# --- the three libraries and functions ---------------------------------------------------------


def test_torchvision_with_weights_of_a_file(tmp_path: Path) -> None:
    model, _ = open_source("resnet18", {"num_classes": 5}, "none", seed=3)
    save_file(model.state_dict(), tmp_path / "five.safetensors")
    loaded, source = open_source("resnet18", {"num_classes": 5}, tmp_path / "five.safetensors")
    assert not loaded.training
    assert equal_states(model, loaded)
    assert source.weights == "file"
    assert source.weights_name == "five.safetensors"
    assert source.weights_sha256 == sha256_of_file(tmp_path / "five.safetensors")
    assert source.preprocess == Preprocess(224, 256)
    assert set(source.versions) == {"torch", "torchvision"}
    assert again(source) == source
    empty = skeleton(again(source))
    assert type(empty) is type(model)
    load_into(empty, loaded.state_dict())
    assert equal_states(model, empty)


def test_preprocessing_follows_the_image_size() -> None:
    _, source = describe("vit_b_16", {"image_size": 112})
    assert source.preprocess == Preprocess(112, 128)
    _, source = describe("timm:vit_tiny_patch16_224", {"img_size": 32})
    half = (0.5, 0.5, 0.5)
    assert source.preprocess == Preprocess(32, 35, half, half, "bicubic")
    _, source = describe("timm:resnet18.a1_in1k")
    assert source.preprocess == Preprocess(224, 235, interpolation="bicubic")
    _, source = describe("fcn_resnet50")
    assert source.preprocess is None


def test_what_published_weights_imply_is_in_the_skeleton() -> None:
    model, source = describe("googlenet")
    assert model.transform_input is True
    assert source.kwargs == {"transform_input": True, "init_weights": False, "aux_logits": False}
    assert describe("vit_b_16")[1].kwargs == {"image_size": 224}


def test_timm_round_trip() -> None:
    kwargs: dict[str, Any] = {"img_size": 32, "num_classes": 3, "depth": 2}
    model, source = open_source("timm:vit_tiny_patch16_224", kwargs, "none")
    rebuilt = skeleton(again(source))
    load_into(rebuilt, model.state_dict())
    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(rebuilt(image), model(image))
    assert set(source.versions) == {"torch", "torchvision", "timm"}


@pytest.mark.parametrize(
    ("spec", "kwargs", "code", "words"),
    [
        ("resnet5", {}, "unknown-model", ["'resnet5'", "resnet50"]),
        ("weights.pth", {}, "file-as-model", ["weights.pth", "weights=FILE"]),
        ("", {}, "unknown-model", ["''"]),
        ("timm:vit_tiny_patch16_22", {}, "unknown-model", ["timm:vit_tiny_patch16_224"]),
        ("timm:resnet18.no_such_tag", {}, "unknown-model", ["no_such_tag"]),
        ("timm:hf-hub:someone/model", {}, "unknown-model", ["hf-hub:someone/model"]),
        ("timm:local-dir:/tmp", {}, "unknown-model", ["local-dir:/tmp"]),
        ("timm:", {}, "unknown-model", ["'timm:'"]),
        ("hf:", {}, "model-not-named", ["hf:NAME"]),
        ("hf:./no/such/dir", {}, "model-folder-missing", ["./no/such/dir"]),
        ("resnet18", {"colour": 1}, "unknown-model-argument", ["resnet18", "colour"]),
        ("timm:resnet18", {"colour": 1}, "unknown-model-argument", ["timm:resnet18", "colour"]),
        ("vit_b_16", {"image_size": 33}, "model-not-built", ["image_size=33"]),
        ("resnet18", {"weights": "DEFAULT"}, "reserved-model-argument", ["weights", "resnet18"]),
        ("timm:resnet18", {"checkpoint_path": "x"}, "reserved-model-argument", ["checkpoint_path"]),
        ("resnet18", {"num_classes": {1, 2}}, "model-argument-not-json", ["num_classes"]),
        (f"{HERE}:small_nett", {}, "unknown-function", ["small_nett", ": small_net."]),
        (f"{HERE}:no_model", {}, "not-a-module", [f"{HERE}:no_model", "str"]),
        (f"{HERE}:small_net", {"depth": 2}, "unknown-model-argument", ["depth"]),
        (f"{HERE}:small_net", {"width": "wide"}, "model-not-built", ["width='wide'"]),
        ("no.such.module:function", {}, "module-not-imported", ["no.such.module"]),
    ],
)
def test_requests_that_can_not_be_met(
    spec: str, kwargs: dict[str, Any], code: str, words: list[str]
) -> None:
    with raises(SourceError, code, *words):
        describe(spec, kwargs)


def test_function_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from torch import nn\ndef build(n=2):\n    return nn.Linear(n, n)\n"
    (tmp_path / "my_models_here.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    model, source = open_source("my_models_here:build", {"n": 3})
    assert isinstance(model, nn.Linear)
    assert model.in_features == 3
    assert sys.path == path
    assert source.preprocess is None
    assert describe(f"{HERE}:small_net")[1].preprocess == Preprocess(32, None)


def test_a_file_can_not_name_code() -> None:
    source = Source(f"{HERE}:small_net", {"width": 5})
    with raises(SourceError, "code-not-trusted", f"{HERE}:small_net", "trust_code=True"):
        skeleton(source)
    assert isinstance(skeleton(source, trust_code=True), nn.Sequential)
    with raises(SourceError, "code-not-trusted", "tiedconv.sources:open_source"):
        skeleton(Source("tiedconv.sources:open_source", {"spec": "resnet18"}))
    with raises(SourceError, "class-not-recorded"):
        skeleton(Source("", weights="memory"))
    assert all(spec.startswith("tiedconv.commands.demo:") for spec in TRUSTED)


# --- no network --------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("spec", ["resnet18", "timm:resnet18"])
def test_pretrained_weights_without_a_network(spec: str, capfd: pytest.CaptureFixture[str]) -> None:
    with raises(SourceError, "download-failed", spec, 'weights="none"'):
        open_source(spec)
    assert capfd.readouterr().out == ""


@pytest.mark.usefixtures("offline")
def test_hub_name_without_a_network() -> None:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    for call in (describe, open_source):
        with raises(SourceError, "model-not-loaded", "hf:someone/some-model-not-there"):
            call("hf:someone/some-model-not-there")
    assert constants.HF_HUB_OFFLINE is before


def test_threads_that_overlap_leave_the_hub_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from tiedconv.sources.hub import hub_offline

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    first, second = hub_offline(), hub_offline()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # the first to begin ends first
    assert constants.HF_HUB_OFFLINE is True
    second.__exit__(None, None, None)
    assert constants.HF_HUB_OFFLINE is False


def test_published_weights_that_do_not_allow_an_argument() -> None:
    with raises(SourceError, "argument-needs-new-weights", "resnet18", "num_classes"):
        open_source("resnet18", {"num_classes": 4})
    import timm

    without = next(n for n in timm.list_models() if not timm.models.is_model_pretrained(n))
    with raises(SourceError, "no-pretrained-weights", without):
        open_source(f"timm:{without}")


# --- Hugging Face ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with non-persistent buffers, which is written under older names."""
    from tiedconv.sources.torchvision_compat import import_torchvision

    import_torchvision()
    from transformers import SwinConfig, SwinForImageClassification

    folder = tmp_path_factory.mktemp("swin")
    config = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        num_labels=5,
    )
    SwinForImageClassification(config).save_pretrained(folder)
    return folder


def test_hf_directory(swin: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    model, source = open_source(f"hf:{swin}")
    assert capfd.readouterr() == ("", "")
    assert source.config is not None
    assert source.config["architecture"] == "SwinForImageClassification"
    assert "_name_or_path" not in source.config
    assert source.preprocess == Preprocess(32, 37)
    assert set(source.versions) == {"torch", "torchvision", "transformers"}
    from_file, _ = open_source(f"hf:{swin}", weights=swin / "model.safetensors")
    assert equal_states(model, from_file)
    rebuilt = skeleton(again(source))
    load_into(rebuilt, model.state_dict())
    image = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(rebuilt(image).logits, model(image).logits)


def test_hf_arguments(swin: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((swin / "config.json").read_text())
    model, source = open_source(f"hf:{tmp_path}", {"num_labels": 7}, "none")
    assert model.get_parameter("classifier.weight").shape[0] == 7
    assert skeleton(again(source)).get_parameter("classifier.weight").shape[0] == 7
    with raises(BadWeights, "weights-mismatch", "classifier.weight is (5, 16)", '"num_labels": 5'):
        open_source(f"hf:{swin}", {"num_labels": 7})
    with raises(BadWeights, "weights-mismatch", "classifier.weight is (5, 16)", '"num_labels": 5'):
        open_source(f"hf:{swin}", {"num_labels": 7}, swin / "model.safetensors")
    with raises(SourceError, "unknown-model-argument", "img_size"):
        describe(f"hf:{swin}", {"img_size": 32})
    with raises(SourceError, "invalid-model-argument", "image_size='large'"):
        describe(f"hf:{swin}", {"image_size": "large"})
    with raises(SourceError, "model-unreadable", "weights", str(tmp_path)):
        open_source(f"hf:{tmp_path}")


def test_hf_weights_that_lack_a_head(swin: Path, tmp_path: Path) -> None:
    tensors = read_weights(swin / "model.safetensors").tensors
    del tensors["classifier.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((swin / "config.json").read_text())
    with raises(BadWeights, "weights-mismatch", "lacks classifier.weight"):
        open_source(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        ({"architectures": ["NoSuchModel"]}, "unknown-architecture", "'NoSuchModel'"),
        ({"architectures": ["AutoModel"]}, "unknown-architecture", "'AutoModel'"),
        ({"architectures": None, "model_type": "bert"}, "architecture-missing", "architectures"),
        ({"model_type": "nothing"}, "model-unreadable", "configuration"),
        (
            {"model_type": None, "auto_map": {"AutoConfig": "evil.Config"}},
            "model-unreadable",
            "configuration",
        ),
    ],
)
def test_hf_configurations_refused(
    swin: Path, tmp_path: Path, change: dict[str, Any], code: str, word: str
) -> None:
    config = {**json.loads((swin / "config.json").read_text()), **change}
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with raises(SourceError, code, word):
        describe(f"hf:{tmp_path}")


def test_hf_architecture_by_default(swin: Path, tmp_path: Path) -> None:
    config = json.loads((swin / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(describe(f"hf:{tmp_path}")[0]).__name__ == "SwinForImageClassification"
    with raises(SourceError, "config-missing", "config.json"):
        describe(f"hf:{tmp_path.parent}")


@pytest.mark.usefixtures("offline")
def test_hf_configuration_of_a_file_fetches_nothing(swin: Path) -> None:
    _, source = describe(f"hf:{swin}")
    hostile = {
        "attn_implementation": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "use_pretrained_backbone": True,
        "auto_map": {"AutoConfig": "evil.Config"},
        "quantization_config": {"quant_method": "x"},
    }
    config = {**(source.config or {}), **hostile}
    model = skeleton(Source("hf:gone", config=config))
    assert type(model).__name__ == "SwinForImageClassification"
    with raises(SourceError, "config-missing", "hf:gone"):
        skeleton(Source("hf:gone"))
    with raises(SourceError, "config-unknown", "hf:gone"):
        skeleton(Source("hf:gone", config={**config, "model_type": "../evil"}))
    with raises(SourceError, "unknown-architecture", "Trainer"):
        skeleton(Source("hf:gone", config={**config, "architecture": "Trainer"}))


HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (
            {"size": {"height": 24, "width": 24}, "image_mean": HALF, "image_std": HALF},
            Preprocess(24, None, HALF, HALF),
        ),
        (
            {"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": 32, "resample": 3},
            Preprocess(32, 36, interpolation="bicubic"),
        ),
        ({"size": {"shortest_edge": 28}, "crop_pct": 0.875}, Preprocess(28, 32)),
        ({"size": {"shortest_edge": 384}, "crop_pct": 1.0}, Preprocess(384, None)),
        ({"size": {"shortest_edge": 40}}, Preprocess(40, 40)),
        ({"size": 32, "do_normalize": False}, Preprocess(32, None, (0.0,) * 3, (1.0,) * 3)),
    ],
)
def test_hf_image_processor(
    swin: Path, tmp_path: Path, stated: dict[str, Any], expected: Preprocess
) -> None:
    (tmp_path / "config.json").write_text((swin / "config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    assert describe(f"hf:{tmp_path}")[1].preprocess == expected


@pytest.mark.parametrize("text", ["{", "[]", '{"size": "big"}', '{"image_std": [0, 0, 0]}'])
def test_hf_image_processor_damaged(swin: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text((swin / "config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(text)
    with raises(SourceError, "preprocessing-malformed", "preprocessor_config.json"):
        describe(f"hf:{tmp_path}")


# --- data --------------------------------------------------------------------------------------


def test_model_arguments() -> None:
    args = ["img_size=32", "drop=0.1", "flag=true", "dims=[1,2]", "act=gelu", "nan=NaN", "eq=a=b"]
    assert parse_model_args(args) == {
        "img_size": 32,
        "drop": 0.1,
        "flag": True,
        "dims": [1, 2],
        "act": "gelu",
        "nan": "NaN",
        "eq": "a=b",
    }
    for wrong in ("img_size", "=3", "a b=3"):
        with raises(UserError, "malformed-model-argument", repr(wrong)):
            parse_model_args([wrong])
    with raises(UserError, "model-argument-repeated", " a "):
        parse_model_args(["a=1", "a=2"])


def sound_source() -> dict[str, Any]:
    return Source("resnet18", {"a": [1, {"b": None}]}, preprocess=Preprocess(224, 256)).to_json()


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("spec", 3, "source-malformed"),
        ("kwargs", [], "source-malformed"),
        ("kwargs", {"a": float("nan")}, "source-malformed"),
        ("weights", "other", "source-malformed"),
        ("weights", None, "source-malformed"),
        ("weights_sha256", "abc", "source-malformed"),
        ("weights_name", "/home/someone/weights.pth", "source-malformed"),
        ("config", "x", "source-malformed"),
        ("preprocess", {}, "missing-key"),
        ("preprocess", [], "not-a-json-object"),
        ("versions", {"torch": 2}, "source-malformed"),
        ("surprise", 1, "unknown-key"),
    ],
)
def test_malformed_sources(key: str, value: object, code: str) -> None:
    assert Source.from_json(sound_source()).to_json() == sound_source()
    with raises(CheckpointError, code):
        Source.from_json({**sound_source(), key: value})


def test_incomplete_source() -> None:
    data = sound_source()
    del data["versions"]
    with raises(CheckpointError, "missing-key", "'versions'"):
        Source.from_json(data)
    with raises(CheckpointError, "not-a-json-object", "list"):
        Source.from_json([data])


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("size", 0, "invalid-image-size"),
        ("size", True, "invalid-image-size"),
        ("size", 1e9, "invalid-image-size"),
        ("resize", "256", "invalid-image-size"),
        ("mean", 0.5, "invalid-mean-or-std"),
        ("mean", [0.5], "invalid-mean-or-std"),
        ("mean", [], "invalid-mean-or-std"),
        ("std", [0.0, 1.0, 1.0], "invalid-mean-or-std"),
        ("std", [float("inf")] * 3, "invalid-mean-or-std"),
        ("interpolation", "nearest", "unknown-interpolation"),
        ("surprise", 1, "unknown-key"),
    ],
)
def test_malformed_preprocessing(key: str, value: object, code: str) -> None:
    with raises(PlanError, code):
        Preprocess.from_json({**Preprocess(224, 256).to_json(), key: value})


# --- weights -----------------------------------------------------------------------------------


class Exploit:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('code was run')",)


def test_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.ones(2)}, "extra": Exploit()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Exploit()))
    torch.save(small_net(), tmp_path / "model.pth")
    for name in ("zip.pth", "plain.pth", "model.pth"):
        with raises(BadWeights, "weights-contain-code", name):
            read_weights(tmp_path / name)


def test_damaged_files(tmp_path: Path) -> None:
    tensors = {"weight": torch.arange(1000.0)}
    save_file(tensors, tmp_path / "good.safetensors")
    torch.save(tensors, tmp_path / "good.pth")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("good.safetensors", "good.pth", "old.pth"):
        content = (tmp_path / name).read_bytes()
        assert torch.equal(read_weights(tmp_path / name).tensors["weight"], tensors["weight"])
        for length in (0, 5, 40, len(content) // 2, len(content) - 20):
            (tmp_path / "cut").write_bytes(content[:length])
            with pytest.raises(BadWeights) as caught:
                read_weights(tmp_path / "cut")
            assert caught.value.code in ("weights-damaged", "weights-format-unknown")
            assert "cut" in str(caught.value)
    (tmp_path / "text.pth").write_text("an error page, not weights")
    (tmp_path / "text.safetensors").write_text("an error page, not weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, code in (
        ("text.pth", "weights-format-unknown"), ("text.safetensors", "weights-damaged"),
        ("list.pth", "weights-empty"), ("missing.pth", "weights-unreadable"),
        (".", "weights-not-found"),
    ):  # fmt: skip
        with raises(BadWeights, code):
            read_weights(tmp_path / name)


def test_compact_file_is_not_weights(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "compact.safetensors", {"tiedconv": "{}"})
    with raises(BadWeights, "weights-are-compact", "export --to dense"):
        read_weights(tmp_path / "compact.safetensors")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"model": {"state_dict": state}, "best": torch.tensor(0.5)},
        lambda state: {"model_ema": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
        lambda state: {"teacher": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
        lambda state: {f"model.encoder.{name}": value for name, value in state.items()},
        lambda state: {f"{n[0]}._orig_mod{n[1:]}": value for n, value in state.items()},
    ],
)
def test_wrapped_weights(tmp_path: Path, wrap: Any) -> None:
    torch.manual_seed(0)
    model, other = small_net(), small_net()
    torch.save(wrap(model.state_dict()), tmp_path / "wrapped.pth")
    load_into(other, read_weights(tmp_path / "wrapped.pth").tensors)
    assert equal_states(model, other)


class Prefixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.head = nn.Linear(3, 3)
        self.tied = self.head
        self.register_buffer("index", torch.arange(3), persistent=False)


def test_prefixes_that_the_model_has_stay() -> None:
    model = Prefixed()
    named = {f"module.{name}": value for name, value in model.state_dict().items()}
    assert list(fit_to(model, named)) == list(model.state_dict())


def test_what_may_be_missing_or_too_much() -> None:
    model = Prefixed()
    state = model.state_dict()
    assert "tied.weight" in state
    given = {name: value + 1 for name, value in state.items() if not name.startswith("tied")}
    fitted = fit_to(model, {**given, "index": torch.arange(3)})
    assert torch.equal(fitted["tied.weight"], state["head.weight"] + 1)
    assert "index" not in fitted
    net = small_net()
    older = {n: value for n, value in net.state_dict().items() if "num_batches" not in n}
    load_into(net, older)


def test_half_precision_is_kept_in_reading_and_widened_in_loading(tmp_path: Path) -> None:
    model = small_net()
    halved: dict[str, Tensor] = {n: v.bfloat16() for n, v in model.state_dict().items()}
    save_file(halved, tmp_path / "half.safetensors")
    tensors = read_weights(tmp_path / "half.safetensors").tensors
    assert tensors["0.weight"].dtype == torch.bfloat16
    load_into(model, tensors)
    assert model.state_dict()["0.weight"].dtype == torch.float32
    assert torch.equal(model.state_dict()["0.weight"], halved["0.weight"].float())


def test_mismatches_are_named() -> None:
    model, ten = small_net(), small_net(classes=10)
    with raises(
        BadWeights,
        "weights-mismatch",
        "2.weight is (10, 3) in the file, (4, 3)",
        '"num_classes": 10',
    ):
        load_into(model, ten.state_dict())
    wide = small_net(width=8)
    with raises(BadWeights, "weights-mismatch", "0.weight is (8, 3, 3, 3)", " and 4 more. "):
        load_into(model, wide.state_dict())
    state = model.state_dict()
    with raises(BadWeights, "weights-mismatch", "0.bias, 1.weight, 1.bias and "):
        load_into(model, {"0.weight": state["0.weight"]})
    with raises(BadWeights, "weights-mismatch", "no stem"):
        load_into(model, {**state, "stem": torch.ones(1)})
    quantized = {**state, "0.weight": state["0.weight"].to(torch.int8)}
    with raises(BadWeights, "weights-quantized", "0.weight", "torch.int8"):
        load_into(model, quantized)


def test_the_public_names_exist() -> None:
    assert all(hasattr(sources, name) for name in sources.__all__)


@pytest.mark.parametrize("weights", ["default", "none"])
def test_a_function_is_called_once(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "counted_model.py").write_text(
        "from torch import nn\n"
        "calls = []\n"
        "def build():\n"
        "    calls.append(1)\n"
        "    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    convert_file(
        "counted_model:build", Recipe.of("lowrank"), tmp_path / "m.safetensors", weights=weights
    )
    assert len(sys.modules.pop("counted_model").calls) == 1

"""Conversion without the whole model in memory: the same file, shards, errors, and the peak."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from cli_helpers import MODEL_ARGS, SPEC, World, files_of, refused, run, tiny_model
from covering import covering, slow_unless
from error_codes import raises
from micro import all_micros
from safetensors.torch import save_file
from torch import Tensor, nn

import tiedconv
import tiedconv.sources as sources
from tiedconv.commands.convert_file import convert_file
from tiedconv.conversion import pipeline, streaming
from tiedconv.conversion.streaming import StreamedStore
from tiedconv.errors import TiedconvError, WeightsError
from tiedconv.families.inspect import inspect_model
from tiedconv.io.safetensors_file import write_tensors
from tiedconv.io.tensor_scratch import TensorScratch
from tiedconv.planning.budget import Budget
from tiedconv.planning.recipe import Recipe, Rule
from tiedconv.sources import fit_to, open_lazily, open_source, read_weights
from tiedconv.sources.init import skip_memory

HERE = "test_streaming"
RECIPES: dict[str, Recipe] = {
    "tied": Recipe.of("tied"),
    "tied, one W": Recipe.of("tied", groups="all"),
    "lors": Recipe.of("lors"),
    "lors, two bases": Recipe.of("lors", bases=2, fold=True),
    "lowrank": Recipe.of("lowrank"),
    "shared": Recipe.of("shared"),
    "basis": Recipe.of("basis"),
    "tied, 60 %": Recipe.of("tied", params="60%"),
    "lors, 60 %": Recipe.of("lors", params="60%"),
    "auto, 70 %": Recipe.of("auto", params="70%"),
    "auto, 60 % of the bytes": Recipe.of("auto", bytes="60%"),  # never streams
    "two rules": Recipe(
        (Rule("tied", {}, ("*mlp*", "*linear*")), Rule("lors", {"rank": 4})), Budget("75%")
    ),
}


def micro_model(name: str) -> nn.Module:
    """The source of a tiny model."""
    return all_micros()[name].build()


def of_dtype(dtype: str) -> nn.Module:
    """A tiny ViT in another precision."""
    return all_micros()["timm-vit"].model(getattr(torch, dtype))


def looks_at_its_numbers() -> nn.Module:
    """A model whose constructor needs them."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(3)))
    if model[0][0].weight.detach().sum().item() > 1e9:
        raise ValueError
    return model


class Doubling(nn.Linear):
    """A layer that changes what is loaded into it."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict[prefix + "weight"] = 2 * state_dict[prefix + "weight"]
        super()._load_from_state_dict(state_dict, prefix, *rest)


def doubling() -> nn.Module:
    """A model of such layers."""
    return nn.Sequential(*(nn.Sequential(Doubling(8, 8)) for _ in range(3)))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model, those that share memory once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor.detach().contiguous()))
    return dict(found.values())


def write_shards(folder: Path, tensors: Mapping[str, Tensor], count: int = 3) -> Path:
    """Shards and their index, as Hugging Face writes them."""
    folder.mkdir(exist_ok=True)
    weight_map: dict[str, str] = {}
    for i in range(count):
        shard = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = dict(list(tensors.items())[i::count])
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def both_ways(
    monkeypatch: pytest.MonkeyPatch, spec: str, recipe: Recipe, weights: Path | str, folder: Path,
    **model_args: Any,
) -> tuple[bytes | str, bytes | str]:  # fmt: skip
    """The file's bytes, or the error, of a conversion that streams and of one that does not."""
    results: list[bytes | str] = []
    for how in ("streamed", "whole"):
        if how == "whole":
            monkeypatch.setattr(sources, "open_lazily", lambda *_, **__: None)
            monkeypatch.setattr(pipeline, "StreamedStore", None)
        else:
            assert open_lazily(spec, model_args, weights) is not None
        output = folder / f"{how}.safetensors"
        try:
            done = convert_file(
                spec, recipe, output, weights=weights, model_args=model_args, force=True
            )
            results.append(output.read_bytes())
            assert done.size == output.stat().st_size
        except TiedconvError as error:
            results.append(str(error))
        monkeypatch.undo()
    return results[0], results[1]


STREAMED = list(
    itertools.product(
        ["timm-vit", "torchvision-vit", "torchvision-resnet", "hf-vit", "aliased", "convmixer"],
        RECIPES,
    )
)


@pytest.mark.parametrize(("name", "recipe"), slow_unless(STREAMED, covering(STREAMED, 1, 1)))
def test_the_file_is_the_same_to_the_byte(
    name: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "dense.safetensors"
    save_file(state_of(all_micros()[name].model()), weights)
    spec = f"{HERE}:micro_model"
    streamed, whole = both_ways(monkeypatch, spec, RECIPES[recipe], weights, tmp_path, name=name)
    assert streamed == whole
    assert files_of(tmp_path) <= {
        "dense.safetensors", "streamed.safetensors", "whole.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize("resident", [0, 2**30])
@pytest.mark.parametrize("recipe", slow_unless(["lors", "tied, one W", "auto, 70 %"], ["lors"]))
def test_matrices_that_do_not_stay_in_memory_give_the_same(
    recipe: str, resident: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "dense.safetensors"
    save_file(state_of(all_micros()["timm-vit"].model()), weights)
    spec = f"{HERE}:micro_model"
    with monkeypatch.context() as limit:
        limit.setattr(streaming, "RESIDENT", resident)
        streamed, whole = both_ways(
            pytest.MonkeyPatch(), spec, RECIPES[recipe], weights, tmp_path, name="timm-vit"
        )
    assert streamed == whole


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tied", "lors", "tied, 60 %"])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("model", ["float16", "float32", "float64"])
def test_other_precisions(
    recipe: str, stored: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "dense.safetensors"
    save_file(state_of(of_dtype(stored)), weights)
    spec = f"{HERE}:of_dtype"
    streamed, whole = both_ways(
        monkeypatch, spec, RECIPES[recipe], weights, tmp_path, dtype=model
    )  # fmt: skip
    assert isinstance(streamed, bytes)
    assert streamed == whole


def test_a_streamed_file_is_good_and_reports_where_it_came_from(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        calls.append("streamed")
        return StreamedStore(*arguments, **options)

    monkeypatch.setattr(pipeline, "StreamedStore", noted)
    output = tmp_path / "out.safetensors"
    run("convert", SPEC, *MODEL_ARGS, "--weights", world.weights, "-o", output)
    assert calls == ["streamed"]
    run("verify", output)
    assert tiedconv.load(output)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_groups_are_counted(world: World, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    convert_file(
        SPEC, Recipe.of("tied"), tmp_path / "out.safetensors", weights=world.weights,
        model_args={**args, "num_classes": 3}, on_group=lambda done, of: seen.append((done, of)),
    )  # fmt: skip
    assert seen == [(i + 1, 6) for i in range(6)]


# What does not stream.


@pytest.mark.parametrize("function", ["looks_at_its_numbers", "doubling"])
def test_models_that_must_be_loaded_to_know_their_weights(function: str, tmp_path: Path) -> None:
    weights = tmp_path / "dense.safetensors"
    model: nn.Module = globals()[function]()
    save_file(state_of(model), weights)
    assert open_lazily(f"{HERE}:{function}", {}, weights) is None
    output = tmp_path / "out.safetensors"
    run("convert", f"{HERE}:{function}", "--scheme", "lowrank", "--rank", 8, "--weights", weights,
        "-o", output)  # fmt: skip
    dense = tiedconv.untie(tiedconv.load(output, trust_code=True)).state_dict()
    factor = 2 if function == "doubling" else 1
    for name, tensor in model.state_dict().items():
        times = factor if name.endswith("weight") else 1
        torch.testing.assert_close(dense[name], tensor * times, atol=1e-5, rtol=1e-4)


def test_pickles_and_random_weights_do_not_stream(world: World) -> None:
    args = dict(part.split("=") for part in MODEL_ARGS[1::2])
    given = sources.parse_model_args([f"{k}={v}" for k, v in args.items()])
    for weights in (world.pickle, "none", "default"):
        assert open_lazily(SPEC, given, weights) is None
    assert open_lazily(SPEC, given, world.weights) is not None


# Models without memory.


@pytest.mark.parametrize("name", all_micros())
def test_a_model_without_memory_has_the_same_model_info(name: str) -> None:
    with skip_memory():
        model = all_micros()[name].build()
    plain = all_micros()[name].build()
    assert inspect_model(model) == inspect_model(plain)
    assert all(p.is_meta for p in model.parameters())
    for (key, a), (_, b) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(a, b), key
    assert not any(p.is_meta for p in nn.Linear(2, 2).parameters())  # it ends


@pytest.mark.parametrize("name", ["timm-vit", "aliased", "torchvision-resnet"])
def test_lazy_weights_are_what_loading_gives(name: str, tmp_path: Path) -> None:
    weights = tmp_path / "dense.safetensors"
    save_file(state_of(all_micros()[name].model()), weights)
    loaded, source = open_source(f"{HERE}:micro_model", {"name": name}, weights)
    lazy = open_lazily(f"{HERE}:micro_model", {"name": name}, weights)
    assert lazy is not None
    assert lazy[1] == source
    state = loaded.state_dict()
    assert len(lazy[2]) == len(inspect_model(loaded).shapes)
    for tensor_name, tensor in lazy[2].items():
        assert torch.equal(tensor, state[tensor_name])
        assert tensor.dtype == lazy[2].dtypes[tensor_name]


def test_names_that_are_missing_or_shared(tmp_path: Path) -> None:
    state = state_of(all_micros()["torchvision-resnet"].model())
    kept = {k: v for k, v in state.items() if "num_batches" not in k}
    save_file({f"module.{k}": v for k, v in kept.items()}, tmp_path / "prefixed.safetensors")
    lazy = open_lazily(
        f"{HERE}:micro_model", {"name": "torchvision-resnet"}, tmp_path / "prefixed.safetensors"
    )
    assert lazy is not None
    assert all(torch.equal(lazy[2][n], t) for n, t in kept.items())
    assert lazy[2]["bn1.num_batches_tracked"] == 0
    # Without memory, parameters of one shape must not be taken for each other.
    with skip_memory():
        model = all_micros()["aliased"].build()
    own = state_of(all_micros()["aliased"].model())
    del own["layers.1.linear1.weight"]
    with raises(WeightsError, "weights-mismatch"):
        fit_to(model, own)


def test_a_shared_tensor_is_given_by_its_last_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = dict(all_micros()["aliased"].model().state_dict())
    state = {name: tensor.clone() for name, tensor in state.items()}
    state["decode.weight"] += 1
    weights = tmp_path / "dense.safetensors"
    save_file(state, weights)
    spec = f"{HERE}:micro_model"
    streamed, whole = both_ways(
        monkeypatch, spec, RECIPES["lors"], weights, tmp_path, name="aliased"
    )  # fmt: skip
    assert isinstance(streamed, bytes)
    assert streamed == whole


# Shards.


@pytest.mark.parametrize("by", ["index", "folder"])
def test_shards_give_what_one_file_gives(
    by: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = write_shards(tmp_path / "shards", tiny_model().state_dict())
    weights = index if by == "index" else index.parent
    args = sources.parse_model_args(MODEL_ARGS[1::2])
    streamed, whole = both_ways(
        monkeypatch, SPEC, Recipe.of("tied"), weights, tmp_path, **args
    )  # fmt: skip
    assert isinstance(streamed, bytes)
    assert streamed == whole
    a, b = tiedconv.load(tmp_path / "streamed.safetensors"), tiedconv.load(world.tied)
    assert all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())
    source = open_source(SPEC, args, weights)[1]
    assert source.weights_name == "model.safetensors.index.json"
    assert source.weights_sha256 is not None
    other = write_shards(
        tmp_path / "other", {**tiny_model().state_dict(), "norm.bias": torch.ones(32)}
    )
    assert sources.open_source(SPEC, args, other)[1].weights_sha256 != source.weights_sha256


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    save_file(tiny_model().state_dict(), tmp_path / "model.safetensors")
    assert read_weights(tmp_path).tensors.keys() == tiny_model().state_dict().keys()


def test_a_folder_of_hugging_faces_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    saved: Any = all_micros()["hf-resnet"].model()
    saved.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    streamed, whole = both_ways(monkeypatch, f"hf:{folder}", RECIPES["lors"], "default", tmp_path)
    assert isinstance(streamed, bytes)
    assert streamed == whole


def test_names_that_only_transformers_knows(tmp_path: Path) -> None:
    saved: Any = all_micros()["hf-vit"].model()
    saved.save_pretrained(tmp_path)
    assert "vit.layers.0.mlp.fc1.weight" not in read_weights(tmp_path).tensors
    assert open_lazily(f"hf:{tmp_path}", {}, "default") is None
    assert open_lazily(f"hf:{tmp_path}", {}, tmp_path) is None
    output = tmp_path / "out.safetensors"
    convert_file(f"hf:{tmp_path}", Recipe.of("tied"), output)
    tiedconv.load(output)


Damage = Callable[[Path, dict[str, Any]], object]


def _edit(change: Callable[[dict[str, str], str], object]) -> Damage:
    """Change the weight_map; the function gets it and the name of its first tensor."""

    def damage(index: Path, data: dict[str, Any]) -> None:
        change(data["weight_map"], next(iter(data["weight_map"])))
        index.write_text(json.dumps(data))

    return damage


def _twice(index: Path, data: dict[str, Any]) -> None:
    name, shard = next(iter(data["weight_map"].items()))
    tensors = read_weights(index.parent / shard).tensors
    other = next(s for s in data["weight_map"].values() if s != shard)
    save_file(
        {**read_weights(index.parent / other).tensors, name: tensors[name]}, index.parent / other
    )


def _truncated(index: Path, data: dict[str, Any]) -> None:
    shard = index.parent / next(iter(data["weight_map"].values()))
    shard.write_bytes(shard.read_bytes()[:-8])


def _compact(index: Path, data: dict[str, Any]) -> None:
    shard = index.parent / next(iter(data["weight_map"].values()))
    model = tiedconv.convert(all_micros()["timm-vit"].model(), "tied")
    tiedconv.save(model, shard, force=True)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing shard": (
        lambda index, _: (index.parent / "model-00002-of-00003.safetensors").unlink(),
        "shard-missing",
    ),
    "path upwards": (
        _edit(lambda m, n: m.update({n: "../x.safetensors"})),
        "shard-outside-folder",
    ),
    "path down and up": (
        _edit(lambda m, n: m.update({n: "a/../../x.safetensors"})),
        "shard-outside-folder",
    ),
    "absolute path": (_edit(lambda m, n: m.update({n: "/etc/passwd"})), "shard-outside-folder"),
    "path of Windows": (
        _edit(lambda m, n: m.update({n: "C:\\x.safetensors"})),
        "shard-outside-folder",
    ),
    "empty path": (_edit(lambda m, n: m.update({n: ""})), "shard-outside-folder"),
    "absent tensor": (
        _edit(lambda m, n: m.update({"more": m[n]})),
        "shards-inconsistent",
    ),
    "tensor in two shards": (_twice, "shards-inconsistent"),
    "tensor listed twice": (
        lambda index, _: index.write_text('{"weight_map": {"a": "x", "a": "y"}}'),
        "index-malformed",
    ),
    "no weight_map": (lambda index, _: index.write_text("{}"), "index-malformed"),
    "no text for a shard": (
        _edit(lambda m, n: m.update({n: 3})),  # type: ignore[dict-item]
        "index-malformed",
    ),
    "no JSON": (lambda index, _: index.write_text("{"), "index-malformed"),
    "no text": (lambda index, _: index.write_bytes(b"\xff\xfe"), "index-malformed"),
    "nested": (lambda index, _: index.write_text("[" * 100_000), "index-malformed"),
    "gone": (lambda index, _: index.unlink(), "weights-unreadable"),
    "truncated shard": (_truncated, "weights-damaged"),
    "compact shard": (_compact, "weights-are-compact"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_shards_that_can_not_be_used(damage: str, tmp_path: Path) -> None:
    change, code = DAMAGES[damage]
    index = write_shards(tmp_path / "shards", tiny_model().state_dict())
    change(index, json.loads(index.read_text()))
    (tmp_path / "x.safetensors").write_text("mine")
    output = tmp_path / "out.safetensors"
    refused("convert", SPEC, *MODEL_ARGS, "--weights", index, "-o", output, error_code=code)
    with raises(WeightsError, code):  # the ordinary way
        read_weights(index)
    assert not output.exists()


def test_folders_that_can_not_be_used(tmp_path: Path) -> None:
    with raises(WeightsError, "weights-not-found", "can't be read as weights"):
        read_weights(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with raises(WeightsError, "weights-ambiguous", "holds 2 indices"):
        read_weights(tmp_path)


def test_weights_that_do_not_fit(world: World, tmp_path: Path) -> None:
    index = write_shards(tmp_path, {**tiny_model().state_dict(), "head.bias": torch.zeros(7)})
    refused(
        "convert",
        SPEC,
        *MODEL_ARGS,
        "--weights",
        index,
        error_code="weights-mismatch",
        words=["(7,)"],
    )


def test_weights_that_change_while_they_are_read(world: World, tmp_path: Path) -> None:
    weights = tmp_path / "dense.safetensors"
    weights.write_bytes(world.weights.read_bytes())
    lazy = open_lazily(SPEC, sources.parse_model_args(MODEL_ARGS[1::2]), weights)
    assert lazy is not None
    weights.write_bytes(b"")
    with pytest.raises(WeightsError) as caught:
        lazy[2]["head.weight"]
    assert caught.value.code == "weights-damaged"
    assert str(weights) in str(caught.value)


# The disk.


def test_a_full_disk_while_it_works(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: TensorScratch, tensor: Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorScratch, "put", full)
    output = tmp_path / "out.safetensors"
    refused(
        "convert", SPEC, *MODEL_ARGS, "--weights", world.weights, "-o", output,
        error_code="scratch-full",
    )  # fmt: skip
    assert not files_of(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_it_writes_leaves_what_was_there(
    error: BaseException, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.safetensors"
    output.write_text("mine")

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr("os.replace", fails)
    code = 2 if isinstance(error, OSError) else 130
    run(
        "convert", SPEC, *MODEL_ARGS, "--weights", world.weights, "-o", output, "--force", code=code
    )
    assert files_of(tmp_path) == {"out.safetensors"}
    assert output.read_text() == "mine"


@pytest.mark.parametrize("buffer", [None, 2**20])
def test_weights_edited_on_disk_are_read_as_edited(
    buffer: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the buffer of temporary files is, which depends on the file system."""
    original: Callable[..., Any] = tempfile.TemporaryFile
    if buffer is not None:
        monkeypatch.setattr(
            "tempfile.TemporaryFile", lambda **options: original(**{"buffering": buffer, **options})
        )
    weights = tmp_path / "dense.safetensors"
    save_file(state_of(all_micros()["torchvision-resnet"].model()), weights)
    streamed, whole = both_ways(
        pytest.MonkeyPatch(), f"{HERE}:micro_model", Recipe.of("tied", include=["layer1.1.*"]),
        weights, tmp_path, name="torchvision-resnet",
    )  # fmt: skip
    assert isinstance(streamed, bytes)
    assert streamed == whole


def test_what_is_written_is_what_safetensors_writes(tmp_path: Path) -> None:
    dtypes = [torch.float32, torch.int64, torch.bool, torch.float16, torch.uint8, torch.bfloat16]
    tensors = {f'ä"\n{d}.{i}': torch.ones(i, 3).to(d) for i, d in enumerate(dtypes)}
    forms = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    path = tmp_path / "out.safetensors"
    write_tensors(path, forms, tensors.__getitem__, {})
    assert path.read_bytes() == safetensors.torch.save(tensors, {"format": "pt"})


# Memory.

BIG = """
from torch import nn


def encoder(width=256, depth=80):
    layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, activation="gelu")
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
"""
MEASURED = """
import re
from pathlib import Path

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

import big_model
import tiedconv.cli
from scipy.optimize import linear_sum_assignment
from tiedconv.commands.convert_file import convert_file
from tiedconv.planning.recipe import Recipe
before = peak()
convert_file("big_model:encoder", Recipe.of({scheme!r}, rank=0), Path("out.safetensors"),
             weights="big.safetensors", force=True)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big")
    (folder / "big_model.py").write_text(BIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        with skip_memory():
            model = sources.outline("big_model:encoder")[0]
    forms = {name: (t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}
    weights = folder / "big.safetensors"
    write_tensors(weights, forms, lambda name: torch.randn(forms[name][1]) * 0.02, {})
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(("scheme", "most"), [("tied", 70e6), ("lors", 130e6)])
def test_peak_memory_is_a_fraction_of_the_model(scheme: str, most: float, big: Path) -> None:
    """A matrix has 1 MB, and a stack of them 84 MB; libraries that a fit loads take some 30 MB."""
    assert (big / "big.safetensors").stat().st_size > 250e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURED.format(scheme=scheme)],
        cwd=big, check=True, capture_output=True, text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(tiedconv.__file__).parent.parent),
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "500000",  # what is freed is given back at once
        },
    )  # fmt: skip
    assert int(done.stdout) < most

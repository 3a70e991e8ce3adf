"""Each hole that was found in the file format, and is closed."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import SPEC
from error_codes import raises
from micro import all_micros
from mutations import Entry, Parts, hash_of, pack, refs, unpack
from torch import nn
from trials import sound_files
from typer.testing import CliRunner

import tiedconv
from tiedconv.cli import app
from tiedconv.core.expr import Add, Cat, Expr, MatMul, Mul, Ref, Slice
from tiedconv.core.expr_json import all_from_json
from tiedconv.core.plan import Plan
from tiedconv.errors import CheckpointError, PlanError, SourceError, TiedconvError
from tiedconv.io.checkpoint_reader import read
from tiedconv.io.json_text import MAX_VALUES, strict_json
from tiedconv.io.safetensors_file import SafetensorsFile
from tiedconv.io.validation import check_plan, printable
from tiedconv.runtime.flops import eval_flops
from tiedconv.runtime.tie import dense_state_dict
from tiedconv.sources.size_guard import bounded


@pytest.fixture
def parts() -> Parts:
    """A sound file of a tiny ViT that names its own source, taken apart."""
    return unpack(sound_files()[0].data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.safetensors"


def write(path: Path, parts: Parts, **how: Any) -> Path:
    path.write_bytes(pack(parts, **how))
    return path


# The bytes that are used are those that were checked.


def test_who_writes_into_a_file_does_not_change_a_model_that_is_loaded(path: Path) -> None:
    path.write_bytes(sound_files()[0].data)
    model = tiedconv.load(path)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with path.open("r+b") as file:  # as `cp` does
        file.seek(-20_000, os.SEEK_END)
        file.write(b"\x7f" * 20_000)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    path.write_bytes(b"")  # mapped memory would now end the process
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_who_replaces_a_file_does_not_mix_two_in_one_model(path: Path, tmp_path: Path) -> None:
    first, second = sound_files()[:2]
    path.write_bytes(first.data)
    checkpoint = read(path)
    other = tmp_path / "other"
    other.write_bytes(second.data)
    other.replace(path)
    held = {name: tensor.clone() for name, tensor in checkpoint.tensors()}
    assert held.keys() == {e.name for e in unpack(first.data).entries}


def test_a_file_cut_while_it_is_read_is_refused(path: Path) -> None:
    path.write_bytes(sound_files()[0].data)
    checkpoint = read(path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError) as caught:
        list(checkpoint.tensors())
    assert caught.value.code == "file-damaged"


def test_a_refused_file_leaves_the_callers_model_as_it_was(path: Path) -> None:
    sound = sound_files()[2]
    parts = unpack(sound.data)
    last = parts.entries[-1]
    last.data = bytes(len(last.data))
    write(path, parts, rehash=False)
    assert sound.model is not None
    model = sound.model()
    before = copy.deepcopy(model.state_dict())
    with raises(CheckpointError, "tensor-damaged"):
        tiedconv.load(path, model=model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# JSON says one thing, to all readers.


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "repeats a key"),
        ('{"x": [{"a": 1, "\\u0061": 2}]}', "repeats a key"),
        ("NaN", "not a finite number"),
        ("[-Infinity]", "not a finite number"),
        ("[1e999]", "not finite"),
        (f"[{2**63}]", "too large"),
        ("1" * 5000, "digits"),
        ('"\\ud800"', "surrogates"),
        ('{"\\udc00": 1}', "surrogates"),
        ("[" * 66 + "]" * 66, "nested deeper"),
        ("[" * 100_000, "nested deeper"),
        ("[" + "0," * MAX_VALUES + "0]", "more than"),
        ("\ufeff{}", "BOM"),
        ("{", "Expecting"),
    ],
)  # fmt: skip
def test_json_that_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        strict_json(text)


def test_json_within_the_limits_is_read() -> None:
    data = {"a": [1, -0.5, None, True, "\u20ac\U0001f600", {"b": {}}], "c": 2**63 - 1}
    assert strict_json(json.dumps(data)) == data
    assert strict_json("[" * 64 + "]" * 64)


def header(path: Path, entries: str, data: bytes = bytes(8)) -> Path:
    text = ("{" + entries + "}").encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


A = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
B = '"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}'


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        (f"{A}, {A}, {B}", "repeats a key"),
        ('"__metadata__": {"x": "1", "x": "2"}, ' + f"{A}, {B}", "repeats a key"),
        ('"__metadata__": {"x": 1}, ' + f"{A}, {B}", "not text"),
        ('"__metadata__": [], ' + f"{A}, {B}", "not text"),
        (A, "the file has 8 for them"),
        (f"{A}, {B}".replace("[4, 8]", "[5, 9]"), "does not begin"),
        (f"{A}, {B}".replace("[4, 8]", "[0, 4]"), "does not begin"),
        (f"{A}, {B}".replace("[4, 8]", "[8, 4]"), "size that does not match"),
        (f"{A}, {B}".replace("[1]", "[2]"), "size that does not match"),
        (f"{A}, {B}".replace("[1]", "[true]"), "malformed"),
        (f"{A}, {B}".replace("[1]", "[1.0]"), "malformed"),
        (f"{A}, {B}".replace("[1]", "[-1]"), "malformed"),
        (f"{A}, {B}".replace("[1]", f"[0, {2**50}]"), "malformed"),
        (f"{A}, {B}".replace("[0, 4]", "[false, 4]"), "malformed"),
        (f"{A}, {B}".replace("F32", "F4"), "unknown type 'F4'"),
        (f"{A}, {B}".replace("}", ', "x": 1}'), "malformed"),
        (f"{A}, {B}".replace('"b"', '"\\u001b[31mb"'), "not printable"),
        (f"{A}, {B}".replace('"b"', '""'), "empty"),
        (f"{A}, {B}".replace('"b"', f'"{"b" * 501}"'), "too long"),
    ],
)
def test_headers_that_are_refused(entries: str, reason: str, path: Path) -> None:
    with raises(CheckpointError, "file-damaged", reason):
        assert SafetensorsFile(header(path, entries)).shapes
    assert SafetensorsFile(header(path, f"{A}, {B}")).shapes == {"a": (1,), "b": (1,)}


def test_a_truth_value_that_is_neither_is_refused(path: Path) -> None:
    entry = '"a": {"dtype": "BOOL", "shape": [8], "data_offsets": [0, 8]}'
    assert SafetensorsFile(header(path, entry)).tensor("a").sum() == 0
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(header(path, entry, b"\x07" * 8)).tensor("a")
    assert caught.value.code == "file-damaged"


def test_a_header_of_many_megabytes_is_refused_unread(path: Path, parts: Parts) -> None:
    parts.extra["x"] = "a" * 9 * 2**20
    with raises(CheckpointError, "file-damaged"):
        read(write(path, parts))


# A plan costs what a model of its size costs.


def outer(n: int) -> Expr:
    return Slice(MatMul(Ref("tied/u", (n, 1)), Ref("tied/v", (1, n))), 0, 0, 1)


EXPLOSIONS: dict[str, Callable[[], dict[str, Expr]]] = {
    "an outer product, cut": lambda: {"w": outer(2000)},
    "a broadcast sum, cut": lambda: {
        "w": Slice(Add(Ref("tied/u", (2000, 1)), Ref("tied/v", (1, 2000))), 0, 0, 1)
    },
    "a broadcast product in three dimensions": lambda: {
        "w": Slice(
            Mul(Mul(Ref("tied/a", (300, 1, 1)), Ref("tied/b", (1, 300, 1))),
                Ref("tied/c", (1, 1, 300))), 0, 0, 1)
    },
    "one tensor joined 400 times, cut": lambda: {
        "w": Slice(Cat((Ref("tied/u", (5000,)),) * 400, 0), 0, 0, 1)
    },
    "matrices multiplied over and over": lambda: {
        "w": power(Ref("tied/u", (400, 400)), 5)
    },
    "many small weights that each read a large tensor": lambda: {
        f"w{i}": Slice(MatMul(Ref("tied/u", (1, 2000)), Ref("tied/v", (2000, 300))), 1, i, i + 1)
        for i in range(300)
    },
}  # fmt: skip


def power(expr: Expr, times: int) -> Expr:
    for _ in range(times):
        expr = MatMul(expr, expr)
    return expr


@pytest.mark.parametrize("what", EXPLOSIONS)
def test_expressions_that_explode_are_refused_unevaluated(what: str) -> None:
    plan = Plan(EXPLOSIONS[what](), (), {})
    plan.validate()
    with raises(PlanError, "plan-too-expensive"):
        check_plan(plan)


def test_the_plan_of_every_micro_model_is_far_within_the_limits() -> None:
    for micro in all_micros().values():
        for scheme in ("basis", "lors", "shared"):
            plan = tiedconv.plan(micro.model(), scheme)
            check_plan(plan)
            for expr in plan.weights.values():
                size = math.prod(expr.shape) + sum(map(math.prod, expr.refs.values()))
                values, products = eval_flops(expr)
                assert values < 4 * size
                assert products < size**1.5


def test_all_expressions_together_are_bounded_while_they_are_read() -> None:
    one = ["cat", [["ref", "tied/u", [2]]] * 500, 0]
    assert len(all_from_json({f"w{i}": one for i in range(50)})) == 50
    with raises(PlanError, "plan-too-large"):
        all_from_json({f"w{i}": one for i in range(100)})
    expr = Cat((Ref("tied/u", (2,)),) * 500, 0)
    with raises(PlanError, "plan-too-large"):  # and of our own plans, before they are fitted
        Plan({f"w{i}": expr for i in range(100)}, (), {}).validate()


def test_a_sum_with_a_product_that_is_broadcast_is_evaluated() -> None:
    # torch.addmm can't broadcast the product: this was well-typed and failed when it was computed.
    base, b, a = torch.randn(5, 3), torch.randn(1, 2), torch.randn(2, 3)
    expr = Add(Ref("base", (5, 3)), MatMul(Ref("b", (1, 2)), Ref("a", (2, 3))))
    assert torch.allclose(expr.evaluate({"base": base, "b": b, "a": a}.__getitem__), base + b @ a)


# What a file says of itself agrees with what it holds.


def group_of_nothing(parts: Parts) -> None:
    parts.record["plan"]["groups"][0]["members"] = []


def member_that_is_no_weight(parts: Parts) -> None:
    parts.record["plan"]["groups"][0]["members"][0][0][0] = "head.weight"


def factor_that_is_not_stored(parts: Parts) -> None:
    parts.record["plan"]["groups"][0]["factors"]["B7"] = [4]


def two_groups_of_one_name(parts: Parts) -> None:
    groups = parts.record["plan"]["groups"]
    groups[1]["name"] = groups[0]["name"]


def a_flip_that_is_no_truth_value(parts: Parts) -> None:
    parts.record["plan"]["groups"][0]["members"][0][1] = 1


def an_error_that_is_a_truth_value(parts: Parts) -> None:
    parts.record["plan"]["groups"][0]["error"] = True


def an_error_beyond_all_bounds(parts: Parts) -> None:
    parts.record["plan"]["groups"][0]["error"] = 1e300


def a_factor_of_whole_numbers(parts: Parts) -> None:
    entry = next(e for e in parts.entries if e.name.startswith("tied/"))
    entry.dtype = "I32"


def factors_of_two_kinds(parts: Parts) -> None:
    weights = parts.record["plan"]["weights"].values()
    names = next(names for e in weights if len(names := {r[1] for r in refs(e)}) > 1)
    entry = parts.entry(min(names))
    entry.dtype, entry.data = "F64", entry.data * 2


def a_weight_named_as_a_factor(parts: Parts) -> None:
    weights = parts.record["plan"]["weights"]
    factor = next(e.name for e in parts.entries if e.name.startswith("tied/"))
    weights[factor] = next(iter(weights.values()))


def an_alias_of_itself(parts: Parts) -> None:
    parts.record["plan"]["aliases"]["a"] = "a"


def an_alias_of_an_alias(parts: Parts) -> None:
    parts.record["plan"]["aliases"].update(a="head.bias", b="a")


def a_buffer_that_is_no_text(parts: Parts) -> None:
    parts.record["plan"]["buffers"].append(3)


def an_empty_tensor_too_many(parts: Parts) -> None:
    parts.entries.append(Entry("extra", "F32", [0, 3], b""))


def versions_that_are_a_list(parts: Parts) -> None:
    parts.source["versions"] = ["torch"]


def a_fine_tuning_without_figures(parts: Parts) -> None:
    parts.record["history"].append({"step": "finetune", "train_images": None})


def a_recipe_that_is_a_text(parts: Parts) -> None:
    parts.record["history"][0]["recipe"] = "tied"


def rules_that_are_numbers(parts: Parts) -> None:
    parts.record["history"][0]["recipe"]["rules"] = [3]


def a_top1_of_a_thousand(parts: Parts) -> None:
    parts.record["history"][-1]["top1"] = 1000


def a_teacher_beyond_all_bounds(parts: Parts) -> None:
    parts.record["history"][-1]["top1_teacher"] = 2


def a_calibration_that_is_a_text(parts: Parts) -> None:
    parts.record["history"][0]["calibration"] = "by heart"


def a_calibration_with_images_of_text(parts: Parts) -> None:
    parts.record["history"][0]["calibration"] = {"images": "many"}


def an_endless_history(parts: Parts) -> None:
    parts.record["history"] = [{"step": "x"}] * 2000


def a_version_that_is_a_truth_value(parts: Parts) -> None:
    parts.record["format"] = True


@pytest.mark.parametrize(
    "change",
    [
        group_of_nothing, member_that_is_no_weight, factor_that_is_not_stored,
        two_groups_of_one_name, a_flip_that_is_no_truth_value, an_error_that_is_a_truth_value,
        an_error_beyond_all_bounds, a_factor_of_whole_numbers, factors_of_two_kinds,
        a_weight_named_as_a_factor, an_alias_of_itself, an_alias_of_an_alias,
        a_buffer_that_is_no_text, an_empty_tensor_too_many, versions_that_are_a_list,
        a_fine_tuning_without_figures, a_recipe_that_is_a_text, rules_that_are_numbers,
        a_top1_of_a_thousand, an_endless_history, a_version_that_is_a_truth_value,
        a_teacher_beyond_all_bounds, a_calibration_that_is_a_text,
        a_calibration_with_images_of_text,
    ],
)  # fmt: skip
def test_contradictions_are_refused_by_every_reader(
    change: Callable[[Parts], None], path: Path, parts: Parts
) -> None:
    tiedconv.report(write(path, parts))
    change(parts)
    write(path, parts)
    for reader in (tiedconv.report, tiedconv.load, tiedconv.verify):
        with pytest.raises(CheckpointError) as caught:
            reader(path)
        assert caught.value.what
        assert caught.value.hint


def test_what_plain_torch_would_refuse_is_refused_in_our_words(path: Path, parts: Parts) -> None:
    entry = parts.entry("head.bias")
    entry.dtype = "I32"  # nn.Parameter takes no whole numbers
    with raises(CheckpointError, "wrong-model"):
        tiedconv.load(write(path, parts))


# A source asks for no more than the file's own model, and for nothing outside of it.


@pytest.mark.parametrize(
    "arguments",
    [
        {"depth": 10**6}, {"embed_dim": 3 * 10**5}, {"img_size": 10**5}, {"num_classes": 10**6},
        {"mlp_ratio": 1e9}, {"depth": 10**9}, {"embed_dim": -3}, {"depth": "x"}, {"nothing": 1},
    ],
)  # fmt: skip
def test_hostile_arguments_build_no_giant(
    arguments: dict[str, Any], path: Path, parts: Parts
) -> None:
    parts.source["kwargs"].update(arguments)
    with pytest.raises((SourceError, CheckpointError)):
        tiedconv.load(write(path, parts))


@pytest.mark.parametrize("side", [10_000, 65_536])
def test_a_source_asks_for_no_giant_images(side: int, path: Path, parts: Parts) -> None:
    parts.source["preprocess"] = {
        "size": side, "resize": None, "mean": [0.5] * 3, "std": [0.5] * 3,
        "interpolation": "bilinear",
    }  # fmt: skip
    with raises(CheckpointError, "metadata-invalid"):
        tiedconv.verify(write(path, parts))


def test_building_within_bounds_counts_what_is_made() -> None:
    with bounded(100, 2):
        nn.Linear(9, 10)
        assert len(torch.linspace(0, 1, 5).tolist()) == 5
        # What a constructor runs to learn a backbone's shape: shapes that would broadcast to more.
        kernels = torch.ones(1, 2048, 1024).reshape_as(torch.ones(2048, 1024, 1, 1))
        assert torch.conv2d(torch.ones(1, 1024, 56, 56), kernels, None, 8).shape[-1] == 7
        norm = torch.batch_norm  # by position, as torch.nn.functional calls it
        assert norm(torch.ones(1, 300, 300), *[None] * 4, True, 0.0, 1e-5, False).numel() == 90_000
    for make in (
        lambda: nn.Linear(10_000, 10_000),
        lambda: torch.zeros(10**5, 10**5),
        lambda: torch.linspace(0, 1, 10**9),
        lambda: torch.ones(10**5, 1) + torch.ones(10**5),
        lambda: torch.outer(torch.ones(10**5), torch.ones(10**5)),
        lambda: torch.ones(10).repeat(10**6, 10),
        lambda: torch.ones(10**5).tolist(),
        lambda: torch.conv2d(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), padding=10**4),
        lambda: torch.ones(10**4, 1) @ torch.ones(1, 10**4),
        lambda: [nn.Sequential(nn.Identity()) for _ in range(10**5)],
    ):
        with bounded(100, 2), raises(SourceError, "model-too-large"):
            make()
    assert nn.Linear(3000, 3000).weight.numel() == 9_000_000  # afterwards as before


PLACE = "tiedconv-was-here"


@pytest.mark.parametrize(
    "source",
    [
        {"spec": "timm:local-dir:{place}"},
        {"spec": "timm:hf-hub:{place}"},
        {"spec": "{place}"},
        {"spec": SPEC, "kwargs": {"checkpoint_path": "{place}"}},
        {"spec": SPEC, "kwargs": {"pretrained_cfg_overlay": {"file": "{place}"}}},
        {"spec": "resnet18", "kwargs": {"weights": "{place}"}},
        {"spec": "hf:{place}"},
        {"spec": "hf:{place}", "config": {"architecture": "ViTForImageClassification"}},
        {
            "spec": "hf:x",
            "config": {
                "architecture": "TimmBackbone", "model_type": "timm_backbone",
                "backbone": "local-dir:{place}",
            },
        },
        {
            "spec": "hf:x",
            "config": {
                "architecture": "TimmWrapperForImageClassification", "model_type": "timm_wrapper",
                "model_args": {"checkpoint_path": "{place}"},
            },
        },
        {
            "spec": "hf:x",
            "config": {
                "architecture": "DetrForObjectDetection", "model_type": "detr",
                "use_timm_backbone": False, "backbone": "{place}",
            },
        },
    ],
)  # fmt: skip
def test_no_path_in_a_file_is_followed(
    source: dict[str, Any], path: Path, parts: Parts, tmp_path: Path
) -> None:
    place = tmp_path / PLACE
    place.mkdir()
    (place / "config.json").write_text('{"architecture": "resnet18", "model_type": "vit"}')
    changed = json.dumps({**parts.source, **source}).replace("{place}", str(place))
    parts.source = json.loads(changed)
    write(path, parts)
    _OPENED.clear()
    for reader in (tiedconv.report, tiedconv.load, tiedconv.verify):
        with contextlib.suppress(TiedconvError):
            reader(path)
    assert not [name for name in _OPENED if PLACE in name]


_OPENED: list[str] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir"):
        _OPENED.append(str(arguments[0]))


sys.addaudithook(_note)  # can't be removed again; it only notes names


# What is printed acts on no terminal.

ESCAPES = "\x1b[31mred\x1b]0;owned\x07\r\u202e[bold]markup[/bold]\n"


def test_texts_of_a_file_act_on_no_terminal(path: Path, parts: Parts) -> None:
    history = parts.record["history"]
    history[0]["recipe"]["rules"] = [{"scheme": ESCAPES, ESCAPES: ESCAPES}]
    history[0]["recipe"]["params"] = ESCAPES
    history[0]["calibration"] = {"images": 3, "effort": ESCAPES}
    history[1].update(data=ESCAPES, teacher=ESCAPES)
    history.append({"step": ESCAPES, ESCAPES: [ESCAPES]})
    parts.source.update(spec=ESCAPES, versions={ESCAPES: ESCAPES}, weights_name=ESCAPES)
    write(path, parts)
    for form in ("table", "md", "csv", "json"):
        result = CliRunner().invoke(app, ["report", str(path), "--format", form])
        assert result.exit_code == 0, result.output
        assert all(c.isprintable() or c == "\n" for c in result.output)
        if form == "table":
            assert r"\x1b[31mred\x1b]0;owned\x07\r\u202e[bold]markup[/bold]\n" in result.output
    result = CliRunner().invoke(app, ["verify", str(path)])
    assert all(c.isprintable() or c == "\n" for c in result.output)


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\nb", "\u202eabc", ""])
def test_names_that_act_on_a_terminal_are_refused(name: str, path: Path, parts: Parts) -> None:
    for key in ("name", "scheme"):
        forged = copy.deepcopy(parts)
        forged.record["plan"]["groups"][0][key] = name
        with pytest.raises(CheckpointError) as caught:
            tiedconv.report(write(path, forged))
        assert str(caught.value).isprintable()


def test_markup_in_a_name_is_printed_as_it_is(path: Path, parts: Parts) -> None:
    parts.record["plan"]["groups"][0]["scheme"] = "[red]x[/red]"
    result = CliRunner().invoke(app, ["report", str(write(path, parts)), "--all-groups"])
    assert "[red]x[/red]" in result.output


def test_printable_keeps_what_is_printable() -> None:
    data = {"a": ["größe", 3, None, {"b": 0.5}], "日本": "\t"}
    assert printable(data) == {"a": ["größe", 3, None, {"b": 0.5}], "日本": r"\t"}
    with pytest.raises(ValueError, match="too long"):
        printable("x" * 200_000)


# What a forger can do, and what shows it.


def test_honest_hashes_of_other_weights_are_another_file(path: Path, parts: Parts) -> None:
    sound = sound_files()[0]
    entry = parts.entry("head.bias")
    entry.data = b"\x01" * len(entry.data)
    write(path, parts)
    assert hash_of(entry) == read(path).hashes["head.bias"]
    loaded = dense_state_dict(tiedconv.load(path))
    assert not torch.equal(loaded["head.bias"], sound.dense["head.bias"])
    assert read(path).file.metadata["digest"] != sound.digest

"""Every exact move, on every block of every tiny model it applies to, changes no output."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from covering import covering, slow_unless
from micro import Micro, all_detectors, all_micros, every_micro, original_logits
from torch import Tensor

from tiedconv.core.plan import Block, Slot, Span
from tiedconv.core.units import count_of, units_of
from tiedconv.families import find_blocks
from tiedconv.families.inspect import ModelInfo, inspect_model
from tiedconv.numerics import symmetries as gauge
from tiedconv.numerics.symmetries import WeightEditor
from tiedconv.schemes import all_schemes, make_scheme
from tiedconv.schemes._align import is_whole

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
ONLY_SINGLE = {"hf-dab-detr"}  # computes its positions and its attention in float32

Move = Callable[[WeightEditor, Block, torch.Generator], bool]


@functools.cache
def anatomy_of(name: str) -> ModelInfo:
    return inspect_model(every_micro()[name].model())


@functools.cache
def blocks_of(name: str) -> tuple[Block, ...]:
    info = anatomy_of(name)
    return tuple(block for _, block in find_blocks(info.shapes, info.hints))


def off_by(name: str, dtype: torch.dtype, editor: WeightEditor) -> float:
    """How far the moved weights' logits are from the original's."""
    micro = every_micro()[name]
    model = micro.model(dtype)
    own = model.state_dict()
    with torch.no_grad():
        for key, tensor in editor.tensors.items():
            assert tensor.dtype == own[key].dtype, key
            assert tensor.shape == own[key].shape, key
            own[key].copy_(tensor)
    wanted = original_logits(name, dtype)
    return float((micro.logits(model) - wanted).abs().max() / wanted.abs().max())


def bench_for(name: str, dtype: torch.dtype) -> WeightEditor:
    own = every_micro()[name].model(dtype).state_dict()
    return WeightEditor({key: own[key] for key in anatomy_of(name).shapes})


def positive(count: int, generator: torch.Generator) -> Tensor:
    return 0.5 + 1.5 * torch.rand(count, generator=generator)


def signed(count: int, generator: torch.Generator) -> Tensor:
    signs = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    return signs * positive(count, generator)


def conv_rows(i: int) -> Move:
    def move(editor: WeightEditor, block: Block, generator: torch.Generator) -> bool:
        if block.kind != "bottleneck":
            return False
        c = signed(block.slots[f"conv{i}"].rows, generator)
        gauge.scale_conv_rows(editor, block, i, c)
        return True

    return move


def bottleneck_units(editor: WeightEditor, block: Block, generator: torch.Generator) -> bool:
    if block.kind != "bottleneck" or not block.relu:
        return False
    f = positive(block.slots["conv3"].columns, generator)
    gauge.scale_bottleneck_units(editor, block, f)
    return True


def bottleneck_order(which: tuple[bool, bool]) -> Move:
    def move(editor: WeightEditor, block: Block, generator: torch.Generator) -> bool:
        if block.kind != "bottleneck" or not block.permutable:
            return False
        conv1, conv2 = block.slots["conv1"], block.slots["conv2"]
        if conv2.columns != conv1.rows * torch.Size(conv2.kernel).numel():
            return False  # grouped: its units may not change places
        orders = [
            torch.randperm(s.rows, generator=generator) if wanted else None
            for s, wanted in zip((conv1, conv2), which, strict=True)
        ]
        gauge.permute_bottleneck(editor, block, orders[0], orders[1])
        return True

    return move


def hidden_order(editor: WeightEditor, block: Block, generator: torch.Generator) -> bool:
    if block.kind != "ffn" or not block.permutable:
        return False
    gauge.permute_hidden(
        editor, block, torch.randperm(block.slots["up"].rows, generator=generator)
    )  # fmt: skip
    return True


def squeezed_order(editor: WeightEditor, block: Block, generator: torch.Generator) -> bool:
    if "reduce" not in block.slots or not block.permutable:
        return False
    order = torch.randperm(block.slots["reduce"].rows, generator=generator)
    gauge.permute_units(editor, block, "squeezed", order)
    return True


def hidden_scale(editor: WeightEditor, block: Block, generator: torch.Generator) -> bool:
    if block.kind != "ffn" or not (block.permutable and block.relu):
        return False
    gauge.scale_hidden(editor, block, positive(block.slots["up"].rows, generator))
    return True


def head_bases(which: tuple[bool, bool]) -> Move:
    def move(editor: WeightEditor, block: Block, generator: torch.Generator) -> bool:
        if block.kind != "attention" or not (
            block.permutable and block.rotatable and block.heads
        ):  # fmt: skip
            return False
        d = block.slots["q"].rows // block.heads

        def invertible() -> Tensor:
            g = torch.randn(block.heads or 0, d, d, generator=generator, dtype=torch.float64)
            return torch.eye(d, dtype=torch.float64) + 0.1 * g

        qk, vo = (invertible() if wanted else None for wanted in which)
        gauge.transform_heads(editor, block, qk, vo)
        return True

    return move


def head_order(editor: WeightEditor, block: Block, generator: torch.Generator) -> bool:
    units = units_of(block) if block.kind == "attention" and block.permutable else []
    for count in (count_of(block, u) for u in units):
        gauge.permute_heads(editor, block, torch.arange(count or 0).flip(0))
    return bool(units)


def fold(editor: WeightEditor, block: Block, generator: torch.Generator) -> bool:
    return is_whole(block) and gauge.fold_norm(editor, block)


MOVES: dict[str, Move] = {
    "scale rows of conv1": conv_rows(1),
    "scale rows of conv2": conv_rows(2),
    "scale rows of conv3": conv_rows(3),
    "scale bottleneck units": bottleneck_units,
    "permute units after conv1": bottleneck_order((True, False)),
    "permute units after conv2": bottleneck_order((False, True)),
    "permute units after both": bottleneck_order((True, True)),
    "permute hidden units": hidden_order,
    "permute squeezed units": squeezed_order,
    "scale hidden units": hidden_scale,
    "change the basis of q and k": head_bases((True, False)),
    "change the basis of v and o": head_bases((False, True)),
    "change both bases": head_bases((True, True)),
    "permute heads": head_order,
    "fold norms": fold,
}


def taking(dtype: torch.dtype) -> list[str]:
    """The tiny models that can compute in a precision."""
    single = dtype == torch.float32
    return [name for name in every_micro() if single or name not in ONLY_SINGLE]


def apply(move: Move, name: str, dtype: torch.dtype) -> tuple[WeightEditor, int]:
    """A move on every block it applies to, and on how many it did."""
    editor = bench_for(name, dtype)
    generator = torch.Generator().manual_seed(4)
    return editor, sum(move(editor, block, generator) for block in blocks_of(name))


@pytest.mark.parametrize(
    ("dtype", "models"),
    [
        (torch.float64, all_micros()),
        pytest.param(torch.float64, all_detectors(), marks=pytest.mark.slow),
        pytest.param(torch.float32, every_micro(), marks=pytest.mark.slow),
    ],
    ids=["double", "detectors", "single"],
)
@pytest.mark.parametrize("move", MOVES)
def test_a_move_changes_no_output(move: str, dtype: torch.dtype, models: dict[str, Micro]) -> None:
    moved = 0
    for name in [n for n in taking(dtype) if n in models]:
        editor, applied = apply(MOVES[move], name, dtype)
        if applied:
            moved += applied
            assert off_by(name, dtype, editor) < TOLERANCE[dtype], name
    assert moved >= 2 or models == all_detectors(), "this move was never tried"


@pytest.mark.parametrize("move", MOVES)
def test_a_move_does_change_the_weights_and_no_tensor_it_was_given(move: str) -> None:
    for name in all_micros():
        own = all_micros()[name].model().state_dict()
        before = {key: t.clone() for key, t in own.items()}
        editor = WeightEditor(own)
        generator = torch.Generator().manual_seed(4)
        applied = sum(MOVES[move](editor, block, generator) for block in blocks_of(name))
        assert all(torch.equal(own[key], t) for key, t in before.items())
        changed = any(not torch.equal(editor.tensors[key], t) for key, t in before.items())
        assert changed == bool(applied)


@pytest.mark.slow
def test_all_moves_after_each_other_change_no_output() -> None:
    for name in taking(torch.float64):
        editor = bench_for(name, torch.float64)
        generator = torch.Generator().manual_seed(5)
        for move in MOVES.values():
            for block in blocks_of(name):
                move(editor, block, generator)
        assert off_by(name, torch.float64, editor) < 1e-9, name


VARIANTS: list[tuple[str, dict[str, object]]] = [
    *((scheme, {}) for scheme in all_schemes()),
    ("tied", {"groups": "all"}),
    ("tied", {"groups": "all", "first": "expand", "spatial": True}),
    ("tied", {"groups": "adjacent:2", "first": "slice"}),
    ("tied", {"first": "slice"}),
    ("tied", {"pairing": "vo-qk"}),
    ("tied", {"pairing": "vo-qk", "groups": "all"}),
    ("lors", {"groups": "adjacent:2"}),
    ("lors", {"groups": "cycle:2"}),
]


ALIGNED = [
    *((name, *variant) for variant in VARIANTS for name in all_micros()),
    # How an architecture differs from another shows with any options.
    *(
        (name, s, {})
        for s in ("tied", "lors")
        for name in all_detectors()
        if name not in all_micros()
    ),
]


SLOW = ("hf-deimv2", "hf-d-fine", "hf-rt-detr", "hf-rt-detr-v2")  # seconds each
FAST = covering(
    [(name, f"{scheme} {options}") for name, scheme, options in ALIGNED if name not in SLOW], 1, 2
)


@pytest.mark.parametrize(
    ("name", "scheme", "options"),
    slow_unless(ALIGNED, [c for c in ALIGNED if (c[0], f"{c[1]} {c[2]}") in FAST]),
    ids=str,
)
def test_aligning_changes_no_output(name: str, scheme: str, options: dict[str, object]) -> None:
    for dtype, tolerance in TOLERANCE.items():
        if name not in taking(dtype):
            continue
        editor = bench_for(name, dtype)
        make_scheme(scheme, options).align(blocks_of(name), editor)
        assert off_by(name, dtype, editor) < tolerance


@pytest.mark.parametrize("scheme", slow_unless(all_schemes(), ("tied", "basis")))
def test_aligning_only_part_of_a_block_changes_no_output(scheme: str) -> None:
    """As when a recipe excludes one matrix: what it leaves out must not be spoilt."""
    for name in all_micros():
        for skip in (0, -1):
            parts = []
            for block in blocks_of(name):
                tensors = [slot.tensor for slot in block.slots.values()]
                parts.append(block.keep([t for t in tensors if t != tensors[skip]]))
            editor = bench_for(name, torch.float64)
            make_scheme(scheme, {}).align([b for b in parts if b.slots], editor)
            assert off_by(name, torch.float64, editor) < 1e-9, name


def test_norms_of_q_and_k_leave_heads_their_order_alone() -> None:
    blocks = [b for b in blocks_of("timm-vit-qknorm") if b.kind == "attention"]
    assert blocks
    for block in blocks:
        assert block.permutable
        assert not block.rotatable
        editor = bench_for("timm-vit-qknorm", torch.float32)
        d = block.slots["q"].rows // (block.heads or 1)
        gauge.transform_heads(editor, block, torch.rand(block.heads or 1, d, d))
        assert not editor.edited


def test_a_dead_norm_is_not_folded() -> None:
    block = next(b for b in blocks_of("timm-vit") if b.kind == "ffn")
    editor = bench_for("timm-vit", torch.float32)
    editor.edit(block.vectors["norm.weight"])[3] = 0.0
    before = {key: t.clone() for key, t in editor.tensors.items()}
    assert not gauge.fold_norm(editor, block)
    assert all(torch.equal(editor.tensors[key], t) for key, t in before.items())


@pytest.mark.slow
def test_dead_units_and_constant_weights_align_without_nan() -> None:
    for name in ("torchvision-resnet", "torch-encoder", "timm-vit"):
        micro = all_micros()[name]
        for change in (torch.Tensor.zero_, lambda t: t.fill_(0.01), half_dead):
            model = micro.model(torch.float64)
            with torch.no_grad():
                for block in blocks_of(name):
                    for slot in block.slots.values():
                        change(model.get_parameter(slot.tensor))
            before = micro.logits(model)
            own = model.state_dict()
            for scheme in all_schemes():
                editor = WeightEditor({key: own[key].clone() for key in anatomy_of(name).shapes})
                make_scheme(scheme, {}).align(blocks_of(name), editor)
                moved = micro.model(torch.float64)
                moved.load_state_dict(editor.tensors)
                after = micro.logits(moved)
                assert torch.isfinite(after).all()
                assert float((after - before).abs().max()) < 1e-8 * float(before.abs().max())


def half_dead(tensor: Tensor) -> Tensor:
    return tensor[: len(tensor) // 2].zero_()


def test_a_weight_editor_copies_a_tensor_once_and_only_when_edited() -> None:
    given = {"w": torch.ones(2, 3), "b": torch.ones(4)}
    editor = WeightEditor(given)
    editor.edit(Slot.whole("w", (2, 3))).mul_(2)
    editor.edit(Slot.whole("w", (2, 3))).mul_(3)
    editor.edit(Span("b", 1, 2)).zero_()
    assert torch.equal(editor.tensors["w"], torch.full((2, 3), 6.0))
    assert editor.tensors["b"].tolist() == [1, 0, 1, 1]
    assert torch.equal(given["w"], torch.ones(2, 3))
    assert torch.equal(given["b"], torch.ones(4))

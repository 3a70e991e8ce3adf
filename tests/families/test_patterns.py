"""Which blocks are found: single matrices, numbers in words, nested pairs, fused tensors, gates."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tiedconv.core.plan import Block
from tiedconv.core.units import units_of
from tiedconv.families import all_families, find_blocks

Shapes = Mapping[str, tuple[int, ...]]


def found(shapes: Shapes) -> dict[str, tuple[str, Block]]:
    """Family and block of each tensor."""
    return {
        slot.tensor: (family, block)
        for family, block in find_blocks(shapes)
        for slot in block.slots.values()
    }


def pairs(shapes: Shapes) -> set[tuple[str, str]]:
    blocks = (block for _, block in find_blocks(shapes) if block.kind == "ffn")
    return {(b.slots["up"].tensor, b.slots["down"].tensor) for b in blocks}


def test_a_matrix_without_an_equal_is_a_stack_of_its_own() -> None:
    family, block = found({"classifier.weight": (100, 64), "classifier.bias": (100,)})[
        "classifier.weight"
    ]
    assert (family, block.kind, block.unmatched, block.stack) == (
        "unmatched", "linear", True, "classifier",
    )  # fmt: skip


@pytest.mark.parametrize(
    "shapes",
    [
        {"conv.weight": (64, 1, 3, 3)},  # depthwise
        {"word_embeddings.weight": (1000, 64)},  # a table
        {"head.weight": (7, 64)},  # not worth two factors
        {"table": (64, 64)},
        {"norm.weight": (64,)},
    ],
)
def test_what_is_no_matrix_of_a_layer_is_in_no_block(shapes: Shapes) -> None:
    assert find_blocks(shapes) == []


def test_a_class_decides_what_a_table_is_where_it_is_known() -> None:
    shapes = {"embed.weight": (64, 32)}
    assert find_blocks(shapes) == []
    assert find_blocks(shapes, {"embed": "Embedding"}) == []
    assert len(find_blocks(shapes, {"embed": "Linear"})) == 1


@pytest.mark.parametrize(
    ("names", "stack"),
    [
        (["block4.block4-1.f.x.weight", "block4.block4-2.f.x.weight"], "block4.block4-*"),
        (["f.denselayer1.x.weight", "f.denselayer2.x.weight"], "f.denselayer*"),
        (["s4.b1.x.weight", "s4.b2.x.weight"], "s4.b*"),
        (["stages_1.x.weight", "stages_2.x.weight"], "stages_*"),
        (["stages.1.x.weight", "stages.2.x.weight"], "stages.*"),
        (["m.a.w1.weight", "m.a.w2.weight"], "m.a.w1"),  # two layers of one module
    ],
)  # fmt: skip
def test_a_number_in_a_word_counts_layers_too(names: list[str], stack: str) -> None:
    blocks = found(dict.fromkeys(names, (32, 32)))
    assert blocks[names[0]][1].stack == stack


def test_a_squeeze_between_two_layers_is_a_pair_and_parts_none() -> None:
    layer = {
        "a.weight": (96, 16), "se.one.weight": (4, 96), "se.two.weight": (96, 4),
        "b.weight": (16, 96), "c.weight": (16, 16),
    }  # fmt: skip
    shapes = {f"trunk.{n}.{name}": shape for n in range(2) for name, shape in layer.items()}
    expected = {
        (f"trunk.{n}.{a}.weight", f"trunk.{n}.{b}.weight")
        for n in range(2)
        for a, b in (("a", "b"), ("se.one", "se.two"))
    }
    assert pairs(shapes) == expected


def test_matrices_of_different_modules_are_no_pair() -> None:
    layer = {"one.out.weight": (96, 16), "two.into.weight": (16, 96)}
    assert pairs({f"l.{n}.{name}": s for n in range(2) for name, s in layer.items()}) == set()


def test_one_tensor_may_hold_the_gate_and_up() -> None:
    shapes = {"blocks.0.mlp.fc1.weight": (256, 64), "blocks.0.mlp.fc2.weight": (64, 128)}
    ((family, block),) = find_blocks(shapes)
    gate, up = block.slots["gate"], block.slots["up"]
    assert family == "swiglu"
    assert (gate.start, gate.stop, up.start, up.stop) == (0, 128, 128, 256)
    assert block.slots["down"].matrix_shape == (64, 128)
    assert block.permutable  # together
    assert not block.keep(["blocks.0.mlp.fc2.weight"]).permutable


def test_keys_and_values_may_share_a_tensor() -> None:
    shapes = {
        "blocks.0.attn.q.weight": (64, 64), "blocks.0.attn.kv.weight": (128, 64),
        "blocks.0.attn.proj.weight": (64, 64),
    }  # fmt: skip
    ((family, block),) = find_blocks(shapes)
    assert (family, block.kind) == ("spatial-reduction", "attention")
    assert (block.slots["k"].stop, block.slots["v"].start) == (64, 64)


def test_a_fused_tensor_of_other_parts_is_no_attention() -> None:
    # Keys and queries of 16, values of 64: thirds would mix them.
    shapes = {"blocks.0.attn.qkv.weight": (96, 64), "blocks.0.attn.proj.weight": (64, 64)}
    assert {block.kind for _, block in find_blocks(shapes)} == {"linear"}


def test_a_tensor_belongs_to_one_block() -> None:
    shapes = {
        f"model.layers.{n}.{name}.weight": shape
        for n in range(2)
        for name, shape in {
            "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64),
            "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64),
            "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96),
        }.items()
    }  # fmt: skip
    slots = [s for _, block in find_blocks(shapes) for s in block.slots.values()]
    assert len(slots) == len({s.tensor for s in slots}) == len(shapes)
    assert {family for family, _ in find_blocks(shapes)} == {"swiglu", "language-decoder"}


def test_every_family_says_what_it_looks_for() -> None:
    assert len({family.name for family in all_families()}) == len(all_families())
    assert all(family.pattern for family in all_families())


def inverted(**more: tuple[int, ...]) -> Block:
    """An inverted bottleneck of 96 units between widths of 16 and 24, with more tensors in it."""
    shapes = {
        "conv_pw.weight": (96, 16, 1, 1), "bn1.weight": (96,), "bn1.bias": (96,),
        "conv_dw.weight": (96, 1, 3, 3), "bn2.running_mean": (96,),
        "conv_pwl.weight": (24, 96, 1, 1), "bn3.weight": (24,), "bn3.num_batches_tracked": (),
        **{name.replace("__", "."): shape for name, shape in more.items()},
    }  # fmt: skip
    found = find_blocks({f"blocks.1.0.{name}": shape for name, shape in shapes.items()})
    return next(block for _, block in found if "up" in block.slots)


def test_what_lies_inside_an_inverted_bottleneck_is_known_by_its_size() -> None:
    block = inverted()
    assert block.permutable
    assert {*block.slots} == {"up", "down", "depthwise"}
    assert {span.tensor.rpartition("0.")[2] for span in block.vectors.values()} == {
        "bn1.weight", "bn1.bias", "bn2.running_mean"
    }  # fmt: skip
    squeezed = inverted(
        se__conv_reduce__weight=(8, 96, 1, 1), se__conv_reduce__bias=(8,),
        se__conv_expand__weight=(96, 8, 1, 1), se__conv_expand__bias=(96,),
    )  # fmt: skip
    assert squeezed.permutable
    assert [u.name for u in units_of(squeezed)] == ["hidden", "squeezed"]
    assert "reduce.se.conv_reduce.bias" in squeezed.vectors


@pytest.mark.parametrize(
    "more",
    [
        {"se__conv_reduce__weight": (8, 96, 1, 1)},  # without its other half
        {"mix__weight": (96, 96, 3, 3)},
        {"extra__weight": (96, 1, 5, 5)},  # a second depthwise kernel
        {"gamma": (5,)},
    ],
)
def test_an_inverted_bottleneck_with_something_unknown_keeps_its_order(
    more: dict[str, tuple[int, ...]],
) -> None:
    block = inverted(**more)
    assert not block.permutable
    assert {*block.slots} == {"up", "down"}

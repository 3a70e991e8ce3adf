"""ONNX files hold what TensorRT's parser documents that it reads; TensorRT itself is not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import all_micros

import tiedconv
from tiedconv.exporters._onnx_lower import onnx_graph
from tiedconv.exporters._onnx_store import narrowed, store_integers
from tiedconv.runtime.dequantize import dequantized

ir = pytest.importorskip("onnx_ir")

TENSORRT = json.loads(Path(__file__).with_name("tensorrt.json").read_text("utf-8"))


def refused_by_tensorrt(model: Any) -> list[str]:
    """What of a graph TensorRT does not document that it reads."""
    found = []
    low, high = TENSORRT["opsets"]
    if not low <= model.opset_imports[""] <= high:
        found.append(f"opset {model.opset_imports['']}")
    for node in model.graph:
        if node.domain not in ("", "ai.onnx") or node.op_type not in TENSORRT["operators"]:
            found.append(f"operator {node.domain}:{node.op_type}")
        if node.op_type == "DequantizeLinear":
            found += _dequantized_otherwise(node)
    for name, value in model.graph.initializers.items():
        kind = value.dtype.name
        if kind not in TENSORRT["weights"]:
            found.append(f"{name} of {kind}")
        # Integers of 64 bits are shapes and indices, never weights.
        if kind == "INT64" and value.const_value.size > 4096:
            found.append(f"weight {name} of {kind}")
        if kind in TENSORRT["quantised"] and {n.op_type for n, _ in value.uses()} != {
            "DequantizeLinear"
        }:
            found.append(f"{name}: integers read by another operator")
    for given in model.graph.inputs:
        if any(not isinstance(side, int) for side in given.shape[1:]):
            found.append(f"{given.name}: more sides than the batch are dynamic")
    return found


def _dequantized_otherwise(node: Any) -> list[str]:
    """One positive scale for each row or column, no zero point, over stored integers."""
    values, scales = (node.inputs[i].const_value for i in (0, 1))
    if values is None or scales is None:
        return [f"{node.name}: integers or scales are computed"]
    axis = node.attributes["axis"].as_int()
    found = []
    if values.dtype.name not in TENSORRT["quantised"]:
        found.append(f"{node.name}: {values.dtype}")
    if len(node.inputs) > 2 or "block_size" in node.attributes:
        found.append(f"{node.name}: a zero point, or blocks")
    if tuple(scales.shape) != (values.shape[axis],) or not (scales.numpy() > 0).all():
        found.append(f"{node.name}: scales {scales.shape}")
    return found


def graph_of(name: str, scheme: str, lower: str = "auto", **options: Any) -> Any:
    micro = all_micros()[name]
    model = tiedconv.convert(micro.model(), scheme, **options).eval()
    model, integers = dequantized(model)
    images = torch.randn(2, *micro.input().shape[1:])
    graph, _ = onnx_graph(model, {"images": images}, lower=lower, opset=21 if integers else None)
    store_integers(graph, integers)
    return graph


@pytest.mark.parametrize(
    ("name", "scheme", "lower", "options"),
    [
        ("timm-vit", "tied", "always", {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("timm-vit", "tied", "never", {}),
                ("timm-vit", "lors", "always", {"rank": 2}),
                ("timm-vit", "narrow", "auto", {}),
                ("timm-vit", "auto", "auto", {"bytes": "18%", "bits": 4}),
                ("hf-vit", "basis", "always", {"tie": True, "params": "75%"}),
                ("torchvision-resnet", "tied", "always", {}),
                ("torchvision-resnet", "lors", "never", {"rank": 2}),
                ("timm-resnet", "lowrank", "auto", {"rank": 3}),
                ("torchvision-resnext", "lowrank", "auto", {"rank": 2}),
            )
        ),
    ],
)
def test_tensorrt_reads_all_of_it(
    name: str, scheme: str, lower: str, options: dict[str, Any]
) -> None:
    graph = graph_of(name, scheme, lower, **options)
    assert refused_by_tensorrt(graph) == []
    if not options.get("bits"):
        narrowed(graph, "int8" if scheme == "tied" else "float16")
        assert refused_by_tensorrt(graph) == []


def test_what_it_does_not_read_is_found() -> None:
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["batch", "height"])
    node = ir.node("MatMulInteger", [x, x])
    model = ir.Model(
        ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 27}), ir_version=10
    )
    assert refused_by_tensorrt(model) == [
        "opset 27", "operator :MatMulInteger", "x: more sides than the batch are dynamic",
    ]  # fmt: skip

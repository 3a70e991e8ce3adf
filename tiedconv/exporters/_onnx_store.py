"""Initializers in a narrower dtype, which the graph widens before use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from tiedconv.errors import MissingExtra, UserError
from tiedconv.exporters._format import is_weight
from tiedconv.exporters._onnx_factors import initializer
from tiedconv.runtime.dequantize import Integers

if TYPE_CHECKING:
    import onnx_ir as ir


INT4_OPSET = 21
"""The first that has INT4."""

EXTERNAL_ABOVE = 1_900_000_000
"""Bytes of tensors above which they are stored in a companion file: a protobuf ends at 2 GB."""


def narrowed(model: ir.Model, dtype: str) -> None:
    """Store matrices and kernels as float16 or int8, in place; ties stay, as each is one tensor.

    Raises:
        UserError: values that float16 can't hold.
        MissingExtra: int8 without ONNX Runtime, whose quantiser is used.
    """
    for name, value in list(model.graph.initializers.items()):
        if value.const_value is None:
            continue
        array = value.const_value.numpy()
        if is_weight(name, array.shape, array.dtype == np.float32):
            (_halved if dtype == "float16" else _quantised)(model.graph, value, array)


def store_integers(model: ir.Model, integers: Mapping[str, Integers]) -> int:
    """Store quantised matrices as INT4 or INT8, in place, which the graph widens before use.

    Args:
        model: whose initializers are floats.
        integers: by the names of initializers, of their values or these transposed.

    Returns:
        how many were stored so; others, of other names or values, stay floats.
    """
    count = 0
    for name, found in integers.items():
        value = model.graph.initializers.get(name)
        if value is None or value.const_value is None or not _may_be_integers(value, found):
            continue
        array, floats = value.const_value.numpy(), _floats(found)
        if np.array_equal(array, floats):
            _store(model, value, found, flipped=False)
        elif floats.ndim == 2 and np.array_equal(array, floats.T):
            _store(model, value, found, flipped=True)
        else:
            continue
        count += 1
    return count


def _may_be_integers(value: ir.Value, found: Integers) -> bool:
    """Whether runtimes take integers there.

    A table of positions that is resized first is a constant, which ONNX Runtime computes as it
    loads the file; of integers it moves a transpose before the resizing, which then fails.
    """
    return found.axis == 0 or all(node.op_type == "Add" for node, _ in value.uses())


def _floats(found: Integers) -> np.ndarray:
    behind = found.values.ndim - 1 - found.axis
    rows = found.scales.reshape([1] * found.axis + [-1] + [1] * behind)
    floats = found.values.float() * rows
    return (floats if found.columns is None else floats * found.columns).numpy()


def _store(model: ir.Model, value: ir.Value, found: Integers, *, flipped: bool) -> None:
    from ml_dtypes import int4

    axis = 1 if flipped else found.axis
    values = (found.values.t() if flipped else found.values).contiguous().numpy()
    narrow = found.bits == 4 and model.opset_imports[""] >= INT4_OPSET
    arrays = [values.astype(int4) if narrow else values, found.scales.numpy()]
    factors = None
    if found.columns is not None:
        factors = (found.columns.t() if flipped else found.columns).contiguous().numpy()
    _widen(model.graph, value, arrays, "DequantizeLinear", {"axis": axis}, factors)


def _halved(graph: ir.Graph, value: ir.Value, array: np.ndarray) -> None:
    if np.abs(array).max() > np.finfo(np.float16).max:
        raise UserError(
            f"{value.name} has values that float16 can't hold",
            "Nothing was written",
            "Store it as float32",
            code="dtype-overflow",
        )
    _widen(graph, value, [array.astype(np.float16)], "Cast", {"to": 1})


def _quantised(graph: ir.Graph, value: ir.Value, array: np.ndarray) -> None:
    """Symmetric, with one scale per row."""
    try:
        import onnx
        from onnxruntime.quantization.quant_utils import compute_data_quant_params, quantize_nparray
    except ImportError:
        raise MissingExtra.of("onnxruntime", "onnx", "Storing int8") from None
    kind = onnx.TensorProto.INT8
    rows, scales = [], []
    for row in array.reshape(len(array), -1):
        zero, scale = compute_data_quant_params(row, kind, symmetric=True)
        rows.append(quantize_nparray(kind, row, scale, zero))
        scales.append(scale)
    quantised = np.stack(rows).reshape(array.shape).astype(np.int8)
    scale = np.array(scales, dtype=np.float32).reshape(-1)
    _widen(graph, value, [quantised, scale], "DequantizeLinear", {"axis": 0})


def _widen(
    graph: ir.Graph,
    value: ir.Value,
    arrays: list[np.ndarray],
    op: str,
    how: dict[str, int],
    factors: np.ndarray | None = None,
) -> None:
    """Replace an initializer by a node over narrower ones, times factors if there are any."""
    from onnx_ir.tape import Tape

    name = value.name
    assert name is not None
    uses = list(value.uses())
    del graph.initializers[name]
    names = (name, f"{name}/scale")
    inputs = [initializer(graph, n, array) for n, array in zip(names, arrays, strict=False)]
    tape = Tape()
    wide = tape.op(op, inputs, how)
    if factors is not None:
        wide = tape.op("Mul", [wide, initializer(graph, f"{name}/columns", factors)])
    wide.type, wide.shape = value.type, value.shape
    graph.insert_before(graph[0], tape.nodes)
    for node, index in uses:
        node.replace_input_with(index, wide)

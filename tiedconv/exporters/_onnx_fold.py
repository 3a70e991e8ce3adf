"""Constants of a graph that take fewer bytes than the tensors that they are computed from.

A table of positions that is resized to the size of the images is one: of DINOv2 at 112 px, 65 rows
of 1,370. A runtime computes it as it loads the file, and then needs the table no more.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tiedconv.exporters._onnx_factors import initializer

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass
class _Region:
    """Nodes that compute constants from some tensors, in the order in which they run.

    Args:
        nodes: none of which reads an input of the model.
        reads: the initializers that they read.
    """

    nodes: list[ir.Node] = field(default_factory=list)
    reads: dict[str, ir.Value] = field(default_factory=dict)

    def results(self) -> list[ir.Value]:
        """What other nodes read of it."""
        inside = set(map(id, self.nodes))
        made = (value for node in self.nodes for value in node.outputs)
        return [v for v in made if any(id(node) not in inside for node, _ in v.uses())]

    def freed(self) -> int:
        """Bytes of the initializers that nothing else reads."""
        inside = set(map(id, self.nodes))
        return sum(
            value.const_value.nbytes
            for value in self.reads.values()
            if value.const_value and all(id(node) in inside for node, _ in value.uses())
        )


def fold_smaller(model: ir.Model) -> int:
    """Store what such nodes compute in place of what they read, where that takes fewer bytes.

    Without ONNX Runtime, which computes it, nothing changes.

    Args:
        model: whose graph has no outputs that are constants; changed in place.

    Returns:
        how many tensors were stored so.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return 0
    count = 0
    for region in _regions(model.graph):
        results = region.results()
        freed, known = region.freed(), [_bytes(value) for value in results]
        if freed == 0 or None in known or sum(filter(None, known)) >= freed:
            continue
        arrays = _computed(region, results, model)
        if sum(array.nbytes for array in arrays) < freed:
            _store(model.graph, region, results, arrays)
            count += len(arrays)
    return count


def _regions(graph: ir.Graph) -> Iterator[_Region]:
    """Those of at least one initializer; each node is in one of them at most."""
    of: dict[ir.Value, _Region] = {}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        known = [v for v in inputs if v in of or v.is_initializer() or _is_constant(v)]
        if not inputs or len(known) < len(inputs) or any(v in graph.outputs for v in node.outputs):
            continue
        joined = _Region()
        before = {id(of[v]): of[v] for v in inputs if v in of}
        for each in before.values():
            joined.nodes += each.nodes
            joined.reads |= each.reads
        joined.nodes.append(node)
        joined.reads |= {str(v.name): v for v in inputs if v.is_initializer()}
        of |= {value: joined for each in joined.nodes for value in each.outputs}
        of |= {v: joined for v in joined.reads.values() if v.dtype and v.dtype.is_floating_point()}
    found = {id(region): region for region in of.values() if region.reads}
    yield from found.values()


def _is_constant(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Constant"


def _bytes(value: ir.Value) -> int | None:
    """By shape and dtype; None where they are unknown."""
    if value.shape is None or value.dtype is None or not value.shape.is_static():
        return None
    return int(np.prod(value.shape.numpy())) * int(value.dtype.itemsize)


def _computed(region: _Region, results: list[ir.Value], model: ir.Model) -> list[np.ndarray]:
    """What the nodes compute, by ONNX Runtime."""
    import onnx_ir as ir
    import onnxruntime as ort

    wanted = {*region.nodes}
    for each in region.nodes:
        read = (value for value in each.inputs if value is not None and _is_constant(value))
        wanted |= {node for value in read if (node := value.producer())}
    nodes = [node for node in model.graph if node in wanted]
    copies: dict[Any, ir.Value] = {}
    made: list[ir.Node] = []
    for name, value in region.reads.items():
        copies[value] = ir.Value(
            name=name, type=value.type, shape=value.shape, const_value=value.const_value
        )
    stored = list(copies.values())
    for node in nodes:
        inputs = [None if v is None else copies[v] for v in node.inputs]
        copy = ir.Node(
            node.domain, node.op_type, inputs, node.attributes.values(),
            num_outputs=len(node.outputs),
        )  # fmt: skip
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape, copies[old] = old.name, old.type, old.shape, new
        made.append(copy)
    graph = ir.Graph(
        [], [copies[v] for v in results], nodes=made, initializers=stored,
        opset_imports=model.opset_imports, name="constants",
    )  # fmt: skip
    proto = ir.to_proto(ir.Model(graph, ir_version=model.ir_version)).SerializeToString()
    session = ort.InferenceSession(proto, providers=["CPUExecutionProvider"])
    return [np.asarray(array) for array in session.run(None, {})]


def _store(
    graph: ir.Graph, region: _Region, results: list[ir.Value], arrays: list[np.ndarray]
) -> None:
    """Initializers in place of the nodes, under the name of the largest tensor that they read."""
    import onnx_ir as ir

    stored = {n: v.const_value for n, v in region.reads.items()}
    largest = max(stored, key=lambda name: stored[name].nbytes if stored[name] else 0)
    for i, (value, array) in enumerate(zip(results, arrays, strict=True)):
        name = f"{largest}/as_used" + (f"_{i}" if len(results) > 1 else "")
        ir.convenience.replace_all_uses_with(value, initializer(graph, name, array))
    graph.remove([*reversed(region.nodes)], safe=True)
    for name, value in region.reads.items():
        if not value.uses():
            del graph.initializers[name]

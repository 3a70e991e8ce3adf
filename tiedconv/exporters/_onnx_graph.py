"""The ONNX graph of a plain model, and where it uses its weights.

The graph is traced from the plain model, so that the exporter meets no tied class. Then
`_onnx_lower` replaces every use of a converted weight: by its factors applied one by one, or by the
expression of the weight. Either way each stored tensor is one initializer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tiedconv.exporters._format import Outputs, refusals

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Site:
    """One use of a weight in the graph.

    Args:
        kind: `linear` (`x W^T`), `transposed` (`x W`), `conv`, or `other`.
        node: the node of the result, which is to be replaced.
        bias: added to the result, or None.
        weight: the weight's value.
    """

    kind: str
    node: ir.Node
    bias: ir.Value | None
    weight: ir.Value

    @property
    def x(self) -> ir.Value | None:
        """The features that the weight is applied to, None if `other`.

        Those of the node as it is now: a layer right before it may have been replaced.
        """
        return None if self.kind == "other" else self.node.inputs[0]


def trace(
    model: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], opset: int | None = None
) -> ir.Model:
    """The graph of a plain model, its initializers under the names of its state dict.

    Args:
        model: in evaluation mode.
        inputs: an example of each, `(2 or more, ...)`; the batch size is dynamic.
        outputs: the names of those that the graph is to have.
        opset: ONNX opset; None for the exporter's default.

    Raises:
        UserError: torch can't export this model.
    """
    wrapped = Outputs(model, outputs, tuple).eval()
    with refusals("torch's exporter to ONNX", "--to pt2 or --to dense"):
        program = _exported(wrapped, inputs, outputs, opset)
    assert program is not None
    found = program.model
    for name in list(found.graph.initializers):
        value = found.graph.initializers[name]
        value.name = name.removeprefix("model.")
    return found


def _exported(
    wrapped: Outputs, inputs: Mapping[str, Tensor], outputs: Sequence[str], opset: int | None
) -> Any:
    """The exporter's program; with attention computed step by step where it needs that."""
    batch = torch.export.Dim("batch")

    def export() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            return torch.onnx.export(
                wrapped, tuple(inputs.values()), dynamo=True, optimize=False, opset_version=opset,
                input_names=list(inputs), output_names=list(outputs), verbose=False,
                dynamic_shapes=tuple({0: batch} for _ in inputs),
            )  # fmt: skip

    try:
        return export()
    except torch.onnx.OnnxExporterError:
        # Of some models of transformers, such as Mask2Former, it can't decompose the fused one.
        choose = getattr(wrapped.model, "set_attn_implementation", None)
        if choose is None:
            raise
        choose("eager")
        return export()


def sites_of(weight: ir.Value) -> list[Site]:
    """Every use of a weight; `_onnx_lower` applies no factors if one of them is `other`."""
    found: list[Site] = []
    for node, index in list(weight.uses()):
        found += _sites(weight, node, index)
    return found


def _sites(weight: ir.Value, node: ir.Node, index: int) -> list[Site]:
    other = [Site("other", node, None, weight)]
    if node.op_type == "Transpose" and _ints(node, "perm") in ([1, 0], None):
        users = list(node.outputs[0].uses())
        if users and all(u.op_type == "MatMul" and i == 1 for u, i in users):
            return [Site("linear", u, None, weight) for u, _ in users]
        return other
    if index != 1:
        return other
    if node.op_type == "MatMul":
        return [Site("transposed", node, None, weight)]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    bias = None if bias is None or _is_zero(bias) else bias
    if node.op_type == "Gemm" and _plain_gemm(node):
        kind = "linear" if _int(node, "transB", 0) else "transposed"
        return [Site(kind, node, bias, weight)]
    if node.op_type == "Conv" and _int(node, "group", 1) == 1:
        return [Site("conv", node, bias, weight)]
    return other


def _is_zero(value: ir.Value) -> bool:
    """Whether a value is all zeros: the bias that the exporter gives to each Conv."""
    from onnx_ir.convenience import get_const_tensor

    stored = get_const_tensor(value)
    if stored is not None:
        return not stored.numpy().any()
    node = value.producer()
    return (
        node is not None
        and node.op_type in ("Expand", "CastLike", "Cast", "Reshape")
        and node.inputs[0] is not None
        and _is_zero(node.inputs[0])
    )


def drop_zero_biases(graph: ir.Graph) -> None:
    """Remove the zero bias of a Conv."""
    for node in graph:
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) > 2 else None
        if bias is not None and _is_zero(bias):
            node.resize_inputs(2)


def _plain_gemm(node: ir.Node) -> bool:
    numbers = [node.attributes[n].as_float() for n in ("alpha", "beta") if n in node.attributes]
    return all(n == 1.0 for n in numbers) and not _int(node, "transA", 0)


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _ints(node: ir.Node, name: str) -> list[int] | None:
    return list(node.attributes[name].as_ints()) if name in node.attributes else None


def attributes_of(node: ir.Node) -> Mapping[str, Any]:
    """The attributes of a node, for another node like it."""
    return {name: attribute.value for name, attribute in node.attributes.items()}

"""Lowering: a plan's factors in an ONNX graph, so that neither file nor runtime holds them twice.

`auto` applies factors where that takes fewer multiplications than the weight itself, which saves
time and memory, and for generators (see `runtime.generator`), where it saves memory. A tied matrix
takes as many multiplications either way; applied it costs up to a tenth more time, and saves memory
only if the runtime is told not to pack matrices. A kernel that is also read transposed needs
ConvTranspose, which took 1.2 times the time of Conv, and ONNX Runtime copies kernels into a layout
of its own anyway.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tiedconv.core.expr import Expr
from tiedconv.core.plan import Plan
from tiedconv.errors import UserError
from tiedconv.exporters._format import called
from tiedconv.exporters._onnx_apply import (
    Kernel,
    NoteKernel,
    NoteLinear,
    OnnxKernel,
    OnnxLinear,
    Pixels,
)
from tiedconv.exporters._onnx_factors import (
    Factors,
    array_of,
    emit,
    initializer,
    int_constant,
)
from tiedconv.exporters._onnx_fold import fold_smaller
from tiedconv.exporters._onnx_graph import (
    Site,
    attributes_of,
    drop_zero_biases,
    sites_of,
    trace,
)
from tiedconv.runtime.factored import (
    NotFactorableError,
    apply,
    matrix_of,
)
from tiedconv.runtime.flops import apply_flops, never_materialized, reads_transposed
from tiedconv.runtime.outputs import ONLY, named_outputs
from tiedconv.runtime.tie import state_of, untie

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx_ir.tape import Tape

CHEAPER = 0.95
"""With `auto`, factors are applied if they take at most this ratio of the multiplications."""


@dataclass(frozen=True)
class Lowered:
    """How the converted weights are computed in a graph.

    Args:
        factored: weights whose factors are applied one by one.
        materialized: weights that the graph computes from factors, once, as it is loaded.
        one_copy: whether a matrix is also read transposed, so that a runtime holds it once only if
            it is told not to pack matrices.
    """

    factored: tuple[str, ...]
    materialized: tuple[str, ...]
    one_copy: bool = False


def onnx_graph(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str] = (ONLY,),
    *,
    lower: str = "auto",
    opset: int | None = None,
) -> tuple[ir.Model, Lowered]:
    """The graph of a tied model, which holds each stored tensor once.

    Args:
        model: tied; it is untied here, so give a copy.
        inputs: an example of each, `(n, ...)`, n at least 2; see `_format.named_inputs`.
        outputs: the names of those that the graph is to have.
        lower: where factors are applied instead of materialising weights: `auto`, `always`
            (wherever possible), or `never`.
        opset: ONNX opset, None to choose.

    Raises:
        UserError: the model can't be exported.
    """
    plan = state_of(model).plan
    tensors = {n: p.detach() for n, p in model.named_parameters() if n in plan.factors}
    plain = _disambiguated(untie(model), plan)
    graph = _traced(plain, inputs, outputs, opset)
    if any(node.op_type.startswith("Random") for node in graph.graph):
        raise UserError(
            "The model draws random numbers in evaluation, as masked pretraining does",
            "Its outputs in another runtime can't be compared with ours",
            "Export it with --to pt2 or --to dense, or export its encoder alone",
            code="model-not-exportable",
        )
    absent = [name for name in plan.weights if not _names_in(graph, plan, name)]
    return graph, put_factors(graph, plan, tensors, lower, _unused(plain, absent, inputs))


def _names_in(graph: ir.Model, plan: Plan, weight: str) -> list[str]:
    """The names by which a graph holds a weight."""
    return [n for n in (weight, *_aliases(plan, weight)) if n in graph.graph.initializers]


@torch.no_grad()
def _unused(model: nn.Module, weights: Sequence[str], inputs: Mapping[str, Tensor]) -> list[str]:
    """Those with which no output changes, as of a layer that is never called."""
    found: list[str] = []
    before = named_outputs(called(model, *inputs.values())) if weights else {}
    for weight in weights:
        parameter = model.get_parameter(weight)
        parameter.neg_()
        after = named_outputs(called(model, *inputs.values()))
        parameter.neg_()
        if all(torch.equal(value, after[name]) for name, value in before.items()):
            found.append(weight)
    return found


def _disambiguated(model: nn.Module, plan: Plan) -> nn.Module:
    """A plain model whose converted weights all differ: the exporter merges equal ones."""
    generator = torch.Generator().manual_seed(0)
    for name in plan.weights:
        parameter = model.get_parameter(name)
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(drawn)
    return model


@torch.no_grad()
def dense_graph(model: nn.Module, inputs: Mapping[str, Tensor]) -> ir.Model:
    """The graph of a plain model with all its outputs, simplified in the same way."""
    graph = _traced(model, inputs, tuple(named_outputs(called(model, *inputs.values()))), None)
    _clean(graph, frozenset())
    return graph


def _traced(
    model: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], opset: int | None
) -> ir.Model:
    graph = trace(model, inputs, outputs, opset)
    _simplify(graph)
    drop_zero_biases(graph.graph)
    return graph


def put_factors(
    model: ir.Model,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    lower: str,
    unused: Collection[str] = (),
) -> Lowered:
    """Replace every converted weight of a graph by its factors, in place.

    Args:
        model: the graph.
        plan: of the tied model.
        tensors: its stored tensors.
        lower: see `onnx_graph`.
        unused: weights that the model computes without; the graph needs no factors of them.

    Raises:
        UserError: a converted weight is not in the graph.
    """
    graph = model.graph
    factors = Factors(dict(tensors), lambda name, t: initializer(graph, name, array_of(t)))
    sites: dict[str, list[Site]] = {}
    values: dict[str, ir.Value] = {}
    plan = dataclasses.replace(
        plan, weights={n: e for n, e in plan.weights.items() if n not in unused}
    )
    for name in plan.weights:
        known = _names_in(model, plan, name)
        if not known:
            raise UserError(
                f"The exported graph has no weight {name}",
                "Its factors can't be inserted: the model computes without it",
                "Export with --to pt2 or --to dense, and report this with the model's name",
                code="weight-not-in-graph",
            )
        values[name] = graph.initializers[known[0]]
        sites[name] = sites_of(values[name])
    factored = _factored(plan, sites, lower)
    for name, expr in plan.weights.items():
        if name in factored:
            for site in sites[name]:
                _note(expr, site, factors)
        else:
            for factor in expr.refs:
                factors.note(factor, "whole")
    for name, expr in plan.weights.items():
        if name in factored:
            for site in sites[name]:
                _apply(expr, site, factors)
        else:
            _materialize(expr, values[name], factors, graph)
    _clean(model, {str(value.name) for value in values.values()})
    both = any({"along", "across"} <= uses for uses in factors.uses.values())
    return Lowered(tuple(sorted(factored)), tuple(sorted(plan.weights.keys() - factored)), both)


def _clean(model: ir.Model, replaced: Collection[str]) -> None:
    from onnx_ir import passes
    from onnx_ir.passes import common

    _store_transposed(model.graph, replaced)
    cleaning = passes.Sequential(
        common.RemoveUnusedNodesPass(), common.TopologicalSortPass(),
        common.ClearMetadataAndDocStringPass(),
    )  # fmt: skip
    cleaning(model)
    fold_smaller(model)


def _aliases(plan: Plan, name: str) -> list[str]:
    return [alias for alias, of in plan.aliases.items() if of == name]


def _factored(plan: Plan, sites: Mapping[str, list[Site]], lower: str) -> set[str]:
    """The weights whose factors are to be applied one by one."""
    if lower == "never":
        return set()
    able = {n for n, e in plan.weights.items() if _can_apply(e, sites[n])}
    if lower == "always":
        return able
    kernels = {n for n in able if any(site.kind == "conv" for site in sites[n])}
    # A kernel that is also read transposed is materialised, and so is any weight that shares its
    # factor: ConvTranspose is slow.
    transposed = [plan.weights[n] for n in kernels if reads_transposed(plan.weights[n])]
    slow = {ref for expr in transposed for ref in expr.refs}

    def pays(name: str) -> bool:
        expr = plan.weights[name]
        if never_materialized(expr):
            return True
        is_slow = name in kernels and bool(slow & expr.refs.keys())
        return (apply_flops(expr) or 0) <= CHEAPER * math.prod(expr.shape) and not is_slow

    return {name for name in able if pays(name)}


def _can_apply(expr: Expr, sites: list[Site]) -> bool:
    if any(site.kind == "other" for site in sites):
        return False
    scratch = Factors({}, lambda name, t: None)
    try:
        for site in sites:
            _note(expr, site, scratch)
    except NotFactorableError:
        return False
    return True


def _kernel(expr: Expr, site: Site) -> Kernel:
    return Kernel(tuple(expr.shape[2:]), dict(attributes_of(site.node)))


def _note(expr: Expr, site: Site, factors: Factors) -> None:
    if site.kind == "conv":
        apply(matrix_of(expr), Pixels(None, fresh=True), NoteKernel(factors, _kernel(expr, site)))
    else:
        apply(matrix_of(expr), None, NoteLinear(factors), transpose=site.kind == "transposed")


def _apply(expr: Expr, site: Site, factors: Factors) -> None:
    from onnx_ir.tape import Tape

    tape = Tape()
    assert site.x is not None
    beside_channels: list[int] = []
    if site.kind == "conv":
        beside_channels = list(_kernel(expr, site).point)
        on = OnnxKernel(factors, tape, _kernel(expr, site))
        found = apply(matrix_of(expr), Pixels(site.x, fresh=True), on).value
    else:
        assert site.x.shape is not None
        linear = OnnxLinear(factors, tape, len(site.x.shape))
        found = apply(matrix_of(expr), site.x, linear, transpose=site.kind == "transposed")
    assert found is not None
    if site.bias is not None:
        found = _biased(found, site, tape, beside_channels)
    _replace(site.node, found, tape)


def _biased(
    result: ir.Value, site: Site, tape: Tape, beside_channels: Sequence[int]
) -> ir.Value:  # fmt: skip
    """A result with the bias added, by its own node if that has a bias input.

    Args:
        result: without it.
        site: of the product.
        tape: for further nodes.
        beside_channels: of a convolution, a 1 for each side of the kernel.
    """
    assert site.bias is not None
    last = result.producer()
    if last is not None and last.op_type in ("Conv", "ConvTranspose", "Gemm"):
        last.resize_inputs(3)
        last.replace_input_with(2, site.bias)
        return result
    bias = site.bias
    if site.kind == "conv":
        bias = tape.op("Reshape", [bias, int_constant(tape, [1, -1, *beside_channels])])
    return tape.op("Add", [result, bias])


def _replace(node: ir.Node, by: ir.Value, tape: Tape) -> None:
    """Replace a node by the nodes of a tape."""
    import onnx_ir as ir

    graph = node.graph
    assert graph is not None
    graph.insert_before(node, tape.nodes)
    old = node.outputs[0]
    by.shape, by.type = old.shape, old.type
    if old in graph.outputs:  # a file's outputs keep their names
        by.name, old.name = old.name, None
    ir.convenience.replace_all_uses_with(old, by, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _materialize(expr: Expr, weight: ir.Value, factors: Factors, graph: ir.Graph) -> None:
    """Compute a weight from its factors at the start of the graph."""
    import onnx_ir as ir
    from onnx_ir.tape import Tape

    tape = Tape()
    value = emit(expr, factors, tape)
    if tape.nodes:
        graph.insert_before(graph[0], tape.nodes)
    ir.convenience.replace_all_uses_with(weight, value)
    del graph.initializers[weight.name]


def _store_transposed(graph: ir.Graph, replaced: Collection[str]) -> None:
    """Store matrices that are only read transposed in that layout: the runtime need not do it."""
    import onnx_ir as ir

    for name, value in list(graph.initializers.items()):
        if name in replaced:  # its uses are replaced
            if not value.uses():
                del graph.initializers[name]
            continue
        nodes = [node for node, _ in value.uses()]
        stored = value.const_value
        if not nodes or stored is None or len(stored.shape) != 2:
            continue
        is_transposed = all(n.op_type == "Transpose" for n in nodes)
        if not is_transposed or value in graph.outputs:
            continue
        array = stored.numpy().T.copy()
        value.const_value = ir.Tensor(array, name=name)
        value.shape = ir.Shape(array.shape)
        for node in nodes:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            graph.remove(node, safe=True)


def _simplify(model: ir.Model) -> None:
    """Fold constants that the exporter left, except of nodes that read a stored tensor."""
    from onnxscript import optimizer

    def should_fold(node: ir.Node) -> bool | None:
        reads_stored = any(v is not None and v.is_initializer() for v in node.inputs)
        return False if reads_stored and node.op_type != "Shape" else None

    optimizer.optimize_ir(model, should_fold=should_fold)

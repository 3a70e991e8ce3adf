"""A program for ExecuTorch: what its XNNPACK delegate computes, and how weights reach it.

The delegate holds a weight only if it reads it as it is stored. A weight that the graph computes
stays outside, and a tensor that is read inside and outside would be in the file twice. So factors
are applied one by one where the layer can, each is stored in the one layout that it is read in, and
a node goes to the delegate only if nothing outside reads its weights.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from tiedconv.runtime.factored_linear import apply_factors
from tiedconv.runtime.flops import apply_flops
from tiedconv.runtime.tie import tied_weights
from tiedconv.runtime.tied_module import Forward, forward_of, set_forward

SMALL = 256
"""Values of a tensor that may be in a file twice: a bias, a norm."""

_MOVES = ("view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze")


def apply_all_factors(model: nn.Module) -> None:
    """Let every layer that can apply factors, also of plain ties: `x W` for `W^T`.

    Args:
        model: tied, in evaluation mode; it is changed.
    """
    apply_factors(model)
    for _, module, attribute, expr in tied_weights(model):
        is_plain = forward_of(module, attribute) is Forward.MATERIALIZED
        if is_plain and expr.is_view and apply_flops(expr) is not None:
            set_forward(module, Forward.FACTORED_INFERENCE)


def store_as_read(program: ExportedProgram) -> None:
    """Store each parameter whose uses all move its values alike in that layout, in place.

    A matrix that is only read as a kernel becomes a kernel, one that is only read transposed
    becomes its transpose.
    """
    names = program.graph_signature.inputs_to_parameters
    for node in list(program.graph.nodes):
        if node.op == "placeholder" and node.name in names:
            while _stored_once_moved(program, node, names[node.name]):
                pass
    program.graph_module.recompile()


def _stored_once_moved(program: ExportedProgram, node: torch.fx.Node, name: str) -> bool:
    users = list(node.users)
    if not users or not all(_is_move(user) for user in users):
        return False
    first = users[0]
    if any((user.target, user.args[1:]) != (first.target, first.args[1:]) for user in users):
        return False
    assert callable(first.target)
    old = program.state_dict[name]
    moved = first.target(old.detach(), *first.args[1:]).contiguous()
    program._state_dict[name] = nn.Parameter(moved, requires_grad=old.requires_grad)
    node.meta["val"] = first.meta["val"].contiguous()
    for user in users:
        user.replace_all_uses_with(node)
        program.graph.erase_node(user)
    return True


def _is_move(node: torch.fx.Node) -> bool:
    packet = getattr(node.target, "_opname", None)
    if node.op != "call_function" or packet not in _MOVES or node.kwargs:
        return False
    return not any(isinstance(a, torch.fx.Node) for a in _flat(node.args[1:]))


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def partitioner() -> Any:
    """XNNPACK's partitioner, but for nodes that would store a weight twice or compute one."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    class OneCopy(XnnpackPartitioner):  # type: ignore[misc]
        def get_matched_nodes_from_configs(self, ep: ExportedProgram) -> list[list[torch.fx.Node]]:
            return _one_copy(ep, super().get_matched_nodes_from_configs(ep))

    return OneCopy()


def _one_copy(
    program: ExportedProgram, groups: list[list[torch.fx.Node]]
) -> list[list[torch.fx.Node]]:
    given = set(program.graph_signature.user_inputs)
    stored = {n for n in program.graph.nodes if n.op == "placeholder" and n.name not in given}
    fixed = set(stored)  # and whatever is computed from nothing else: the weights
    for node in program.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "call_function" and inputs and all(i in fixed for i in inputs):
            fixed.add(node)
    refolded = _refolded(program, stored)
    # A weight that is computed inside is not packed once but in each run, and `base + B A` has been
    # seen to be taken for a linear layer with the base as its bias.
    kept = [g for g in groups if not all(n in fixed for n in g) and not refolded & set(g)]
    while True:
        inside = {node for group in kept for node in group}
        outside = {
            source
            for node in program.graph.nodes
            if node.op == "call_function" and node not in inside
            for source in node.all_input_nodes
            if source in stored and source.meta["val"].numel() > SMALL
        }
        left = [g for g in kept if not any(i in outside for n in g for i in n.all_input_nodes)]
        if len(left) == len(kept):
            return kept
        kept = left


def _refolded(program: ExportedProgram, stored: set[torch.fx.Node]) -> set[torch.fx.Node]:
    """Norms behind a convolution whose kernel others share: folded into it, each needs its own."""
    found = set()
    for node in program.graph.nodes:
        if "batch_norm" not in str(node.target) or not node.all_input_nodes:
            continue
        before = node.all_input_nodes[0]
        while before.target is operator.getitem:
            before = before.all_input_nodes[0]
        kernels = [i for i in before.all_input_nodes if i in stored]
        if any(len(kernel.users) > 1 and kernel.meta["val"].dim() > 1 for kernel in kernels):
            found |= {node, *(u for u in node.users if u.target is operator.getitem)}
    return found

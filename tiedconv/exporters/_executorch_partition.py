"""What the XNNPACK delegate of ExecuTorch computes, so that no weight is stored twice.

The delegate holds a weight only if it reads it as it is stored. A weight that the graph computes
stays outside, and a tensor that is read inside and outside would be in the file twice: a node goes
to the delegate only if nothing outside reads its weights.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.export import ExportedProgram

SMALL = 256
"""Values of a tensor that may be in a file twice: a bias, a norm."""


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

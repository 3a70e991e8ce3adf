"""A model for one image as an exported program of torch, from which edge formats are converted.

A converter keeps one copy of a tensor if each layer reads it as it is stored. So factors are
applied one by one where the layer can, and each is stored in the one layout that it is read in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tiedconv.errors import UserError
from tiedconv.exporters._format import Job, Outputs
from tiedconv.exporters.pt2 import strip
from tiedconv.runtime.factored_linear import apply_factors
from tiedconv.runtime.flops import apply_flops
from tiedconv.runtime.tie import tied_weights
from tiedconv.runtime.tied_module import Forward, forward_of, set_forward

_MOVES = ("view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze")


def prepare(job: Job, format_name: str) -> None:
    """Let a model's layers apply their factors, unless the job says never.

    Args:
        job: its model is changed.
        format_name: for messages.

    Raises:
        UserError: it takes images and text at once (`model-not-exportable`).
    """
    if job.text is not None:
        raise UserError(
            f"A file for {format_name} is called with one image or one text, and this model takes "
            "both",
            "Nothing was written",
            "Export it with --to onnx or --to pt2",
            code="model-not-exportable",
        )
    if job.lower != "never":
        apply_all_factors(job.model)


def one_image_program(
    model: nn.Module, images: Tensor, outputs: Sequence[str]
) -> ExportedProgram:  # fmt: skip
    """The program of the first image.

    Args:
        model: in evaluation mode, tied or plain.
        images: examples, `(n, C, H, W)`.
        outputs: names of the outputs, which it gives as a tuple.
    """
    wrapped = Outputs(model, outputs, tuple)
    with torch.no_grad():
        program = torch.export.export(wrapped, (images[:1],), strict=False)
    strip(program)
    _store_as_read(program)
    return program


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


def _store_as_read(program: ExportedProgram) -> None:
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

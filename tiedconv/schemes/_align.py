"""Function-preserving symmetries before a fit: which of them bring matrices closer together.

`numerics/symmetries` applies them; here they are chosen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tiedconv.core.partition import partition
from tiedconv.core.plan import Block
from tiedconv.numerics.linalg import linear_assignment, procrustes
from tiedconv.numerics.symmetries import (
    WeightEditor,
    fold_norm,
    permute_bottleneck,
    permute_heads,
    permute_hidden,
    scale_bottleneck_units,
    scale_conv_rows,
    scale_hidden,
    transform_heads,
)

_ROLES = {
    "ffn": {"up", "down"},
    "attention": {"q", "k", "v", "o"},
    "bottleneck": {"conv1", "conv2", "conv3"},
}


def is_whole(block: Block) -> bool:
    """Whether all matrices of the block are there (none excluded), as symmetries need them all."""
    return _ROLES.get(block.kind, set()) <= block.slots.keys() and block.kind in _ROLES


def fold_norms(blocks: Sequence[Block], editor: WeightEditor) -> None:
    """Move LayerNorm scales into the weights that read them."""
    for block in blocks:
        if is_whole(block):
            fold_norm(editor, block)


def match_layers(blocks: Sequence[Block], groups: str, editor: WeightEditor) -> None:
    """Bring the layers of each group of a stack into the order and basis that agree best.

    The first layer of a group stays; each later one is matched with the mean of those before.
    """
    by_stack: dict[tuple[str, str], list[Block]] = defaultdict(list)
    for block in sorted(blocks, key=lambda b: b.index):
        if block.permutable and is_whole(block):
            shapes = "/".join(str(s.matrix_shape) for s in block.slots.values())
            by_stack[block.stack, shapes].append(block)
    for layers in by_stack.values():
        for part in partition(len(layers), groups):
            _match_group([layers[i] for i in part], editor)


def _match_group(layers: Sequence[Block], editor: WeightEditor) -> None:
    if layers[0].kind == "attention":
        slots = layers[0].slots
        if layers[0].heads and slots["q"].rows == slots["k"].rows:
            _match_heads(layers, editor)
        return
    signature = _hidden_signature if layers[0].kind == "ffn" else _first_conv_signature
    total = normalize(signature(layers[0], editor))
    for block in layers[1:]:
        if block.kind == "ffn":
            order = linear_assignment(total @ normalize(signature(block, editor)).t())
            permute_hidden(editor, block, order)
        else:
            _match_bottleneck(layers[0], block, editor)
        total = total + normalize(signature(block, editor))


def _hidden_signature(block: Block, editor: WeightEditor) -> Tensor:
    """The input and output weights of each hidden unit, normalised, `(hidden, 2 d)`."""
    up, down = editor.matrix(block.slots["up"]), editor.matrix(block.slots["down"])
    return torch.cat([normalize(up), normalize(down.t())], 1)


def _first_conv_signature(block: Block, editor: WeightEditor) -> Tensor:
    return editor.matrix(block.slots["conv1"])


def _match_heads(layers: Sequence[Block], editor: WeightEditor) -> None:
    """Order heads, and rotate each, so that layers agree (orthogonal Procrustes)."""
    total = _heads(layers[0], editor)
    for block in layers[1:]:
        mine = _heads(block, editor)
        # Independent of the bases of the heads: the norm of their product.
        similarity = torch.zeros(len(total[0]), len(total[0]), dtype=torch.float64)
        for a, b in zip(total, mine, strict=True):
            products = a.flatten(0, 1) @ b.flatten(0, 1).t()
            products = products.reshape(len(a), a.shape[1], len(b), b.shape[1])
            similarity += products.square().sum((1, 3)).double()
        permute_heads(editor, block, linear_assignment(similarity))
        qk, vo = (
            procrustes(b @ a.mT) for a, b in zip(total, _heads(block, editor), strict=True)
        )  # fmt: skip
        transform_heads(editor, block, qk, vo)
        qk, vo = _heads(block, editor)
        total = (total[0] + qk, total[1] + vo)


def _heads(block: Block, editor: WeightEditor) -> tuple[Tensor, Tensor]:
    """`[q k]` and `[v o^T]` of each head, `(heads, d_head, 2 d)`."""
    assert block.heads
    q, k, v, o = (editor.matrix(block.slots[role]) for role in "qkvo")

    def split(rows: Tensor) -> Tensor:
        assert block.heads
        return rows.reshape(block.heads, -1, rows.shape[1])

    return torch.cat([split(q), split(k)], 2), torch.cat([split(v), split(o.t())], 2)


def tie_attention(block: Block, editor: WeightEditor, *, steps: int = 3) -> None:
    """Rotate heads to bring `k` close to `v^T` and `q` close to `o^T` (pairing kv-qo).

    With G for the heads of q and k, and H for those of v and o, it minimises
    `||G k - v^T H^T||^2 + ||G q - H o^T||^2` by turns, a Procrustes problem for each head.
    """
    q, k, v, o = (editor.matrix(block.slots[role]) for role in "qkvo")
    if not (
        block.heads
        and block.permutable
        and block.rotatable
        and q.shape[0] == q.shape[1] == k.shape[1] == v.shape[0] == v.shape[1] == o.shape[0]
    ):
        return
    heads, d = block.heads, q.shape[0] // block.heads

    def rows(x: Tensor) -> Tensor:
        return x.reshape(heads, d, -1)

    def columns(x: Tensor) -> Tensor:
        return x.reshape(-1, heads, d).movedim(1, 0)

    g = h = torch.eye(d, dtype=q.dtype).expand(heads, d, d)
    for _ in range(steps):
        hv = (h @ rows(v)).reshape(v.shape)
        oh = (columns(o) @ h.mT).movedim(0, 1).reshape(o.shape)
        g = procrustes(rows(k) @ columns(hv) + rows(q) @ columns(oh)).to(q.dtype)
        gk, gq = (g @ rows(k)).reshape(k.shape), (g @ rows(q)).reshape(q.shape)
        h = procrustes(rows(v) @ columns(gk) + (rows(gq) @ columns(o)).mT).to(q.dtype)
    transform_heads(editor, block, g, h)


def balance_hidden(block: Block, editor: WeightEditor) -> None:
    """Give each hidden unit of a ReLU feed-forward rows and columns of the same norm."""
    if block.relu and block.permutable:
        up, down = editor.matrix(block.slots["up"]), editor.matrix(block.slots["down"])
        scale_hidden(editor, block, _ratio(down.norm(dim=0), up.norm(dim=1)).sqrt())


def tie_bottlenecks(blocks: Sequence[Block], editor: WeightEditor) -> None:
    """Bring conv1 and conv3^T of blocks that share one W to each other.

    Units are permuted, and rows scaled with their signs, all compensated by BatchNorms. The
    reference is conv3^T of the first block.
    """
    target = editor.matrix(blocks[0].slots["conv3"]).t()
    for block in blocks:
        conv1, conv2 = block.slots["conv1"], block.slots["conv2"]
        if conv2.columns == conv1.rows * _area(conv2.kernel) and block.permutable:
            _order_units(block, target, editor, reference=block is blocks[0])
        if block is not blocks[0]:
            written = editor.matrix(block.slots["conv3"])
            if block.relu:
                scale_bottleneck_units(
                    editor, block, _ratio(target.norm(dim=1), written.norm(dim=0))
                )  # fmt: skip
            written = editor.matrix(block.slots["conv3"])
            scale_conv_rows(editor, block, 3, _signed_ratio(target.t(), written))
        rows = editor.matrix(conv1)
        scale_conv_rows(editor, block, 1, _signed_ratio(target[:, : rows.shape[1]], rows))


def _order_units(block: Block, target: Tensor, editor: WeightEditor, *, reference: bool) -> None:
    unit = normalize(target)
    conv1 = editor.matrix(block.slots["conv1"])
    first = linear_assignment((normalize(target[:, : conv1.shape[1]]) @ normalize(conv1).t()).abs())
    second = None
    if not reference:
        # ReLU fixes the sign of what conv3 reads, so here the signed similarity counts.
        second = linear_assignment(unit @ normalize(editor.matrix(block.slots["conv3"]).t()).t())
    permute_bottleneck(editor, block, first, second)


def _match_bottleneck(first: Block, block: Block, editor: WeightEditor) -> None:
    """Order the units of a block as those of the first one of its stack, by what they read."""
    conv1, conv2 = block.slots["conv1"], block.slots["conv2"]
    if conv2.columns != conv1.rows * _area(conv2.kernel):
        return
    orders = []
    for role, flip in (("conv1", False), ("conv3", True)):
        a, b = (editor.matrix(x.slots[role]) for x in (first, block))
        a, b = (a.t(), b.t()) if flip else (a, b)
        similarity = normalize(a) @ normalize(b).t()
        orders.append(linear_assignment(similarity if flip else similarity.abs()))
    permute_bottleneck(editor, block, orders[0], orders[1])
    rows, like = editor.matrix(conv1), editor.matrix(first.slots["conv1"])
    scale_conv_rows(editor, block, 1, _signed_ratio(like, rows).sign())


def _area(kernel: tuple[int, ...]) -> int:
    return int(torch.Size(kernel).numel())


def _signed_ratio(target: Tensor, rows: Tensor) -> Tensor:
    """For each row, the scale that gives it the target's norm and the nearer sign."""
    sign = torch.linalg.vecdot(target, rows, dim=1).sign()
    return torch.where(sign < 0, -1.0, 1.0) * _ratio(target.norm(dim=1), rows.norm(dim=1))


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """`over / under`, one where either is nearly zero (a dead unit)."""
    alive = (over > 1e-6 * over.max()) & (under > 1e-6 * under.max())
    return torch.where(alive, over / under.clamp(min=1e-30), torch.ones_like(over))

"""Function-preserving symmetries: permutations, rotations and rescalings of weights.

Many weights compute the same function. Before a fit, a scheme applies such symmetries to bring the
weights closer to its own form. Whether one preserves the function depends on code that names and
shapes do not show (a position bias for each head, rotary positions, a gate), so each function asks
the `WeightEditor` first and does nothing where it is not allowed. `conversion.symmetry_proof` is
what allows: it applies a random one and compares the block's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from tiedconv.core.plan import Block, Member, Slot, Span
from tiedconv.core.units import PERMUTES, READS, WRITES

Allows = Callable[[Block, str], bool]
"""Whether a symmetry, by its name in `SYMMETRIES`, preserves the function of a block."""


class WeightEditor:
    """Tensors by name, copied the first time they are edited.

    Args:
        tensors: name to tensor.
        in_place: edit contiguous tensors themselves instead of copies.
        allows: which symmetries may be applied; None for all.

    Attributes:
        edited: names of the tensors that may have changed.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        in_place: bool = False,
        allows: Allows | None = None,
    ) -> None:
        self.tensors: MutableMapping[str, Tensor] = dict(tensors)
        self._own = {n for n, t in tensors.items() if in_place and t.is_contiguous()}
        self.edited: set[str] = set()
        self._allows = allows
        self._asked: dict[tuple[str, str], bool] = {}

    def allows(self, block: Block, symmetry: str) -> bool:
        """Whether a symmetry, by its name, may be applied to a block."""
        allowed = self._allows is None or self._allows(block, symmetry)
        self._asked[symmetry, block.name] = allowed
        return allowed

    @property
    def symmetries(self) -> dict[str, dict[str, list[str]]]:
        """`used` and `refused`: the names of the symmetries asked for so far, to their blocks."""
        found: dict[str, dict[str, list[str]]] = {"used": {}, "refused": {}}
        for (symmetry, block), allowed in self._asked.items():
            found["used" if allowed else "refused"].setdefault(symmetry, []).append(block)
        return found

    def matrix(self, slot: Slot) -> Tensor:
        """The `(out, in)` matrix of a slot, to read."""
        return slot.matrix_of(self.tensors[slot.tensor])

    def matrices(self, members: Sequence[Member]) -> Sequence[Tensor]:
        """The matrices of a group, float32, to read."""
        return [m.matrix_of(self.tensors[m.slot.tensor]).float() for m in members]

    def edit(self, place: Slot | Span) -> Tensor:
        """A writable view: the `(out, in)` matrix of a slot, or the entries of a span."""
        self.edited.add(place.tensor)
        if place.tensor not in self._own:
            self.tensors[place.tensor] = self.tensors[place.tensor].clone(
                memory_format=torch.contiguous_format
            )
            self._own.add(place.tensor)
        tensor = self.tensors[place.tensor]
        return place.matrix_of(tensor) if isinstance(place, Slot) else place.of(tensor)

    def scale_vector(self, block: Block, role: str, by: Tensor) -> None:
        """Multiply the vector of a block that has this role, if there is one."""
        if role in block.vectors:
            self.edit(block.vectors[role]).mul_(by)


def scale_conv_rows(editor: WeightEditor, block: Block, i: int, c: Tensor) -> None:
    """Scale the rows of `conv<i>` by c (any sign, none zero); BatchNorm i compensates.

    BatchNorm of `c x` equals BatchNorm of x when its running mean is scaled by c, its variance
    by c^2, and its weight by `sqrt(c^2 v + eps) / (c sqrt(v + eps))`.

    Args:
        c: `(out,)`.
    """
    if not editor.allows(block, f"scale conv{i} rows"):
        return
    editor.edit(block.slots[f"conv{i}"]).mul_(c.unsqueeze(1))
    editor.edit(block.vectors[f"bn{i}.running_mean"]).mul_(c)
    variance = editor.edit(block.vectors[f"bn{i}.running_var"])
    scaled = c.square() * variance
    ratio = torch.sqrt(scaled + block.eps) / torch.sqrt(variance + block.eps) / c
    editor.edit(block.vectors[f"bn{i}.weight"]).mul_(ratio)
    variance.copy_(scaled)


def scale_bottleneck_units(editor: WeightEditor, block: Block, f: Tensor) -> None:
    """Scale the columns of conv3 by f > 0, and BatchNorm 2 by 1 / f; ReLU is homogeneous.

    Args:
        f: `(width,)`.
    """
    if not editor.allows(block, "scale bottleneck units"):
        return
    editor.edit(block.slots["conv3"]).mul_(f)
    for part in ("weight", "bias"):
        editor.edit(block.vectors[f"bn2.{part}"]).div_(f)


def permute_units(editor: WeightEditor, block: Block, units: str, order: Tensor) -> None:
    """Put the units of a block in another order: rows, columns and entries of vectors with them.

    Args:
        units: their name, see `core.units`.
        order: `(units,)`.
    """
    if not editor.allows(block, PERMUTES[units]):
        return
    for role, slot in block.slots.items():
        if WRITES.get(role) == units:
            _reorder(editor.edit(slot), rows_of(order, slot.rows))
        if READS.get(role) == units:
            _reorder(editor.edit(slot).t(), rows_of(order, slot.columns))
    for role, span in block.vectors.items():
        if WRITES.get(role.partition(".")[0]) == units:
            entries = editor.edit(span)
            _reorder(entries, rows_of(order, len(entries)))


def rows_of(order: Tensor, count: int) -> Tensor:
    """The order of `count` rows (or columns) of which each unit has as many."""
    each = count // len(order)
    return (order.unsqueeze(1) * each + torch.arange(each)).flatten()


def permute_bottleneck(
    editor: WeightEditor, block: Block, first: Tensor | None, second: Tensor | None
) -> None:
    """Put the units after conv1 (`first`) and after conv2 (`second`) in another order.

    Only for a conv2 without groups. Orders are index tensors `(width,)`.
    """
    for units, order in (("conv1", first), ("conv2", second)):
        if order is not None:
            permute_units(editor, block, units, order)


def permute_hidden(editor: WeightEditor, block: Block, order: Tensor) -> None:
    """Put the hidden units of a feed-forward in another order, `(hidden,)`."""
    permute_units(editor, block, "hidden", order)


def scale_hidden(editor: WeightEditor, block: Block, c: Tensor) -> None:
    """Scale the hidden units of a ReLU feed-forward by c > 0, `(hidden,)`."""
    if not editor.allows(block, "scale hidden units"):
        return
    editor.edit(block.slots["up"]).mul_(c.unsqueeze(1))
    editor.scale_vector(block, "up.bias", c)
    editor.edit(block.slots["down"]).div_(c)


def transform_heads(
    editor: WeightEditor, block: Block, qk: Tensor | None = None, vo: Tensor | None = None
) -> None:
    """Change the basis inside each head: `(q, k) -> (G q, G^-T k)`, `(v, o) -> (H v, o H^-1)`.

    Nothing is done to a block whose heads have no basis of their own (`Block.rotatable`).

    Args:
        qk, vo: invertible `(heads, d_head, d_head)`.
    """
    if not block.rotatable:
        return
    if qk is not None and editor.allows(block, "rotate q and k"):
        _heads_times(editor, block, "q", qk)
        _heads_times(editor, block, "k", torch.linalg.inv(qk).mT)
    if vo is not None and editor.allows(block, "rotate v and o"):
        _heads_times(editor, block, "v", vo)
        o = editor.edit(block.slots["o"])
        heads, d, _ = vo.shape
        inverse = torch.linalg.inv(vo).to(o.dtype)
        o.copy_(torch.einsum("ohd,hde->ohe", o.reshape(-1, heads, d), inverse).reshape(o.shape))


def permute_heads(editor: WeightEditor, block: Block, order: Tensor) -> None:
    """Put the heads of an attention in another order, `(heads,)`."""
    permute_units(editor, block, "heads", order)


def fold_norm(editor: WeightEditor, block: Block) -> bool:
    """Move a LayerNorm's scale into the weights that read it; False if there is none to move."""
    if "norm.weight" not in block.vectors or not editor.allows(block, "fold norm"):
        return False
    scale = editor.edit(block.vectors["norm.weight"])
    if float(scale.abs().min()) < 1e-4:
        return False  # the bias of a dead channel can't be divided by its scale
    for role in ("gate", "up") if block.kind == "ffn" else ("q", "k", "v"):
        if role in block.slots:
            editor.edit(block.slots[role]).mul_(scale)
    editor.edit(block.vectors["norm.bias"]).div_(scale)
    scale.fill_(1.0)
    return True


def _heads_times(editor: WeightEditor, block: Block, role: str, g: Tensor) -> None:
    """Rows of q, k or v, head by head, from the left times g; the bias with them."""
    heads, d, _ = g.shape
    rows = editor.edit(block.slots[role])
    g = g.to(rows.dtype)
    rows.copy_((g @ rows.reshape(heads, d, -1)).reshape(rows.shape))
    if f"{role}.bias" in block.vectors:
        bias = editor.edit(block.vectors[f"{role}.bias"])
        bias.copy_((g @ bias.reshape(heads, d, 1)).flatten())


def _reorder(rows: Tensor, order: Tensor) -> None:
    rows.copy_(rows[order].clone())

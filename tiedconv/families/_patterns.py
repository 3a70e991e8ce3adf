"""The building blocks of families: named tensors below a numbered prefix, as data."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tiedconv.core.expr import Shape
from tiedconv.core.plan import Block, Slot, Span
from tiedconv.core.units import is_depthwise
from tiedconv.families._inverted import add_inner

Hints = Mapping[str, float | str]
Shapes = Mapping[str, Shape]


IN_LAYER = r"(?:.*\D)?(?P<n>\d+)"
"""A prefix that ends with the number of a layer, whatever the layers are called."""


@dataclass(frozen=True)
class Family:
    """A way to find blocks in a model's tensor names.

    Args:
        name: shown in plans and errors.
        pattern: one example of the tensor names it matches, for people.
        find: from shapes and hints to blocks.
        last: True for a family that matches anything, tried after all others.
    """

    name: str
    pattern: str
    find: Callable[[Shapes, Hints], list[Block]]
    last: bool = False


@dataclass(frozen=True)
class Attention:
    """Names of an attention's tensors below the prefix `at`.

    Either `qkv` names one fused tensor (rows q, k, v; `transposed` if it is stored as
    `(in, 3 * out)`), or `q`, `k`, `v` name three, or `q` and `kv` two (rows k, v). `part` tells two
    attentions below one prefix apart.
    """

    at: str
    o: str
    qkv: str = ""
    q: str = ""
    k: str = ""
    v: str = ""
    kv: str = ""
    transposed: bool = False
    ignored: tuple[str, ...] = ()
    norm: str = ""
    part: str = ""

    def find(self, shapes: Shapes, hints: Hints) -> Iterator[Block]:
        """Every attention whose four matrices are there."""
        for prefix, stack, index in prefixes(self.at, self.qkv or self.q, shapes):
            slots: dict[str, Slot] = {}
            vectors: dict[str, Span] = {}
            named = {"q": self.q, "k": self.k, "v": self.v, "o": self.o}
            for roles, fused in (("qkv", self.qkv), ("kv", self.kv)):
                if fused:
                    _add_fused(slots, vectors, f"{prefix}.{fused}", roles, shapes, self.transposed)
                    named = {r: n for r, n in named.items() if r not in roles}
            if not add_whole(slots, vectors, prefix, named, shapes, self.transposed):
                continue
            is_fused = bool(self.qkv or self.kv)
            if not {"q", "k", "v"} <= slots.keys() or (
                is_fused and slots["v"].rows != slots["o"].columns
            ):
                continue  # its rows are not q, k and v of equal width
            slots = {role: slots[role] for role in "qkvo"}
            known = {s.tensor for s in slots.values()} | {v.tensor for v in vectors.values()}
            heads = _heads(prefix, slots["q"].rows, hints)
            _add_own_biases(slots, vectors, prefix, shapes)
            known |= {v.tensor for v in vectors.values()}
            norms = _norms_in_heads(prefix, slots["q"].rows // (heads or 1), shapes)
            permutable = _in_groups(slots) and not _unknown_tensors(
                prefix, known | norms, self.ignored, shapes
            )
            is_even = slots["q"].rows == slots["k"].rows
            vectors |= _pre_norm(prefix, self.norm, shapes, hints)
            part = f".{self.part}" if self.part else ""
            yield Block(
                "attention", prefix + part, stack + part, index, slots, vectors,
                heads=heads, permutable=permutable,
                rotatable=is_even and not norms and "rotary" not in hints,
            )  # fmt: skip


@dataclass(frozen=True)
class FeedForward:
    """Names of a feed-forward's two matrices below the prefix `at`.

    `act` is where a hint may name the activation. `alone` means that the prefix is the
    feed-forward's own, so that an unknown tensor below it (a norm, a gate) shows that hidden units
    are not permutable, unless it is `ignored`. `gate` names a third matrix of the shape of `up`,
    whose output `up`'s is multiplied by; the same name as `up` where one tensor holds both.
    `inverted` means that norms, a depthwise convolution and squeeze-and-excitation may lie between
    the two, known by their sizes (`_inverted.add_inner`), and that `down` may write another width
    than `up` reads.
    """

    at: str
    up: str
    down: str
    act: str = "act"
    transposed: bool = False
    alone: bool = True
    ignored: tuple[str, ...] = ()
    norm: str = ""
    gate: str = ""
    inverted: bool = False

    def find(self, shapes: Shapes, hints: Hints) -> Iterator[Block]:
        """Every feed-forward whose two matrices have shapes (m, d) and (d, m)."""
        for prefix, stack, index in prefixes(self.at, self.up, shapes):
            slots: dict[str, Slot] = {}
            vectors: dict[str, Span] = {}
            named = {"gate": self.gate, "up": self.up, "down": self.down}
            if not self.gate:
                del named["gate"]
            elif self.gate == self.up:
                named = {"down": self.down}
                halves = ("gate", "up")
                _add_fused(slots, vectors, f"{prefix}.{self.up}", halves, shapes, self.transposed)
            if not add_whole(slots, vectors, prefix, named, shapes, self.transposed):
                continue
            wide = {slot.matrix_shape for role, slot in slots.items() if role != "down"}
            if not wide or not self._fits(wide, slots["down"].matrix_shape):
                continue
            if self.inverted and is_depthwise(slots["up"]):
                continue  # a block that does not expand
            known = {s.tensor for s in slots.values()} | {v.tensor for v in vectors.values()}
            if self.inverted:
                permutable = add_inner(slots, vectors, prefix, known, shapes)
            else:
                permutable = not (
                    self.alone and _unknown_tensors(prefix, known, self.ignored, shapes)
                )
            vectors |= _pre_norm(prefix, self.norm, shapes, hints)
            relu = str(hints.get(f"{prefix}.{self.act}", "")).lower() == "relu"
            relu = relu and not self.inverted  # more lies between than an activation
            name = prefix if self.alone else f"{prefix}.ffn"
            stack = stack if self.alone else f"{stack}.ffn"
            yield Block("ffn", name, stack, index, slots, vectors, relu=relu, permutable=permutable)

    def _fits(self, wide: Collection[tuple[int, int]], down: tuple[int, int]) -> bool:
        """Whether the matrices that write units and the one that reads them belong together."""
        if self.inverted:
            return {rows for rows, _ in wide} == {down[1]}
        return {*wide} == {down[::-1]}


@dataclass(frozen=True)
class Bottleneck:
    """Names of a ResNet bottleneck's convolutions and BatchNorms below the prefix `at`.

    `shortcuts` are the names that a convolution on the way around the block may have: a sixth of
    a ResNet's weights, which is in no pair and no stack, but can be stored at low rank.
    """

    at: str
    convs: tuple[str, str, str]
    norms: tuple[str, str, str]
    acts: tuple[str, ...] = ("relu", "act1", "act2")
    ignored: tuple[str, ...] = field(default=("downsample", "se", "shortcut"))
    shortcuts: tuple[str, ...] = ("downsample.0.weight", "downsample.1.weight")

    def find(self, shapes: Shapes, hints: Hints) -> Iterator[Block]:
        """Every bottleneck with three convolutions and three BatchNorms."""
        for prefix, stack, index in prefixes(self.at, self.convs[2], shapes):
            slots: dict[str, Slot] = {}
            vectors: dict[str, Span] = {}
            named = {f"conv{i}": name for i, name in enumerate(self.convs, 1)}
            parts = ("weight", "bias", "running_mean", "running_var")
            norms = {
                f"bn{i}.{part}": f"{prefix}.{norm}.{part}"
                for i, norm in enumerate(self.norms, 1)
                for part in parts
            }
            if not add_whole(slots, vectors, prefix, named, shapes, False):
                continue
            if vectors or any(name not in shapes for name in norms.values()):
                continue  # convolutions with biases or another norm: rescaling does not apply
            vectors = {role: Span(name, 0, shapes[name][0]) for role, name in norms.items()}
            acts = [str(hints.get(f"{prefix}.{a}", "")).lower() for a in self.acts]
            eps = hints.get(f"{prefix}.{self.norms[0]}.eps", 1e-5)
            yield Block(
                "bottleneck", prefix, stack, index, slots, vectors,
                relu=set(filter(None, acts)) == {"relu"}, eps=float(eps),
            )  # fmt: skip
            for name in (f"{prefix}.{shortcut}" for shortcut in self.shortcuts):
                if len(shapes.get(name, ())) == 4:
                    around = {"shortcut": Slot.whole(name, shapes[name], False)}
                    yield Block("linear", prefix, stack, index, around)


@dataclass(frozen=True)
class Linear:
    """Matrices below the prefix `at` whose neighbours are unknown: role to tensor name.

    Those that exist make one block. If `opt_in`, they are converted only if a recipe names them.
    """

    at: str
    roles: Mapping[str, str]
    opt_in: bool = False

    def find(self, shapes: Shapes, hints: Hints) -> Iterator[Block]:
        """One block for each prefix that has any of the matrices."""
        del hints
        found: dict[tuple[str, str, int], dict[str, Slot]] = {}
        for role, name in self.roles.items():
            for place in prefixes(self.at, name, shapes):
                add_whole(found.setdefault(place, {}), {}, place[0], {role: name}, shapes, False)
        for place, slots in found.items():
            if slots:
                yield Block("linear", *place, slots, permutable=False, opt_in=self.opt_in)


def pattern_family(
    name: str, pattern: str, *patterns: Attention | FeedForward | Bottleneck | Linear
) -> Family:
    """A family that is the union of patterns; a tensor belongs to the first that claims it."""

    def find(shapes: Shapes, hints: Hints) -> list[Block]:
        blocks: list[Block] = []
        taken: set[str] = set()
        for pattern in patterns:
            found = [
                block
                for block in pattern.find(shapes, hints)
                if taken.isdisjoint(slot.tensor for slot in block.slots.values())
            ]
            blocks += found
            taken |= {slot.tensor for block in found for slot in block.slots.values()}
        return blocks

    return Family(name, pattern, find)


def prefixes(at: str, anchor: str, shapes: Shapes) -> Iterator[tuple[str, str, int]]:
    """Prefix, stack (its number replaced by `*`) and number of each match of `at`.

    `at` is a regular expression with a group `n`, the place in the stack, or without it where there
    is no stack; `anchor` is a tensor that must stand below the prefix.
    """
    pattern = re.compile(f"(?P<prefix>{at})" + re.escape(f".{anchor}"))
    for name in shapes:
        if match := pattern.fullmatch(name):
            prefix = match["prefix"]
            if "n" in pattern.groupindex:
                start, stop = match.span("n")
                yield prefix, f"{prefix[:start]}*{prefix[stop:]}", int(match["n"])
            else:
                yield prefix, prefix, 0


def add_whole(
    slots: dict[str, Slot],
    vectors: dict[str, Span],
    prefix: str,
    named: Mapping[str, str],
    shapes: Shapes,
    transposed: bool,
) -> bool:
    """Add the named tensors as whole slots, with their biases; False if one is missing."""
    for role, name in named.items():
        tensor = f"{prefix}.{name}"
        if tensor not in shapes or len(shapes[tensor]) not in (2, 4, 5):
            return False
        slots[role] = Slot.whole(tensor, shapes[tensor], transposed)
        if (bias := _bias(tensor)) in shapes:
            vectors[f"{role}.bias"] = Span(bias, 0, shapes[bias][0])
    return True


# Classes with pre-norm layers, where nothing else reads the norm's output. The name is not enough:
# timm's ResPostBlock calls its post-norm norm1 too.
_PRE_NORM = ("EncoderBlock", "Block", "ViTLayer", "DeiTLayer", "SwinTransformerBlock")


def _pre_norm(prefix: str, norm: str, shapes: Shapes, hints: Hints) -> dict[str, Span]:
    """The LayerNorm beside the block, if it is known to feed this block alone."""
    parent = prefix.rpartition(".")[0]
    names = {f"norm.{part}": f"{parent}.{norm}.{part}" for part in ("weight", "bias")}
    if not norm or hints.get(parent) not in _PRE_NORM:
        return {}
    if any(name not in shapes for name in names.values()):
        return {}
    return {role: Span(name, 0, shapes[name][0]) for role, name in names.items()}


def _heads(prefix: str, rows: int, hints: Hints) -> int | None:
    """Number of heads, from whichever attribute the attention's module has."""
    for name in ("num_heads", "num_attention_heads"):
        if isinstance(heads := hints.get(f"{prefix}.{name}"), int | float) and heads:
            return int(heads)
    width = hints.get(f"{prefix}.head_dim")
    whole = isinstance(width, int | float) and width and rows % width == 0
    return rows // int(width) if whole else None  # type: ignore[arg-type]


def _in_groups(slots: Mapping[str, Slot]) -> bool:
    """Whether every head of keys has one of values, and as many of queries as any other."""
    q, k, v = (slots[role].rows for role in "qkv")
    return k == v and q % k == 0 and q == slots["o"].columns


_NORM_IN_HEADS = re.compile(
    r"(?:(?:q|k|query|key)_?(?:norm|layer_?norm|ln)|norm_?(?:q|k))\.(?:weight|bias)"
)


def _norms_in_heads(prefix: str, width: int, shapes: Shapes) -> set[str]:
    """Norms of queries and of keys in each head by itself, with the same scales for all heads."""
    return {
        name
        for name, shape in shapes.items()
        if name.startswith(f"{prefix}.")
        and _NORM_IN_HEADS.fullmatch(name[len(prefix) + 1 :])
        and shape == (width,)
    }


def _add_own_biases(
    slots: Mapping[str, Slot], vectors: dict[str, Span], prefix: str, shapes: Shapes
) -> None:
    """Add biases that the attention itself holds (BEiT, EVA), not its layers."""
    for role in "qkv":
        name = f"{prefix}.{role}_bias"
        if shapes.get(name) == (slots[role].rows,):
            vectors.setdefault(f"{role}.bias", Span(name, 0, slots[role].rows))


def is_matrix(name: str, shape: Shape, hints: Hints, least: int = 2) -> bool:
    """Whether a tensor is the weight of a linear layer or a convolution, not a depthwise one.

    Args:
        name, shape: of the tensor.
        hints: the class of its module, where known, tells an embedding's table apart; else its
            name does.
        least: rows and columns.
    """
    if len(shape) not in (2, 4, 5) or not name.endswith("weight"):
        return False
    owner = str(hints.get(name.rpartition(".")[0], ""))
    is_table = owner.endswith("Embedding") if owner else "embed" in name
    depthwise = len(shape) > 2 and shape[1] == 1
    if is_table or depthwise or "ConvTranspose" in owner:  # the last is stored (in, out, ...)
        return False
    return min(shape[0], math.prod(shape[1:])) >= least


def _add_fused(
    slots: dict[str, Slot],
    vectors: dict[str, Span],
    tensor: str,
    roles: Sequence[str],
    shapes: Shapes,
    transposed: bool,
) -> None:
    """Add the equal parts of a fused tensor, with those of its bias; none if it has none."""
    if len(shapes.get(tensor, ())) not in (2, 4, 5):
        return
    rows = Slot.whole(tensor, shapes[tensor], transposed).stop
    if rows % len(roles):
        return
    each = rows // len(roles)
    for i, role in enumerate(roles):
        start, stop = i * each, (i + 1) * each
        slots[role] = Slot(tensor, shapes[tensor], start, stop, transposed)
        if (bias := _bias(tensor)) in shapes:
            vectors[f"{role}.bias"] = Span(bias, start, stop)


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _unknown_tensors(
    prefix: str, known: Iterable[str], ignored: tuple[str, ...], shapes: Shapes
) -> bool:
    """Whether tensors lie below the prefix that the pattern does not know."""
    known = set(known)
    return any(
        name.startswith(f"{prefix}.")
        and name not in known
        and not name[len(prefix) + 1 :].startswith(ignored or ("\0",))
        for name in shapes
    )

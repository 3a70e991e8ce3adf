"""A conversion as plain data.

Three classes describe the original model, one the compact model:

- `Slot`: one logical `(out, in)` matrix inside a named tensor;
- `Block`: slots of one layer that belong together (a feed-forward, an attention, a bottleneck),
  with the facts that the mathematics may use;
- `Group`: slots that a scheme stores together, as factors;
- `Plan`: every converted weight as an expression over stored tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tiedconv.core.expr import Dequantize, Expr, Ref, Shape, is_name
from tiedconv.core.expr_json import all_from_json, check_size
from tiedconv.core.options import current_options
from tiedconv.core.tables import PlanTable
from tiedconv.errors import PlanError

PREFIX = "tied/"


@dataclass(frozen=True)
class Slot:
    """One logical matrix of shape `(out, in)` inside a named tensor.

    A convolution's matrix is `(out, in * kh * kw)`; a fused qkv holds three slots, which
    differ in their rows; a tensor stored as `(in, out)` (HF `Conv1D`) has `transposed` set.
    """

    tensor: str
    shape: Shape
    start: int
    stop: int
    transposed: bool = False

    @classmethod
    def whole(cls, tensor: str, shape: Shape, transposed: bool = False) -> Slot:
        """The slot that covers all rows of a tensor."""
        return cls(tensor, shape, 0, shape[1] if transposed else shape[0], transposed)

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return self.stop - self.start

    @property
    def columns(self) -> int:
        """Number of inputs, times the size of the kernel."""
        return self.shape[0] if self.transposed else math.prod(self.shape[1:])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`(out, in * kh * kw)`."""
        return (self.rows, self.columns)

    @property
    def kernel(self) -> Shape:
        """The size of the convolution, empty for a linear layer."""
        return self.shape[2:]

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return self.rows * self.columns

    def matrix_of(self, tensor: Tensor) -> Tensor:
        """The view of shape `matrix_shape` of the whole tensor."""
        rows = tensor.t() if self.transposed else tensor.reshape(tensor.shape[0], -1)
        return rows[self.start : self.stop]

    def to_json(self) -> list[Any]:
        """`[tensor, shape, start, stop, transposed]`."""
        return [self.tensor, list(self.shape), self.start, self.stop, self.transposed]

    @classmethod
    def from_json(cls, data: Any) -> Slot:
        """The slot of a list made by `to_json`; raises PlanError if it is malformed."""
        match data:
            case [str(tensor), [*shape], start, stop, bool(transposed)] if (
                is_name(tensor)
                and 2 <= len(shape) <= 6
                and all(type(n) is int and n > 0 for n in [*shape, stop])
                and type(start) is int
                and 0 <= start < stop <= (shape[1] if transposed else shape[0])
            ):
                return cls(tensor, tuple(shape), start, stop, transposed)
        raise PlanError(
            f"The plan holds a malformed slot: {reprlib.repr(data)}",
            hint="Convert the model again",
            code="malformed-plan",
        )


@dataclass(frozen=True)
class Span:
    """Entries `start` to `stop` of a named vector: a bias, a norm's scale."""

    tensor: str
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """The view of the whole vector."""
        return tensor[self.start : self.stop]


@dataclass(frozen=True)
class Block:
    """Slots of one layer that belong together.

    Args:
        kind: `ffn` (slots up, down, see `units` for more), `attention` (q, k, v, o), `bottleneck`
            (conv1, conv2, conv3) or `linear` (any).
        name: where it is, such as `blocks.3.mlp`.
        stack: the stack it belongs to, such as `blocks.*.mlp`.
        index: its place in the stack.
        slots: role to slot.
        vectors: role to the vector beside it (biases, norms), where there is one.
        heads: attention heads, where known.
        relu: True if the only activation of the hidden units is a ReLU, so that they may be scaled.
        permutable: True if hidden units and heads may be permuted, as nothing else reads them.
        rotatable: False if heads share keys, norm q and k, or rotate positions: their basis stays.
        eps: of the BatchNorms.
        opt_in: True for small, sensitive modules (a detector's heads, its sampling offsets): they
            are converted only if a pattern of the recipe names them.
        unmatched: True for a matrix that is alone of its kind, such as a classifier.
    """

    kind: str
    name: str
    stack: str
    index: int
    slots: Mapping[str, Slot]
    vectors: Mapping[str, Span] = field(default_factory=dict)
    heads: int | None = None
    relu: bool = False
    permutable: bool = True
    rotatable: bool = True
    eps: float = 1e-5
    opt_in: bool = False
    unmatched: bool = False

    def keep(self, tensors: Iterable[str]) -> Block:
        """The same block with only the slots that lie in `tensors`; not permutable without all."""
        names = set(tensors)
        slots = {role: s for role, s in self.slots.items() if s.tensor in names}
        permutable = self.permutable and len(slots) == len(self.slots)
        return dataclasses.replace(self, slots=slots, permutable=permutable)


@dataclass(frozen=True)
class Member:
    """A slot as a group sees it; `flip` means that its transpose takes part."""

    slot: Slot
    flip: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that takes part."""
        rows, columns = self.slot.matrix_shape
        return (columns, rows) if self.flip else (rows, columns)

    def matrix_of(self, tensor: Tensor) -> Tensor:
        """The matrix that takes part, as a view."""
        matrix = self.slot.matrix_of(tensor)
        return matrix.t() if self.flip else matrix


@dataclass(frozen=True)
class Group:
    """Slots that one scheme stores together.

    Args:
        name: such as `blocks.3.mlp`; factors are stored as `tied/blocks/3/mlp/<factor>`.
        scheme: its name.
        options: the scheme's options, ranks resolved, as JSON.
        members: the slots.
        factors: local factor name to shape.
        error: relative Frobenius error of the fit, None before it.
    """

    name: str
    scheme: str
    options: Mapping[str, Any]
    members: tuple[Member, ...]
    factors: Mapping[str, Shape]
    error: float | None = None

    @property
    def original(self) -> int:
        """Parameters before."""
        return sum(m.slot.numel for m in self.members)

    @property
    def stored(self) -> int:
        """Parameters after."""
        return sum(math.prod(s) for s in self.factors.values())

    def stored_name(self, factor: str) -> str:
        """The stored tensor that holds a factor."""
        return stored_name(self.name, factor)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return {
            "name": self.name,
            "scheme": self.scheme,
            "options": dict(self.options),
            "members": [[m.slot.to_json(), m.flip] for m in self.members],
            "factors": {k: list(v) for k, v in self.factors.items()},
            "error": self.error,
        }

    @classmethod
    def from_json(cls, data: Any) -> Group:
        """The group of plain data; raises PlanError if it is malformed."""
        match data:
            case {
                "name": str(name),
                "scheme": str(scheme),
                "options": dict(options),
                "members": [*members],
                "factors": dict(factors),
                "error": None | float() | int() as error,
            } if len(data) == 6 and error is not True and error is not False:
                return cls(
                    _name(name),
                    _name(scheme),
                    current_options(options),
                    tuple(Member(Slot.from_json(s), flip) for s, flip in _pairs(members)),
                    {_name(k): _shape(v) for k, v in factors.items()},
                    error,
                )
        raise PlanError(
            "The plan holds a malformed group",
            hint="Convert the model again",
            code="malformed-plan",
        )


@dataclass(frozen=True)
class Plan(PlanTable):
    """Which expression over which stored tensors gives each converted weight.

    Args:
        weights: original tensor name to its expression.
        groups: which slots are stored together, for fitting and for the report.
        kept: tensors stored under their own names: name to shape.
        buffers: those of `kept` that are not parameters (BatchNorm statistics).
        aliases: second names of tensors that the original model itself shares.
    """

    weights: Mapping[str, Expr]
    groups: tuple[Group, ...]
    kept: Mapping[str, Shape]
    buffers: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __deepcopy__(self, memo: object) -> Plan:
        return self  # immutable

    @functools.cached_property
    def factors(self) -> dict[str, Shape]:
        """Stored tensors that expressions read: name to shape."""
        found: dict[str, Shape] = {}
        for name, expr in self.weights.items():
            for ref in (node for node in expr.walk() if isinstance(node, Ref)):
                if found.setdefault(ref.name, ref.shape) != ref.shape:
                    what = f"{name} reads {ref.name} as {ref.shape}, not {found[ref.name]}"
                    raise _bad(f"{what} as a weight before it", "contradictory-plan")
        return found

    @functools.cached_property
    def codes(self) -> dict[str, Dequantize]:
        """Stored tensors that hold packed integers: name to the matrix that they are read as."""
        found: dict[str, Dequantize] = {}
        for name, expr in self.weights.items():
            for node in (node for node in expr.walk() if isinstance(node, Dequantize)):
                (codes, *_) = node.codes.refs
                if found.setdefault(codes, node) != node:
                    what = f"{name} reads the codes {codes} in another way than a weight before it"
                    raise _bad(what, "contradictory-plan")
        return found

    @property
    def tensors(self) -> dict[str, Shape]:
        """All stored tensors: name to shape."""
        return {**self.kept, **self.factors}

    @property
    def stored(self) -> int:
        """Parameters after conversion; a code is one."""
        kept = sum(math.prod(s) for n, s in self.kept.items() if n not in self.buffers)
        codes = {name: node.shape for name, node in self.codes.items()}
        return kept + sum(math.prod(codes.get(n, s)) for n, s in self.factors.items())

    @property
    def original(self) -> int:
        """Parameters before conversion."""
        kept = sum(math.prod(s) for n, s in self.kept.items() if n not in self.buffers)
        return kept + sum(math.prod(e.shape) for e in self.weights.values())

    def validate(self) -> None:
        """Raise PlanError unless shapes, names and references are consistent."""
        factors, codes = self.factors, self.codes
        for name, expr in self.weights.items():
            nodes = [type(n) for n in expr.walk() if isinstance(n, Dequantize) or _is_ref(n, codes)]
            if nodes.count(Ref) != nodes.count(Dequantize):
                raise _bad(f"{name} reads codes as if they were a weight", "contradictory-plan")
        check_size(self.weights.values())
        for name, shape in factors.items():
            if not name.startswith(PREFIX) or "." in name or name in self.kept:
                raise _bad(
                    f"it stores a factor under the name {name!r} of shape {shape}", "invalid-factor"
                )
        for name in self.weights:
            if name in self.kept or name in self.aliases:
                raise _bad(f"{name} is both computed and stored", "duplicate-tensor")
        if not self.buffers <= self.kept.keys():
            raise _bad("it lists buffers that it does not store", "unknown-buffer")
        for alias, name in self.aliases.items():
            if alias in self.kept or not (name in self.kept or name in self.weights):
                raise _bad(
                    f"{alias} is a second name of {name}, which is not there", "invalid-alias"
                )
        promised = {g.stored_name(f): s for g in self.groups for f, s in g.factors.items()}
        if any(factors.get(n, s) != s for n, s in promised.items()):
            raise _bad(
                "its groups and its expressions disagree about a factor's shape",
                "contradictory-plan",
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return {
            "weights": {n: e.to_json() for n, e in self.weights.items()},
            "groups": [g.to_json() for g in self.groups],
            "kept": {n: list(s) for n, s in self.kept.items()},
            "buffers": sorted(self.buffers),
            "aliases": dict(self.aliases),
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """The plan of plain data, validated; raises PlanError if it is malformed."""
        match data:
            case {
                "weights": dict(weights),
                "groups": [*groups],
                "kept": dict(kept),
                "buffers": [*buffers],
                "aliases": dict(aliases),
            } if len(data) == 5:
                plan = cls(
                    {_name(n): e for n, e in all_from_json(weights).items()},
                    tuple(Group.from_json(g) for g in groups),
                    {_name(n): _shape(s) for n, s in kept.items()},
                    frozenset(map(_name, buffers)),
                    {_name(a): _name(n) for a, n in aliases.items()},
                )
                plan.validate()
                return plan
        raise _bad("its entries are not those of a plan")


def _is_ref(node: Expr, names: Collection[str]) -> bool:
    return isinstance(node, Ref) and node.name in names


def stored_name(group: str, factor: str) -> str:
    """`tied/<group>/<factor>`; a parameter's name may hold no dot, so dots become slashes."""
    return f"{PREFIX}{group.replace('.', '/')}/{factor}"


def _pairs(members: list[Any]) -> Iterable[tuple[Any, bool]]:
    for member in members:
        if not isinstance(member, list) or len(member) != 2 or not isinstance(member[1], bool):
            raise _bad("a group's member is malformed")
        yield member[0], member[1]


def _name(value: Any) -> str:
    if is_name(value):
        return str(value)
    raise _bad(f"{reprlib.repr(value)} is not a name")


def _shape(value: Any) -> Shape:
    if (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(n) is int and n >= 0 for n in value)
    ):
        return tuple(value)
    raise _bad(f"{reprlib.repr(value)} is not a shape")


def _bad(what: str, code: str = "malformed-plan") -> PlanError:
    return PlanError(
        f"The plan is malformed: {what}",
        "The model can't be rebuilt from it",
        "If it came from a file, the file is damaged or forged: convert the model again",
        code=code,
    )

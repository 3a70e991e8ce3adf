"""Weights of weight generators: their expression, and how it is recognised.

A *weight generator* is a linear layer whose output is a weight: its rows are `groups * out * in`,
its columns the width of the query q. Adaptive LORS (Li et al., arXiv 2403.04303, section 3.3) gives
each layer of a stack of generators its own part

    W^g(q) = sum_k B_k^g E_k(q) A_k^g,      E_k(q) = E_k q of shape (rank, rank)

As a tensor `(groups, out, in, width)` that is a Tucker-2 product: two matrix products with E, whose
last dimension is only carried along. With q in its place, the same two products give the output:
the weight of the generator is never materialised. A generator is recognised by the form of its
expression alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from tiedconv.core.expr import Expr, MatMul, Permute, Reshape

_FRONT = (0, 4, 1, 2, 3)  # E (1, K, r, s, width) to (1, width, K, r, s)
_BACK = (0, 2, 3, 1)  # (groups, width, out, in) to (groups, out, in, width)


@dataclass(frozen=True)
class Generated:
    """The parts of a generated weight.

    Args:
        core: `(terms * r * s, width)`: E of all terms, stacked in rows.
        left: `(groups, 1, out, terms * r)`: B of all terms side by side.
        right: `(groups, 1, terms, s, in)`: A of all terms.
    """

    core: Expr
    left: Expr
    right: Expr

    @property
    def inner(self) -> tuple[int, int, int]:
        """Terms, and the shape `(r, s)` of E_k(q) for each."""
        terms, s = self.right.shape[2:4]
        return terms, self.left.shape[3] // terms, s

    @property
    def outputs(self) -> int:
        """Rows of the generator: `groups * out * in`."""
        groups, _, out, _ = self.left.shape
        return groups * out * self.right.shape[4]

    @property
    def flops(self) -> int:
        """Multiplications of both products for each row of features; that with E is not counted."""
        terms, r, s = self.inner
        groups, _, out, _ = self.left.shape
        return groups * terms * s * out * (r + self.right.shape[4])


def generate(e: Expr, b: Expr, a: Expr, groups: int, terms: int) -> Expr:
    """The generator `(groups * out * in, width)` of `sum_k B_k^g E_k(q) A_k^g`.

    Args:
        e: `(terms * rank * rank, width)`.
        b: `(groups * out, terms * rank)`.
        a: `(groups * terms * rank, in)`.
    """
    out, inputs = b.shape[0] // groups, a.shape[1]
    r, s = b.shape[1] // terms, a.shape[0] // (groups * terms)
    width = e.shape[1]
    core = Permute(Reshape(e, (1, terms, r, s, width)), _FRONT)
    right = Reshape(a, (groups, 1, terms, s, inputs))
    left = Reshape(b, (groups, 1, out, terms * r))
    inner = Reshape(MatMul(core, right), (groups, width, terms * r, inputs))
    whole = Permute(MatMul(left, inner), _BACK)
    return Reshape(whole, (groups * out * inputs, width))


def parts_of(expr: Expr) -> Generated | None:
    """The parts of an expression that `generate` built; None for any other."""
    match expr:
        case Reshape(
            x=Permute(
                x=MatMul(
                    a=Reshape() as left,
                    b=Reshape(
                        x=MatMul(
                            a=Permute(x=Reshape(x=core) as stacked, dims=front),
                            b=Reshape() as right,
                        )
                    ),
                ),
                dims=back,
            )
        ) if front == _FRONT and back == _BACK:
            found = Generated(core, left, right)
            return found if _fits(expr, stacked, found) else None
    return None


def _fits(expr: Expr, stacked: Expr, found: Generated) -> bool:
    """Whether the sizes are those of a generator, too: a file may hold any expression."""
    left, right, core = found.left.shape, found.right.shape, found.core.shape
    if (len(left), len(right), len(core)) != (4, 5, 2) or left[3] % right[2]:
        return False
    terms, r, s = found.inner
    width = core[1]
    return (
        stacked.shape == (1, terms, r, s, width)
        and left[:2] == (right[0], 1)
        and right[1] == 1
        and expr.shape == (found.outputs, width)
    )

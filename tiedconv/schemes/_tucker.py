"""Fitting the terms of weight generators: Tucker-2 decompositions of tensors.

A generator's weight is a tensor T of shape (groups, out, in, width). A *term* has the factors
B (groups, out, r), E (r, r, width) and A (groups, r, in), and stands for
`T[g, :, :, c] = B_g E[:, :, c] A_g`: for one group a Tucker-2 decomposition (De Lathauwer, De Moor
and Vandewalle, 2000), for several of them one core with factors of each group's own. Several terms
make a block-term decomposition.

Every step here solves a least-squares problem, so that no step raises the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiedconv.numerics.least_squares import conjugate_gradients
from tiedconv.numerics.linalg import energy

STEPS = 100  # turns over base and terms, at most
SWEEPS = 3  # over a new term, before all terms are improved by turns
GAIN = 1e-3  # a turn that gains less of the error is the last
EXACT = 2048  # unknowns of a system that is solved directly


@dataclass(frozen=True)
class Term:
    """Factors B (groups, out, r), E (r, r, width) and A (groups, r, in)."""

    b: Tensor
    e: Tensor
    a: Tensor

    @property
    def value(self) -> Tensor:
        """The tensor it stands for, (groups, out, in, width)."""
        left = torch.einsum("gor,rsc->gosc", self.b, self.e)
        return torch.einsum("gosc,gsi->goic", left, self.a)

    def flipped(self) -> Term:
        """The term of the tensor whose matrices are transposed."""
        return Term(self.a.mT, self.e.transpose(0, 1), self.b.mT)

    def balanced(self) -> Term:
        """The same with factors of one norm, so that training moves all of them alike."""
        norms = torch.stack([x.norm() for x in (self.b, self.e, self.a)])
        if not bool((norms > 0).all()):
            return self
        b, e, a = (norms.prod() ** (1 / 3) / norms).unbind()
        return Term(self.b * b, self.e * e, self.a * a)


def fit_stack(
    tensors: Sequence[Tensor], counts: Sequence[int], rank: int, *, steps: int = STEPS
) -> tuple[Tensor, list[list[Term]], list[float]]:
    """A base, and terms for each of a stack of generators: `T_i ~ base + sum_k term_ik`.

    The base begins as the mean and each term as the best that one more adds (deflation); then base
    and terms are improved by turns until a turn gains less than a thousandth of the error.

    Args:
        tensors: (groups, out, in, width) each.
        counts: of terms, one for each.
        rank: of the terms.
        steps: turns at most.

    Returns:
        the base, the terms, and the sum of squared errors after each turn, which never rises.
    """
    base = sum(tensors[1:], tensors[0]) / len(tensors)
    terms = [_deflated(t - base, count, rank) for t, count in zip(tensors, counts, strict=True)]
    errors = [sum(energy(_rest(t, base, mine)) for t, mine in zip(tensors, terms, strict=True))]
    least = 1e-14 * sum(map(energy, tensors))
    for _ in range(steps if any(counts) else 0):
        lefts = [_rest(t, base, mine) for t, mine in zip(tensors, terms, strict=True)]
        base = base + sum(lefts[1:], lefts[0]) / len(lefts)
        for i, t in enumerate(tensors):
            terms[i] = _improved(_rest(t, base, terms[i]), terms[i])
        errors.append(sum(energy(_rest(t, base, m)) for t, m in zip(tensors, terms, strict=True)))
        if errors[-2] - errors[-1] <= GAIN * errors[-2] or errors[-1] <= least:
            break
    return base, [[term.balanced() for term in mine] for mine in terms], errors


def _rest(tensor: Tensor, base: Tensor, terms: Sequence[Term]) -> Tensor:
    rest = tensor - base
    for term in terms:
        rest -= term.value
    return rest


def _deflated(rest: Tensor, count: int, rank: int) -> list[Term]:
    """Terms one after another, each fitted to what those before it leave."""
    terms: list[Term] = []
    for _ in range(count):
        term, left = start(rest, rank), energy(rest)
        for _ in range(SWEEPS):
            term = sweep(rest, term)
            before, left = left, energy(rest - term.value)
            if before - left <= GAIN * before:
                break
        rest = rest - term.value
        terms.append(term)
    return terms


def _improved(rest: Tensor, terms: Sequence[Term]) -> list[Term]:
    """The terms, each fitted again to what the others leave."""
    done: list[Term] = []
    for term in terms:
        target = rest + term.value
        done.append(sweep(target, term))
        rest = target - done[-1].value
    return done


def start(tensor: Tensor, rank: int) -> Term:
    """A first term: of several truncated decompositions (HOSVD), the one that leaves the least.

    With several groups, A or B is taken as common to all of them, or the cores of the groups' own
    decompositions are brought to one.
    """
    groups, out, inputs, _ = tensor.shape
    found = [_stacked(tensor, rank)]
    if groups > 1:
        found.append(_stacked(tensor.transpose(1, 2), rank).flipped())
        if rank <= min(out, inputs) and 2 * rank * rank <= EXACT:
            found.append(_matched(tensor, rank))
        found = [Term(t.b, _core(tensor, t), t.a) for t in found]
    return min(found, key=lambda term: energy(tensor - term.value))


def sweep(tensor: Tensor, term: Term) -> Term:
    """Each factor fitted again, the others held fixed; for one group two at a time (HOOI)."""
    if tensor.shape[0] == 1:
        rank = term.b.shape[2]
        a = _leading(torch.einsum("goic,gor->gric", tensor, term.b).transpose(1, 2), rank).mT
        b = _leading(torch.einsum("goic,gsi->gosc", tensor, a), rank)
        return Term(b, _projected(tensor, b, a), a)
    b = _side(tensor, torch.einsum("rsc,gsi->gric", term.e, term.a), term.b)
    over = torch.einsum("gor,rsc->gsoc", b, term.e)
    term = Term(b, term.e, _side(tensor.transpose(1, 2), over, term.a.mT).mT)
    return Term(b, _core(tensor, term), term.a)


def block_energies(tensor: Tensor, rank: int) -> Tensor:
    """The squared error that each further term removes at least, largest first, float64.

    The tensor in the bases of its own decomposition (HOSVD, one A for all groups) falls into blocks
    of `rank` by `rank`: each is a term, all of them together are the tensor.
    """
    groups, out, inputs, width = tensor.shape
    flat = tensor.reshape(1, groups * out, inputs, width)
    b = _leading(flat, groups * out)[0]
    a = _leading(flat.transpose(1, 2), inputs)[0]
    core = torch.einsum("oic,or,is->rsc", flat[0], b, a).double().square().sum(2)
    core = torch.nn.functional.pad(core, (0, -inputs % rank, 0, -len(core) % rank))
    blocks = core.reshape(-1, rank, core.shape[1] // rank, rank).sum((1, 3))
    return torch.sort(blocks.flatten(), descending=True)[0]


def _stacked(tensor: Tensor, rank: int) -> Term:
    """The truncated HOSVD with one A for all groups, and B for each."""
    groups, out, inputs, width = tensor.shape
    flat = tensor.reshape(1, groups * out, inputs, width)
    b = _leading(flat, rank)
    a = _leading(flat.transpose(1, 2), rank).mT
    core = _projected(flat, b, a)
    return Term(b.reshape(groups, out, -1), core, a.expand(groups, -1, -1))


def _matched(tensor: Tensor, rank: int) -> Term:
    """The HOSVD of each group, all brought to the core of the first: exact where there is one.

    If `C_g = P C_1 Q` then `X C_g = C_1 Q` with X the inverse of P: a homogeneous linear system in
    X and Q, solved in the sense of least squares.
    """
    b, a = _leading(tensor, rank), _leading(tensor.transpose(1, 2), rank).mT
    cores = torch.einsum("goic,gor,gsi->grsc", tensor, b, a).double()
    first, eye = cores[0], torch.eye(rank, dtype=torch.float64)
    lefts, rights = [b[0]], [a[0]]
    for core, b_g, a_g in zip(cores[1:], b[1:], a[1:], strict=True):
        over = torch.kron(eye, torch.einsum("qsc,tsc->qt", core, core))
        under = torch.kron(torch.einsum("pqc,ptc->qt", first, first), eye)
        cross = -torch.einsum("qsc,ptc->pqts", core, first).reshape(rank**2, rank**2)
        system = torch.cat([torch.cat([over, cross], 1), torch.cat([cross.t(), under], 1)])
        x, q = torch.linalg.eigh(system)[1][:, 0].reshape(2, rank, rank)
        lefts.append(b_g @ torch.linalg.pinv(x, rtol=1e-6).to(b.dtype))
        rights.append(q.to(a.dtype) @ a_g)
    return Term(torch.stack(lefts), first.to(b.dtype), torch.stack(rights))


def _side(tensor: Tensor, rest: Tensor, old: Tensor) -> Tensor:
    """The factor (groups, m, r) that brings `factor rest` nearest to the tensor.

    Args:
        tensor: (groups, m, n, width).
        rest: (groups, r, n, width).
        old: the factor now.
    """
    made = []
    for m, x, now in zip(tensor.flatten(2), rest.flatten(2), old, strict=True):
        wide, right = x.double(), (x @ (m - now @ x).t()).double()
        made.append(now + _solved(wide @ wide.t(), right).t().to(now.dtype))
    return torch.stack(made)


def _core(tensor: Tensor, term: Term) -> Tensor:
    """The E that is best for the other two factors."""
    r, target = term.b.shape[2], _projected(tensor, term.b, term.a).double()
    left = (term.b.mT.double() @ term.b.double()).contiguous()
    right = (term.a.double() @ term.a.mT.double()).contiguous()

    def gradient(e: Tensor) -> Tensor:
        return torch.einsum("gpr,rsc,gsq->pqc", left, e, right) - target

    e = term.e.double()
    if r * r > EXACT:
        return conjugate_gradients(gradient, e, lambda x: x, 20).to(tensor.dtype)
    system = torch.einsum("gpr,gqs->pqrs", left, right).reshape(r * r, r * r)
    return (e + _solved(system, -gradient(e).flatten(0, 1)).reshape(e.shape)).to(tensor.dtype)


def _projected(tensor: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """`sum_g B_g^T T_g A_g^T`, (r, s, width)."""
    return torch.einsum("gric,gsi->rsc", torch.einsum("goic,gor->gric", tensor, b), a)


def _solved(system: Tensor, right: Tensor) -> Tensor:
    """The solution of a positive semidefinite system, float64, regularised where it is singular."""
    least = 1e-11 * float(system.diagonal().max().clamp(min=1e-200))
    factor = torch.linalg.cholesky(system + least * torch.eye(len(system), dtype=system.dtype))
    return torch.cholesky_solve(right, factor)


def _leading(tensor: Tensor, rank: int) -> Tensor:
    """For each group of (groups, m, n, width), the leading vectors (m, rank) of its rows.

    Where there are fewer, columns of zeros follow.
    """
    flat = tensor.flatten(2).double()
    vectors = torch.linalg.eigh(flat @ flat.mT)[1].flip(2)[:, :, :rank]
    padded = torch.nn.functional.pad(vectors, (0, rank - vectors.shape[2]))
    return padded.to(tensor.dtype)

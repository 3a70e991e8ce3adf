"""Linear algebra for fits. All of it is deterministic.

Matrices are `(out, in)`, any floating dtype; sums run in float64 where precision is at stake.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Up to this size an exact decomposition of the Gram matrix takes seconds; beyond it a seeded
# subspace iteration is used instead.
EXACT_UP_TO = 2560
POWER_STEPS = 6


def spectrum(matrix: Tensor) -> Tensor:
    """All singular values of a matrix, largest first, float64."""
    gram, _ = _gram(matrix)
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(0).clamp(min=0).sqrt()


def truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a given rank (Eckart and Young).

    Args:
        matrix: `(out, in)`.
        rank: at most `min(out, in)`.

    Returns:
        B `(out, rank)` and A `(rank, in)` whose product it is, with the singular values shared
        evenly between them. Directions with no weight get a zero in B and a small row in A, as
        in LORS' initialisation, so that training can use them.
    """
    out, inputs = matrix.shape
    if rank < 1:
        return matrix.new_zeros(out, 0), matrix.new_zeros(0, inputs)
    small = min(out, inputs)
    if small <= EXACT_UP_TO:
        gram, tall = _gram(matrix)
        _, vectors = torch.linalg.eigh(gram)
        basis = vectors.flip(1)[:, :rank].to(matrix.dtype)
    else:
        generator = torch.Generator().manual_seed(0)
        tall = out >= inputs
        start = torch.randn(small, rank, generator=generator, dtype=matrix.dtype)
        basis = _iterate(matrix if tall else matrix.t(), start, POWER_STEPS)
    return _factors(matrix, basis) if tall else _transposed(_factors(matrix.t(), basis))


def refine(matrix: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of a slightly changed matrix, from the A of the old one, by one power step."""
    return _factors(matrix, _iterate(matrix, a.t(), 1)) if a.shape[0] else (matrix[:, :0], a)


def _gram(matrix: Tensor) -> tuple[Tensor, bool]:
    """The smaller of `M^T M` and `M M^T` in float64, and whether it is the first."""
    double = matrix.double()
    tall = matrix.shape[0] >= matrix.shape[1]
    return (double.t() @ double if tall else double @ double.t()), tall


def _iterate(matrix: Tensor, basis: Tensor, steps: int) -> Tensor:
    """Orthonormal basis of the leading right singular subspace, `(in, rank)`."""
    for _ in range(steps):
        basis = torch.linalg.qr(matrix.t() @ (matrix @ basis))[0]
    return basis


def _factors(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """B and A with `B A = M V V^T` for an orthonormal basis V of shape `(in, rank)`."""
    image = matrix @ basis
    size = torch.linalg.vector_norm(image, dim=0)
    largest = size.max()
    floor = 1e-2 * largest if largest > 0 else largest.new_tensor(matrix.shape[1] ** -0.5)
    scale = size.clamp(min=float(floor)).sqrt()
    return (image / scale).contiguous(), (basis * scale).t().contiguous()


def _transposed(factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    b, a = factors
    return a.t().contiguous(), b.t().contiguous()


def base_and_residuals(
    matrices: Sequence[Tensor], ranks: Sequence[int], *, steps: int = 8
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """One base and a low-rank residual for each matrix (LORS, static).

    Minimises `sum_i ||W_i - base - B_i A_i||^2` by turns: residuals are the truncated SVD of
    `W_i - base`, the base is the mean of `W_i - B_i A_i`. Each half-step is
    optimal, so the error never grows.

    Args:
        matrices: all of one shape `(out, in)`.
        ranks: one for each.
        steps: turns at most; it stops when the base moves by less than 1 part in 1,000.

    Returns:
        base `(out, in)` and the pairs (B, A).
    """
    base = _mean(iter(matrices), len(matrices))
    factors = [truncate(w - base, r) for w, r in zip(matrices, ranks, strict=True)]
    for _ in range(steps if any(ranks) else 0):
        left = (torch.addmm(w, b, a, alpha=-1) for w, (b, a) in zip(matrices, factors, strict=True))
        moved = _mean(left, len(matrices))
        change = torch.linalg.vector_norm(moved - base)
        base = moved
        for i, w in enumerate(matrices):  # in place: two lists of them would be twice the memory
            factors[i] = refine(w - base, factors[i][1])
        if change <= 1e-3 * torch.linalg.vector_norm(base):
            break
    return base, factors


def bases_and_residuals(
    matrices: Sequence[Tensor], ranks: Sequence[int], count: int, *, steps: int = 4
) -> tuple[list[Tensor], Tensor, list[tuple[Tensor, Tensor]]]:
    """Several bases that each matrix mixes, and a low-rank residual for each.

    Minimises `sum_i ||W_i - sum_k c_ik base_k - B_i A_i||^2` by turns. Bases are the leading
    principal directions of the matrices taken as vectors, which is optimal for given residuals.

    Args:
        matrices: all of one shape `(out, in)`.
        ranks: one for each.
        count: of bases, fewer than there are matrices.
        steps: turns.

    Returns:
        bases `(out, in)` each, c `(matrices, count)` and the pairs (B, A).
    """

    def bases_of(rest: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        double = [r.double() for r in rest]
        gram = torch.tensor([[float((a * b).sum()) for b in double] for a in double])
        _, vectors = torch.linalg.eigh(gram.double())
        mix = vectors.flip(1)[:, :count].to(rest[0].dtype)
        bases = [sum(c * r for c, r in zip(mix[:, k], rest, strict=True)) for k in range(count)]
        return bases, mix

    def residuals_of(bases: Sequence[Tensor], mix: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [
            truncate(w - sum(c * b for c, b in zip(row, bases, strict=True)), r)
            for w, row, r in zip(matrices, mix, ranks, strict=True)
        ]

    bases, mix = bases_of(matrices)
    pairs = residuals_of(bases, mix)
    for _ in range(steps if any(ranks) else 0):
        bases, mix = bases_of([w - b @ a for w, (b, a) in zip(matrices, pairs, strict=True)])
        pairs = residuals_of(bases, mix)
    return bases, mix, pairs


def _mean(matrices: Iterator[Tensor], count: int) -> Tensor:
    """The mean of matrices that come one by one: a stack of them would double the memory."""
    total = next(matrices).clone()
    for matrix in matrices:
        total += matrix
    return total / count


def energy(matrix: Tensor) -> float:
    """The sum of squares."""
    return float(torch.linalg.vector_norm(matrix)) ** 2


def shared_with_scales(
    matrices: Sequence[Tensor],
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """One W and, for each matrix, row and column scales (signs too): `M_j ~ diag(s) W diag(t)`.

    The scales are those that give the first matrix the signs and norms of the others; W then
    minimises the sum of relative squared errors, a weighted mean in closed form. (Alternating
    between both lowers the error by a hundredth and does not change the accuracy.) The first matrix
    keeps scales of one; one with fewer columns is compared with the first columns of W.

    Returns:
        W `(rows, most columns)` and pairs of s `(rows, 1)` and t `(1, columns_j)`.
    """
    widest = max(matrices, key=lambda m: m.shape[1])
    first = matrices[0] if matrices[0].shape == widest.shape else widest
    weights = [1.0 / max(energy(m), 1e-30) for m in matrices]
    rows, columns = matrices[0].shape
    ones = (first.new_ones(rows, 1), first.new_ones(1, columns))
    scales = [ones] + [_scales_between(first[:, : m.shape[1]], m) for m in matrices[1:]]
    return weighted_base(matrices, scales, weights), scales


def _scales_between(w: Tensor, m: Tensor, *, steps: int = 5) -> tuple[Tensor, Tensor]:
    """The s `(rows, 1)` and t `(1, columns)` with which `s w t` is close to m.

    Signs: where `m = s w t`, the product `m * w` is `s (w * w) t`; by Perron and Frobenius, its
    leading singular vectors have the signs of s and t. Magnitudes: those that give `s w t` the row
    and column norms of m (Sinkhorn's iteration on the squares). A least-squares fit would shrink
    them where w and m have little in common, as two trained matrices have.
    """
    similarity, source, target = m * w, w.square(), m.square()
    t = similarity[similarity.square().sum(1).argmax()].unsqueeze(0)
    for _ in range(steps):
        t = (similarity @ t.t()).t() @ similarity
        t = t / t.abs().max().clamp(min=1e-30)
    sign_t = torch.where(t < 0, -1.0, 1.0).to(w.dtype)
    sign_s = torch.where(similarity @ sign_t.t() < 0, -1.0, 1.0).to(w.dtype)
    s2, t2 = w.new_ones(w.shape[0], 1), w.new_ones(1, w.shape[1])
    rows, columns = target.sum(1, keepdim=True), target.sum(0, keepdim=True)
    for _ in range(100):  # a handful for large matrices; small ones may take longer to settle
        before, s2 = s2, _quotient(rows, source @ t2.t())
        t2 = _quotient(columns, s2.t() @ source)
        if float((s2 - before).abs().max()) <= 1e-3 * float(s2.abs().max()):
            break
    return sign_s * s2.sqrt(), sign_t * t2.sqrt()


def _quotient(over: Tensor, under: Tensor) -> Tensor:
    """`over / under`; one for a dead unit (0 / 0)."""
    dead = under <= 1e-12 * under.max()
    return torch.where(dead, torch.ones_like(over), over / under.clamp(min=1e-30))


def weighted_base(
    matrices: Sequence[Tensor],
    scales: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[float],
) -> Tensor:
    """The W that minimises `sum_j weight_j ||M_j - s_j W t_j||^2`, entry by entry."""
    rows, columns = matrices[0].shape[0], max(m.shape[1] for m in matrices)
    over, under = matrices[0].new_zeros(rows, columns), matrices[0].new_zeros(rows, columns)
    for m, (s, t), weight in zip(matrices, scales, weights, strict=True):
        over[:, : m.shape[1]].addcmul_(m * (s * weight), t)
        under[:, : m.shape[1]].addmm_(s.square(), t.square(), alpha=weight)
    return over.div_(under.clamp_(min=1e-30))


def procrustes(cross: Tensor) -> Tensor:
    """The orthogonal G that maximises `trace(G cross)`; batches along the first dimension."""
    u, _, vh = torch.linalg.svd(cross.double())
    nearest: Tensor = u @ vh
    return nearest.mT


def linear_assignment(similarity: Tensor) -> Tensor:
    """The assignment of columns to rows with the largest total similarity.

    Returns:
        `order` such that column `order[i]` goes with row i (int64).
    """
    from scipy.optimize import linear_sum_assignment  # half a second that few commands need

    # Negated and widened in one copy: scipy would make one for each.
    _, order = linear_sum_assignment(similarity.to(torch.float64, copy=True).neg_().numpy())
    return torch.from_numpy(order)


def cholesky(moment: Tensor) -> Tensor:
    """The lower triangular L with `L L^T` a second moment, `(n, n)`, in float64.

    A moment may be singular, such as of images with a constant channel, and rounding may make it
    indefinite: then as little as needed of its mean is added to the diagonal.

    Raises:
        torch.linalg.LinAlgError: it is far from positive semidefinite, or not finite.
    """
    matrix = moment.double()
    mean = matrix.diagonal().mean().clamp(min=torch.finfo(matrix.dtype).tiny)
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    root: Tensor
    for share in (0.0, *(10.0**power for power in range(-14, -2))):
        root, failed = torch.linalg.cholesky_ex(matrix + (share * mean) * eye if share else matrix)
        if not failed:
            return root
    root = torch.linalg.cholesky(matrix)  # raises
    return root

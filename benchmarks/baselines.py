"""Other ways to make a pretrained model small, for the accuracy benchmark.

Reimplemented from the papers; each falls short of its paper where its docstring says so. All of
them meet the budget in parameters of the whole model, and get the training that ours get.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from finetuning import Teacher, blocks_of, stored_parameters
from models import SIZES, Pixels, ResNet32px, normalised, vit
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from tiedconv.errors import BudgetError


def _narrow_vit(
    depth: int, head: int, ratio: float = 4
) -> tuple[Callable[[int, int], nn.Module], range]:
    """A builder, heads being about as wide as in the model, and the widths to try."""
    return (lambda w, c: vit(w, depth, max(1, round(w / head)), c, ratio)), range(400, 8, -1)


# Builders by width and number of classes, and widths to try, the greatest first. The width of a
# ResNet is what every width of ResNet50 is divided by.
WIDTHS: dict[str, tuple[Callable[[Any, int], nn.Module], Iterable[Any]]] = {
    "vit-real": _narrow_vit(4, 32, 2),
    "vit-d128": _narrow_vit(6, 32),
    "vit-s4": _narrow_vit(12, 64),
    "resnet-narrow": (
        lambda d, c: ResNet32px([2, 3, 4, 2], d, c),
        [Fraction(512, w) for w in range(127, 15, -1)],
    ),
    "resnet50": (
        lambda d, c: ResNet32px([3, 4, 6, 3], d, c),
        [Fraction(512, w) for w in range(508, 15, -4)],
    ),
}


@dataclass(frozen=True)
class Context:
    """What a method may use.

    Args:
        name: of the model.
        dense: the model itself, to be copied.
        teacher: the same, to learn from.
        pixels: `train` and `val`; the test images are none of a method's business.
        calib: training images, not augmented.
    """

    name: str
    dense: nn.Module
    teacher: Teacher
    pixels: dict[str, Pixels]
    calib: Pixels

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.pixels["train"].labels.max()) + 1

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.dense.parameters()).device

    def limit(self, budget: float) -> int:
        """A budget in percent, as a number of parameters."""
        return int(stored_parameters(self.dense) * budget / 100)

    def random(self, width: Any, seed: int) -> nn.Module:
        """A model of this class with random weights; of its own width if that is None."""
        torch.manual_seed(seed)
        if width is not None:
            return self._like_dense(WIDTHS[self.name][0](width, self.classes))
        if self.name == "vit-real":
            return WIDTHS["vit-real"][0](128, self.classes).to(self.device)
        return SIZES[self.name](self.classes).to(self.device)

    def _like_dense(self, model: nn.Module) -> nn.Module:
        if isinstance(self.dense, ResNet32px):  # the pooling depends on the width; keep it as it is
            model.maxpool = copy.deepcopy(self.dense.maxpool)
        return model.to(self.device)


# --- factorising each layer ------------------------------------------------------------------


def svd(ctx: Context, budget: float) -> nn.Module:
    """Truncated SVD of each layer, all at one ratio of parameters.

    Linear layers become two; a k x k convolution becomes a k x k one to `rank` channels and a
    1 x 1 one. The first convolution and the classifier are kept; so is a layer that two factors
    would not make smaller. A fused qkv is one matrix.
    """
    model = copy.deepcopy(ctx.dense)
    for name, rank in _ranks(model, ctx.limit(budget)).items():
        layer = model.get_submodule(name)
        u, s, vh = torch.linalg.svd(layer.weight.detach().flatten(1).double(), full_matrices=False)
        root = s[:rank].sqrt()
        _factorise(model, name, u[:, :rank] * root, root[:, None] * vh[:rank])
    return model


def whitened_svd(ctx: Context, budget: float) -> nn.Module:
    """Truncated SVD of each layer after whitening its inputs (SVD-LLM, arXiv 2403.07378).

    With `L L^T` the second moment of a layer's inputs, the SVD of `W L` is cut, which is the best
    for the outputs. Inputs come from the network as compressed so far, layer after layer. Layers
    and ratio as in `svd`. The paper's update of the factors by low-rank training is left out, as
    the training that all methods get follows; q, k and v are one matrix where they are fused.
    """
    model = copy.deepcopy(ctx.dense).eval()
    for name, rank in _ranks(model, ctx.limit(budget)).items():
        layer = model.get_submodule(name)
        moment = _second_moment(model, layer, ctx.calib)
        lower = _cholesky(moment)
        w = layer.weight.detach().flatten(1).double()
        u, s, vh = torch.linalg.svd(w @ lower, full_matrices=False)
        root = s[:rank].sqrt()
        a = torch.linalg.solve_triangular(lower, root[:, None] * vh[:rank], upper=False, left=False)
        _factorise(model, name, u[:, :rank] * root, a)
    return model


def _cholesky(moment: Tensor) -> Tensor:
    """The lower factor, with as little added to the diagonal as makes it exist."""
    scale = moment.diagonal().mean().clamp(min=1e-12)
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    for power in range(-6, 1):
        lower, failed = torch.linalg.cholesky_ex(moment + 10.0**power * scale * eye)
        if not failed:
            return lower
    raise ArithmeticError("the second moment of a layer's inputs is not finite")


def _ranks(model: nn.Module, limit: int) -> dict[str, int]:
    """A rank for each layer to factorise, in the order of the network, at one ratio for all."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    shapes = {n: tuple(m.weight.flatten(1).shape) for n, m in layers[1:-1]}

    def at(ratio: float) -> dict[str, int]:
        ranks = {n: max(1, int(ratio * o * i / (o + i))) for n, (o, i) in shapes.items()}
        return {n: r for n, r in ranks.items() if r * sum(shapes[n]) < math.prod(shapes[n])}

    def size(ratio: float) -> int:
        saved = sum(math.prod(shapes[n]) - r * sum(shapes[n]) for n, r in at(ratio).items())
        return stored_parameters(model) - saved

    return at(_bisect(size, limit))


def _bisect(size: Callable[[float], int], limit: int, steps: int = 24) -> float:
    """The greatest number of 0 to 1 whose `size` is within the limit."""
    if (least := size(0.0)) > limit:
        raise BudgetError(f"{limit:,} parameters can't be met: the least is {least:,}")
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) <= limit else (low, middle)
    return low


def _factorise(model: nn.Module, name: str, b: Tensor, a: Tensor) -> None:
    """Put two layers, A and then B, where one was."""
    layer = model.get_submodule(name)
    rank, bias = len(a), layer.bias is not None
    if isinstance(layer, nn.Conv2d):
        how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        first = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, bias=False, **how)
        second: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=bias)
    else:
        first = nn.Linear(layer.in_features, rank, bias=False)
        second = nn.Linear(rank, layer.out_features, bias=bias)
    pair = nn.Sequential(first, second).to(layer.weight.device)
    with torch.no_grad():
        first.weight.copy_(a.reshape(first.weight.shape))
        second.weight.copy_(b.reshape(second.weight.shape))
        if bias:
            second.bias.copy_(layer.bias)
    model.set_submodule(name, pair)


class _Reached(Exception):
    """The layer was reached; the rest of the network need not be run."""


@torch.no_grad()
def _second_moment(model: nn.Module, layer: nn.Module, calib: Pixels, batch: int = 64) -> Tensor:
    """Mean of `x x^T` over a layer's inputs (of a convolution: over its patches), float64."""
    sides = layer.weight[0].numel()
    total = torch.zeros(sides, sides, dtype=torch.float64, device=layer.weight.device)
    count = 0

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal count
        x = inputs[0]
        if isinstance(layer, nn.Conv2d):
            unfolded = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            x = unfolded.transpose(1, 2)
        x = x.reshape(-1, sides)
        total.add_((x.T @ x).double())
        count += len(x)
        raise _Reached

    hook = layer.register_forward_pre_hook(note)
    for start in range(0, len(calib), batch):
        try:
            model(normalised(calib.images[start : start + batch]))
        except _Reached:
            continue
    hook.remove()
    return total / count


# --- removing channels -----------------------------------------------------------------------


def torch_pruning(ctx: Context, budget: float, variant: str) -> nn.Module:
    """Structured pruning by the package torch-pruning (DepGraph, arXiv 2301.12900).

    Groups of coupled channels, the residual stream's too, are ranked by the first-order Taylor
    importance of gradients over the calibration images, and removed in one step. `uniform` takes
    the same share of each layer, `isomorphic` ranks layers of one shape together (Isomorphic
    Pruning, arXiv 2407.04616). In a ViT every head keeps its place and loses dimensions. Without
    the sparse training and the iterations of pruning and training of the paper's best results.
    """
    images = normalised(ctx.calib.images)
    grads = gradients(ctx.dense, images, ctx.calib.labels)

    def pruned(share: float) -> nn.Module:
        return pruned_to(ctx.dense, grads, images[:2], max(share, 0.02), variant)

    def size(share: float) -> int:
        return stored_parameters(pruned(share))

    return pruned(_bisect(size, ctx.limit(budget), steps=10))


Gradients = list[Tensor | None]


def gradients(
    model: nn.Module, images: Tensor, labels: Tensor, batch: int = 256
) -> Gradients:  # fmt: skip
    """Those of the cross-entropy, summed over batches, for each parameter."""
    model.eval().zero_grad(set_to_none=True)
    for start in range(0, len(images), batch):
        some = slice(start, start + batch)
        F.cross_entropy(model(images[some]), labels[some]).backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def pruned_to(
    dense: nn.Module, grads: Gradients, example: Tensor, share: float, variant: str
) -> nn.Module:
    """A copy with a share of the channels of each layer (`uniform`), or of all (`isomorphic`)."""
    model = copy.deepcopy(dense)
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = None if grad is None else grad.clone()
    _prune(model, 1.0 - share, variant, torch.zeros_like(example))
    model.zero_grad(set_to_none=True)
    return model


def _prune(model: nn.Module, ratio: float, variant: str, example: Tensor) -> None:
    import torch_pruning as tp

    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    fused = [m.fused_attn for m in attentions]
    for m in attentions:
        m.fused_attn = False  # the package follows plain operations
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unwrapped parameters")  # their last dimension: right
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=tp.importance.GroupTaylorImportance(),
            global_pruning=variant == "isomorphic",
            isomorphic=variant == "isomorphic",
            pruning_ratio=ratio,
            max_pruning_ratio=max(ratio, min(0.95, ratio + 0.2)),
            ignored_layers=[head],
            num_heads={m.qkv: m.num_heads for m in attentions},
            in_channel_groups={},
            out_channel_groups={},
        )
        pruner.step()
    for m, was in zip(attentions, fused, strict=True):
        dims = m.qkv.out_features // 3 // m.num_heads
        with torch.no_grad():  # the scale by head_dim ** -0.5 stays what it was
            rows = m.qkv.out_features // 3
            m.qkv.weight[:rows] *= math.sqrt(dims / m.head_dim)
            if m.qkv.bias is not None:
                m.qkv.bias[:rows] *= math.sqrt(dims / m.head_dim)
        m.head_dim, m.attn_dim, m.scale = dims, dims * m.num_heads, dims**-0.5
        m.fused_attn = was


# --- sharing blocks --------------------------------------------------------------------------


class MixedAttention(Attention):
    """timm's attention with the heads mixed before and after the softmax, by identity at first."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("gh,bhnm->bgnm", self.mix_before, q * self.scale @ k.mT)
        shares = torch.einsum("gh,bhnm->bgnm", self.mix_after, scores.softmax(-1))
        mixed: Tensor = self.proj((shares @ v).transpose(1, 2).reshape(b, n, self.attn_dim))
        return mixed


def minivit(ctx: Context, budget: float, variant: str) -> nn.Module:
    """Adjacent blocks share their matrices (MiniViT, arXiv 2204.07154).

    Norms and biases stay private, and each block mixes its attention heads before and after the
    softmax by matrices of its own. The shared weights start as the `mean` of the blocks or as the
    `first` of them. The training learns from the teacher's logits and from the relations of the
    tokens after each block. Left out: the depthwise convolutions of the shared MLPs, and the
    distillation of q, k and v. In a ResNet the blocks of a stage but its first share convolutions.
    As many blocks share as the budget asks; a twentieth above it is let pass, for the pairs.
    """
    longest = max(map(len, blocks_of(ctx.dense)))
    for together in range(2, longest + 1):
        model = _share(copy.deepcopy(ctx.dense), together, variant)
        if stored_parameters(model) <= 1.05 * ctx.limit(budget):
            return model
    raise BudgetError(
        f"{ctx.limit(budget):,} parameters can't be met: the least is {stored_parameters(model):,}"
    )


def _share(model: nn.Module, together: int, variant: str) -> nn.Module:
    for stack in blocks_of(model):
        blocks = stack if hasattr(model, "blocks") else stack[1:]
        for start in range(0, len(blocks), together):
            _share_group(blocks[start : start + together], variant)
    for m in list(model.modules()):
        if type(m) is Attention:
            m.__class__ = MixedAttention
            eye = torch.eye(m.num_heads, device=m.qkv.weight.device)
            m.mix_before, m.mix_after = nn.Parameter(eye.clone()), nn.Parameter(eye.clone())
    return model


def _share_group(blocks: list[nn.Module], variant: str) -> None:
    names = [n for n, p in blocks[0].named_parameters() if p.ndim > 1]
    for name in names:
        path, _, attribute = name.rpartition(".")
        owners = [block.get_submodule(path) for block in blocks]
        weights = torch.stack([getattr(owner, attribute).detach() for owner in owners])
        shared = nn.Parameter(weights.mean(0) if variant == "mean" else weights[0].clone())
        for owner in owners:
            setattr(owner, attribute, shared)


# --- a smaller model -------------------------------------------------------------------------


def half_width(ctx: Context, budget: float, seed: int) -> nn.Module:
    """A model of the same class and depth, narrower, with random weights: to train from scratch.

    It sees the images that the others see in fine-tuning and learns from the same teacher, so it
    says what the pretrained weights are worth, not how good a long training would make it.
    """
    for width in WIDTHS[ctx.name][1]:
        with contextlib.suppress(AssertionError):  # timm's, of widths that the heads don't divide
            with torch.device("meta"):
                size = stored_parameters(WIDTHS[ctx.name][0](width, ctx.classes))
            if size <= ctx.limit(budget):
                return ctx.random(width, seed)
    raise BudgetError(f"no width of {ctx.name} has {ctx.limit(budget):,} parameters")

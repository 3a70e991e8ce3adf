"""The one training that every model of the accuracy benchmark gets, and how each is measured.

AdamW, warm-up over the first twentieth, cosine to zero, gradients clipped to norm 1, images
shifted and flipped; the loss is a teacher's soft targets plus a little cross-entropy.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from models import Pixels, batches, cropped, normalised
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

import tiedconv
from tiedconv.runtime.tie import is_tied

WEIGHT_DECAY, WARM_UP, CLIP = 0.05, 0.05, 1.0


class Teacher:
    """A model to learn from. Its answers are kept, as all runs of a seed see the same images.

    Args:
        model: left as it is, in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self._kept: dict[tuple[int, int, int], Tensor] = {}

    @torch.no_grad()
    def logits(
        self, images: Tensor, seed: int, batch: int, step: int, *, recompute: bool = False
    ) -> Tensor:
        """Scores `(n, classes)` for the images that `finetune` shows in this step."""
        key = seed, batch, step
        if recompute or key not in self._kept:
            with _autocast(images):
                self._kept[key] = self.model(images).float()
        return self._kept[key]


def finetune(
    model: nn.Module,
    teacher: Teacher,
    pixels: Pixels,
    steps: int,
    lr: float,
    seed: int,
    batch: int = 256,
    temperature: float = 2.0,
    distill: float = 0.9,
    hidden: float = 0.0,
) -> float:
    """Train a model in place.

    Args:
        model: on the device of `pixels`.
        teacher: of the same classes; of the same blocks if `hidden` is above 0.
        pixels: training images.
        steps: optimiser steps.
        lr: the peak of the learning rate.
        seed: of the order of the images and of their augmentation.
        batch: images a step.
        temperature: of the soft targets.
        distill: weight of the soft targets; the labels get the rest.
        hidden: weight of what the blocks' outputs have to learn from the teacher's; needs
            `distill`.

    Returns:
        The mean loss of the last ten steps.
    """
    optimizer = torch.optim.AdamW(_groups(model), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, steps))
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = []
    model.train()
    with _outputs(model, hidden) as own, _outputs(teacher.model, hidden) as aims:
        for step, index in enumerate(batches(len(pixels), batch, steps, seed)):
            some = pixels.take(index.to(pixels.labels.device))
            images = normalised(cropped(some.images, generator)).contiguous()
            own.clear()
            with _autocast(images):
                scores = model(images)
            loss = F.cross_entropy(scores.float(), some.labels) * (1 - distill)
            aims.clear()
            soft = (
                teacher.logits(images, seed, batch, step, recompute=hidden > 0) if distill else None
            )
            if soft is not None:
                loss = loss + distill * _soft_loss(scores.float(), soft, temperature)
            if hidden:
                loss = loss + hidden * _hidden_loss(own, aims)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    model.eval()
    return sum(losses[-10:]) / len(losses[-10:])


def _autocast(images: Tensor) -> torch.autocast:
    return torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda)


def _groups(model: nn.Module) -> list[dict[str, object]]:
    """Matrices decay; vectors do not, a row or column of scales among them."""
    matrices, vectors = [], []
    for p in model.parameters():
        if p.requires_grad:
            (matrices if p.numel() > max(p.shape, default=1) else vectors).append(p)
    return [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]


def _factor(step: int, steps: int) -> float:
    """What the learning rate is multiplied by."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))


def _soft_loss(scores: Tensor, aims: Tensor, temperature: float) -> Tensor:
    own, wanted = (F.log_softmax(x / temperature, 1) for x in (scores, aims))
    return F.kl_div(own, wanted, reduction="batchmean", log_target=True) * temperature**2


def blocks_of(model: nn.Module) -> list[list[nn.Module]]:
    """The stacks of a model: a ViT's blocks, or each stage of a ResNet."""
    if hasattr(model, "blocks"):
        return [list(model.blocks)]
    return [list(getattr(model, f"layer{i}")) for i in range(1, 5)]


@contextmanager
def _outputs(model: nn.Module, wanted: float) -> Iterator[list[Tensor]]:
    """A list that fills with the outputs of all blocks at each forward."""
    seen: list[Tensor] = []
    blocks = [block for stack in blocks_of(model) for block in stack] if wanted else []
    hooks = [b.register_forward_hook(lambda *call: seen.append(call[2].float())) for b in blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _hidden_loss(own: list[Tensor], aims: list[Tensor]) -> Tensor:
    """Mean over the blocks of how far their outputs are from the teacher's.

    Of tokens, the relations to each other count, as in MiniViT: the softmax of `H H^T / sqrt(d)`.
    Of feature maps, the relative squared error.
    """
    losses = []
    for h, aim in zip(own, aims, strict=True):
        if h.ndim == 3:
            relations = [x @ x.transpose(1, 2) / math.sqrt(x.shape[2]) for x in (h, aim)]
            logs = [F.log_softmax(r, 2).flatten(0, 1) for r in relations]
            losses.append(F.kl_div(*logs, reduction="batchmean", log_target=True))
        else:
            losses.append((h - aim).square().mean() / aim.square().mean().clamp(min=1e-8))
    return torch.stack(losses).mean()


@torch.no_grad()
def recalibrate(model: nn.Module, pixels: Pixels, count: int = 20, batch: int = 256) -> bool:
    """Re-estimate all batch norm statistics over training images; False if there are none."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return False
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a cumulative average
        norm.train()
    for index in batches(len(pixels), min(batch, len(pixels)), count, seed=0):
        model(normalised(pixels.images[index.to(pixels.images.device)]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
    return True


def stored_parameters(model: nn.Module) -> int:
    """Numbers that are trained, each counted once."""
    return sum(p.numel() for p in model.parameters())


def stored_bytes(model: nn.Module) -> int:
    """Size of the safetensors file that holds each number once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        if is_tied(model):
            tiedconv.save(model, path)
        else:
            once = {id(t): (n, t) for n, t in reversed(model.state_dict(keep_vars=True).items())}
            save_file({n: t.detach().cpu().contiguous() for n, t in once.values()}, path)
        return path.stat().st_size


@torch.no_grad()
def flops(model: nn.Module) -> int:
    """Of one image, with every weight at hand (a tied model's are computed once, not counted)."""
    model.eval()
    device = next(model.parameters()).device
    if is_tied(model):
        tiedconv.freeze(model)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 32, 32, device=device))
    finally:
        if is_tied(model):
            tiedconv.unfreeze(model)
    return int(counter.get_total_flops())

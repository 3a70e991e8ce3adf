"""Optimiser, weight decay and learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from tiedconv.errors import UserError
from tiedconv.runtime.soft_codes import LR_SCALES
from tiedconv.training.blocks import Blocks
from tiedconv.training.config import TrainConfig

UNDECAYED = (
    "pos_embed",
    "position_embedding",
    "positional_embedding",
    "relative_position_bias",
    "attention_bias",
    ".wpe.",
    "cls_token",
    "class_token",
    "dist_token",
    "distillation_token",
    "mask_token",
    "reg_token",
    "register_token",
    "/mix",
)
"""Parts of the names of what is not decayed whatever its shape: embeddings of positions and
tokens, over timm, torchvision and HF, and the coefficients that mix stored tensors."""

SCALE = "lr_scale"
"""Under this name an optimiser's group holds what its learning rate is multiplied by."""


@contextmanager
def trained_only(model: nn.Module, patterns: Sequence[str]) -> Iterator[None]:
    """A context in which only parameters of these names are trainable.

    Args:
        model: its parameters; those that were not trainable stay so.
        patterns: as a shell has them, such as `*decoder*`; empty for all.

    Raises:
        UserError: a pattern that matches no parameter.
    """
    frozen: list[nn.Parameter] = []
    named = dict(model.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise UserError(
                f"No parameter is called {pattern!r}; one is {next(iter(named))!r}",
                "Nothing would be trained for it",
                "Correct the pattern; stored tensors of converted weights begin with tied/",
                code="unknown-parameter",
            )
    try:
        for name, parameter in named.items():
            wanted = not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
            if parameter.requires_grad and not wanted:
                parameter.requires_grad_(False)
                frozen.append(parameter)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups of trainable parameters by weight decay and learning rate.

    Not decayed are norms, biases, LayerScale and all else that is a vector, also as a column or
    a row: the scales of a tied matrix are (rows, 1) and (1, columns). Nor are embeddings of
    positions and tokens. Each parameter comes once, however many modules use it.

    With `layer_decay` below 1 the rate falls by that factor for each block further from the
    output (Clark et al., ELECTRA, arXiv 2003.10555): the classifier has the whole rate, the last
    block `layer_decay` of it, and so on down to the embedding. A tensor that several layers share
    has the mean of their scales: its gradient is the sum of theirs, and if each layer moved a
    copy of its own at its own rate, the mean of the copies would move at about this rate.

    Args:
        model: its trainable parameters.
        weight_decay: of the groups that have any.
        layer_decay: from more than 0 to 1; 1 for one rate.

    A parameter may have a rate of its own besides (`runtime.soft_codes.LR_SCALES`).

    Returns:
        groups as torch's optimisers take them, with `lr_scale` beside `weight_decay`.

    Raises:
        UserError: nothing is trainable; or no blocks are found for a layer-wise decay.
    """
    scales = _scales(model, layer_decay) if layer_decay != 1 else {}
    own: Mapping[str, float] = getattr(model, LR_SCALES, {})
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.numel() == max(parameter.shape, default=1)
            spared = vector or name.endswith("bias") or any(part in name for part in UNDECAYED)
            # Decay would move integers towards zero, and steps with them.
            spared = spared or name in own
            scale = scales.get(id(parameter), 1.0) * own.get(name, 1.0)
            groups.setdefault((scale, spared), []).append(parameter)
    if not groups:
        raise UserError(
            "The model has no trainable parameter",
            hint="Set requires_grad on the parameters to train",
            code="nothing-trainable",
        )
    return [
        {"params": groups[key], "weight_decay": 0.0 if key[1] else weight_decay, SCALE: key[0]}
        for key in sorted(groups, key=lambda key: (-key[0], key[1]))
    ]


def _scales(model: nn.Module, layer_decay: float) -> dict[int, float]:
    """What the learning rate of each parameter, by identity, is multiplied by."""
    blocks = Blocks.of(model)
    if not blocks.names:
        raise UserError(
            f"The training option layer_decay is {layer_decay:g}, but the model has no numbered "
            "blocks",
            "Without blocks there is no order of layers",
            "Leave it at 1",
            code="no-numbered-blocks",
        )
    return {
        parameter: sum(layer_decay ** (blocks.top - depth) for depth in depths) / len(depths)
        for parameter, depths in blocks.depths.items()
    }


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that the configuration names, fused where torch can."""
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    fused = _can_fuse([p for group in groups for p in group["params"]])
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.peak_lr, momentum=0.9, nesterov=True, fused=fused)
    return torch.optim.AdamW(groups, lr=config.peak_lr, fused=fused)


def _can_fuse(parameters: list[nn.Parameter]) -> bool | None:
    """Whether one kernel can make the whole update; None leaves the way to torch."""
    devices = {p.device.type for p in parameters}
    plain = all(p.is_floating_point() and not p.is_sparse for p in parameters)
    return True if plain and devices in ({"cpu"}, {"cuda"}) else None


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the scaled learning rate of each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(SCALE, 1.0)


def learning_rate(step: int, steps: int, config: TrainConfig, lr: float | None = None) -> float:
    """The learning rate of `step`, counted from 0, out of `steps`.

    Rises linearly to `lr`, the peak, in the warm-up, whose last step has it; then falls along half
    a cosine to `min_lr * lr` in the last step.

    Args:
        step, steps: where the training is.
        config: the options.
        lr: the peak, where it was found; None for that of the options.
    """
    lr = config.peak_lr if lr is None else lr
    warmup = round(config.warmup * steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup - 1)
    low = lr * config.min_lr
    return low + (lr - low) * half_cosine(done)


def half_cosine(done: float) -> float:
    """Falls from 1 to 0 along half a cosine, as `done` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * done))

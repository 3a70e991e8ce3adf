"""Optimiser, weight decay and learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tiedconv.errors import UserError
from tiedconv.training.config import TrainConfig

UNDECAYED = (
    "pos_embed",
    "position_embedding",
    "positional_embedding",
    "relative_position_bias",
    "cls_token",
    "class_token",
    "dist_token",
    "distillation_token",
    "mask_token",
    "reg_token",
)
"""Parts of the names of embeddings that are not decayed, over timm, torchvision and HF."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of trainable parameters: those with weight decay and those without.

    Without are norms, biases and all else of one dimension, and embeddings of positions and
    tokens. Each parameter comes once, however many modules use it.

    Raises:
        UserError: nothing is trainable.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            small = parameter.ndim <= 1 or name.endswith("bias")
            embedding = any(part in name for part in UNDECAYED)
            (others if small or embedding else decayed).append(parameter)
    if not decayed and not others:
        raise UserError(
            "The model has no trainable parameter",
            remedy="Set requires_grad on the parameters to train",
        )
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that the configuration names."""
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.lr)


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of `step`, counted from 0, out of `steps`.

    Rises linearly to `lr` in the warm-up, whose last step has `lr`; then falls along half a
    cosine to `min_lr * lr` in the last step.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup - 1)
    low = config.lr * config.min_lr
    return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * done))

"""The loops that `training_speed.py` measures ours against.

`by_hand` is what one would write for one model on one device: no resuming, no skipped files, no
events. `by_timm` puts timm's own pieces together as its training script does for bfloat16.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tiedconv.data import ImageList, TensorList
from tiedconv.sources.torchvision_compat import import_torchvision
from tiedconv.training import TrainConfig

import_torchvision()  # before whoever imports it: a CUDA build beside a CPU torch needs help
import timm  # noqa: E402
import torchvision  # noqa: E402
from timm.data.loader import PrefetchLoader  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.utils import dispatch_clip_grad  # noqa: E402

VITS = {
    "vit": "vit_small_patch16_224",
    "vit_b": "vit_base_patch16_224",
    "vit_ti": "vit_tiny_patch16_224",
}


def make_model(name: str, size: int) -> nn.Module:
    """A model for images of this size, with random weights and 1,000 classes."""
    model: nn.Module = (
        torchvision.models.resnet50(weights=None)
        if name == "resnet50"
        else timm.create_model(VITS[name], img_size=size)
    )
    return model


def by_hand(
    model: nn.Module,
    data: ImageList | TensorList,
    config: TrainConfig,
    teacher: nn.Module | None,
    taken: Callable[[int], None],
) -> None:
    """A minimal loop on the CPU.

    Args:
        model: as it comes.
        data: gives batches as float32, augmented.
        config: learning rate, weight decay, clipping and distillation.
        teacher: in evaluation mode.
        taken: called with the number of steps after each; it ends the loop by raising.
    """
    layout = torch.contiguous_format
    if isinstance(model, torchvision.models.ResNet):
        layout = torch.channels_last
        for each in (model, teacher):
            if each is not None:
                each.to(memory_format=layout)  # type: ignore[call-overload]
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), config.peak_lr, weight_decay=config.weight_decay, fused=True
    )
    steps = config.steps or 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step, (images, labels) in enumerate(batches(data, config.batch_size), 1):
        images = images.contiguous(memory_format=layout)
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        if teacher is not None:
            with torch.no_grad():
                aim = teacher(images)
            t = config.temperature
            distilled = F.kl_div(
                F.log_softmax(logits / t, -1), F.log_softmax(aim / t, -1),
                reduction="batchmean", log_target=True,
            )  # fmt: skip
            loss = (1 - config.distill_weight) * loss + config.distill_weight * t * t * distilled
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        taken(step)


def batches(data: ImageList | TensorList, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented batches in random order, without end."""
    while True:
        if isinstance(data, ImageList):
            yield from DataLoader(data, size, shuffle=True, drop_last=True)  # type: ignore[misc]
            continue
        order = torch.randperm(len(data))
        for index in order[: len(order) // size * size].split(size):
            yield data.read_batch(index.tolist(), torch.randint(2**62, (size,)).tolist())


def by_timm(
    model: nn.Module, data: ImageList | TensorList, config: TrainConfig, device: torch.device
) -> list[tuple[int, float]]:
    """Training with timm's pieces: its prefetching loader, optimiser and clipping.

    Args:
        model: as it comes.
        data: images in memory, uint8; each batch is drawn from them.
        config: steps, batch size, learning rate, weight decay, clipping, number format.
        device: where to train.

    Returns:
        (steps taken, time) now and then, with nothing left to do on the device.
    """
    assert isinstance(data, TensorList)
    cuda = device.type == "cuda"
    convolutional = isinstance(model, torchvision.models.ResNet)
    layout = torch.channels_last if convolutional else torch.contiguous_format
    model.to(device, memory_format=layout)  # type: ignore[call-overload]
    model.train()
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=config.peak_lr, weight_decay=config.weight_decay
    )
    run = torch.compile(model) if config.compile else model
    loss_of = nn.CrossEntropyLoss().to(device)
    mean, std = data.normalisation.mean, data.normalisation.std
    loader = PrefetchLoader(_Bytes(data, config, cuda), mean=mean, std=std, device=device)
    autocast = (
        torch.autocast(device.type, torch.bfloat16) if config.amp == "bf16" else nullcontext()
    )
    times: list[tuple[int, float]] = []
    for step, (images, labels) in enumerate(loader, 1):
        images = images.contiguous(memory_format=layout)
        with autocast:
            loss = loss_of(run(images), labels)
        loss.backward()
        dispatch_clip_grad(model.parameters(), value=config.clip, mode="norm")
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step in (config.steps, (config.steps or 0) // 2):
            loss.item()
            times.append((step, time.perf_counter()))
    return times


class _Bytes:
    """Batches of bytes, as a loader gives them."""

    def __init__(self, data: TensorList, config: TrainConfig, pin: bool) -> None:
        self.data, self.config, self.pin = data, config, pin

    def __len__(self) -> int:
        return self.config.steps or 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(len(self)):
            index = torch.randint(len(self.data), (self.config.batch_size,))
            images, labels = self.data.images[index], self.data.labels[index]
            yield (images.pin_memory(), labels.pin_memory()) if self.pin else (images, labels)

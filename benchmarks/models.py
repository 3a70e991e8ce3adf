"""The self-trained models of the accuracy benchmark: builders, and images in memory.

A ResNet that is torchvision's own with a stem for 32 px and every width divided, and timm's
VisionTransformer with a patch of 4. `SIZES` names them; `train_models.py` trains them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.sources.torchvision_compat import import_torchvision

import_torchvision()  # before whoever imports it: a CUDA build beside a CPU torch needs help
import timm  # noqa: E402
from torchvision.models.resnet import Bottleneck, ResNet  # noqa: E402

from tiedconv.data import (  # noqa: E402
    ImageList,
    Images,
    TensorList,
    open_images,
    open_split,
)

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class ResNet32px(ResNet):
    """torchvision's bottleneck ResNet for 32 px: a 3x3 stem without pooling, narrower stages.

    Args:
        layers: blocks of each stage.
        divide: what every width of ResNet50 is divided by.
        classes: number of classes.
    """

    def __init__(self, layers: list[int], divide: int, classes: int) -> None:
        self.divide = divide
        super().__init__(Bottleneck, layers, classes)
        stem = 64 // divide * 4 if divide > 1 else 64
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.maxpool = nn.Identity() if divide == 1 else nn.MaxPool2d(2)
        self.fc = nn.Linear(512 // divide * 4, classes)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        if planes == 64 and self.divide > 1:
            self.inplanes = 64 // self.divide * 4
        return super()._make_layer(block, planes // self.divide, *args, **kwargs)


def vit(width: int, depth: int, heads: int, classes: int, mlp_ratio: float = 4) -> nn.Module:
    """timm's VisionTransformer for 32 px with a patch of 4."""
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=width, depth=depth,
        num_heads=heads, mlp_ratio=mlp_ratio, num_classes=classes,
    )  # fmt: skip
    return model


SIZES = {
    "resnet50": lambda classes: ResNet32px([3, 4, 6, 3], 1, classes),
    "resnet-narrow": lambda classes: ResNet32px([2, 3, 4, 2], 4, classes),
    "vit-s4": lambda classes: vit(384, 12, 6, classes),
    "vit-d128": lambda classes: vit(128, 6, 4, classes),
}


@dataclass(frozen=True)
class Pixels:
    """Images in memory, `images` uint8 `(n, 3, 32, 32)` and `labels` int64 `(n,)`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Pixels:
        """Some of them."""
        return Pixels(self.images[index], self.labels[index])

    def some(self, count: int | None, seed: int = 0) -> Pixels:
        """So many images at random, the same for a seed; they lie in the order of the classes."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.take(order[:count].to(self.labels.device))

    def to(self, device: torch.device | str) -> Pixels:
        """The same on a device."""
        return Pixels(self.images.to(device), self.labels.to(device))


def read_pixels(data: Path) -> dict[str, Pixels]:
    """`train` (nine tenths of the training images), `val` (the rest of them) and `test`.

    The division is the one that `tiedconv finetune --val-split 0.1` makes; the folder's own
    validation or test part is `test`. Decoded images are kept in a file beside the folder.
    """
    kept = data / f"pixels-{hashlib.sha256(b'v1').hexdigest()[:8]}.pt"
    if not kept.is_file():
        split = open_split(data / "train", val_fraction=0.1, seed=0, limit=None)
        parts = {"train": split.train, "val": split.val, "test": open_images(data)}
        torch.save({k: _decode(v) for k, v in parts.items()}, kept)
    found = torch.load(kept, weights_only=True)
    return {k: Pixels(*found[k]) for k in ("train", "val", "test")}


def _decode(images: Images) -> tuple[Tensor, Tensor]:
    listed = ImageList(images, _as_bytes, strict=True)
    samples = [listed[i] for i in range(len(listed))]
    return torch.stack([s[0] for s in samples]), torch.tensor([s[1] for s in samples])


def _as_bytes(image: Any, *_: Any) -> Tensor:
    raw = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return raw.reshape(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def listed(pixels: Pixels, **options: Any) -> TensorList:
    """The same as a data set of tiedconv; options are those of `TensorList`."""
    return TensorList(pixels.images.cpu(), pixels.labels.cpu(), mean=MEAN, std=STD, **options)


def normalised(images: Tensor) -> Tensor:
    """uint8 images as a network wants them, float32."""
    mean = torch.tensor(MEAN, device=images.device).reshape(1, 3, 1, 1)
    std = torch.tensor(STD, device=images.device).reshape(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std


def cropped(
    images: Tensor, generator: torch.Generator, padding: int = 4, border: str = "reflect"
) -> Tensor:
    """Each image shifted by up to `padding` pixels and flipped or not, at random.

    What moves in is its reflection, or black where the border is `constant`.
    """
    n, _, height, width = images.shape
    device = images.device
    padded = nn.functional.pad(images.float(), (padding,) * 4, mode=border).to(images.dtype)
    shift = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator).to(device)
    flip = (torch.rand(n, 1, generator=generator) < 0.5).to(device)
    rows = torch.arange(height, device=device) + shift[0]
    columns = torch.arange(width, device=device)
    columns = torch.where(flip, width - 1 - columns, columns) + shift[1]
    at = torch.arange(n, device=device)
    return padded.permute(0, 2, 3, 1)[
        at[:, None, None], rows[:, :, None], columns[:, None, :]
    ].permute(0, 3, 1, 2)


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` index tensors of `size`, epoch after epoch in a new order each."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(count, generator=generator)
        yield order[:size]
        order = order[size:]


@torch.no_grad()
def top1(model: nn.Module, pixels: Pixels, batch: int = 500) -> float:
    """Share of the images whose class the model names, in evaluation mode."""
    model.eval()
    right = 0
    for start in range(0, len(pixels), batch):
        scores = model(normalised(pixels.images[start : start + batch]))
        right += int((scores.argmax(1) == pixels.labels[start : start + batch]).sum())
    return right / len(pixels)

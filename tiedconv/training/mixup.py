"""MixUp and CutMix: a batch mixed with a permutation of itself.

MixUp (Zhang et al., arXiv 1710.09412) blends pairs of images; CutMix (Yun et al., arXiv
1905.04899) puts a rectangle of one into the other. The labels are mixed likewise. The
draws depend on a seed alone, so that a resumed run repeats them. torchvision's v2.MixUp and CutMix
are not used: they need the number of classes before the forward pass, draw from the global
generator, and always pair an image with the one before it in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[int, int, int, int]
"""Top, left, bottom and right of a rectangle; the last two lie outside of it."""


@dataclass(frozen=True)
class Mix:
    """How one batch is mixed.

    As all images of a batch have one lam, and each is a partner once, the mean image and the
    mean label stay what they are.

    Args:
        perm: for each image, the place in the batch of the one mixed into it.
        lam: how much of an image, and of its label, stays its own.
        box: the part that comes from the partner; None where the two are blended.
    """

    perm: tuple[int, ...]
    lam: float
    box: Box | None = None

    @classmethod
    def draw(cls, mixup: float, cutmix: float, shape: torch.Size, seed: int) -> Mix:
        """The mix of a batch.

        Args:
            mixup: alpha of MixUp's Beta(alpha, alpha), from which the lam comes; 0 for none.
            cutmix: alpha of CutMix; 0 for none. Given both, either is taken half of the time.
            shape: of the images, (B, C, H, W).
            seed: decides all of it.
        """
        count, _, height, width = shape
        draws = np.random.default_rng(seed)
        cuts = cutmix > 0 and (mixup <= 0 or draws.random() < 0.5)
        alpha = cutmix if cuts else mixup
        lam = float(draws.beta(alpha, alpha))
        perm = tuple(draws.permutation(count).tolist())
        if not cuts:
            return cls(perm, lam)
        box = _box(height, width, 1 - lam, draws)
        cut = (box[2] - box[0]) * (box[3] - box[1])
        return cls(perm, 1 - cut / (height * width), box)

    def images(self, images: Tensor) -> Tensor:
        """The mixed images, of the same shape (B, C, H, W); the given ones stay as they are."""
        others = images[torch.tensor(self.perm, device=images.device)]
        if self.box is None:
            return torch.lerp(others, images, self.lam)
        top, left, bottom, right = self.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        return mixed

    def labels(self, labels: Tensor, classes: int) -> Tensor:
        """Labels (B,) as mixed shares of the classes, (B, classes), float32; rows sum to 1."""
        one_hot = F.one_hot(labels, classes).float()
        others = one_hot[torch.tensor(self.perm, device=labels.device)]
        return torch.lerp(others, one_hot, self.lam)


def _box(height: int, width: int, lam: float, draws: np.random.Generator) -> Box:
    """A rectangle of this lam of the image around a random point, cut off at the border."""
    rows, columns = round(height * lam**0.5), round(width * lam**0.5)
    top = int(draws.integers(height)) - rows // 2
    left = int(draws.integers(width)) - columns // 2
    return max(0, top), max(0, left), min(height, top + rows), min(width, left + columns)

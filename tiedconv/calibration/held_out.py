"""Which images of a calibration are held out: no statistics are of them, and no fit sees them.

They decide between the states of a fit, and a report says of the outputs what was measured on them
alone. On the other images a compact model may look much better than it is: made by 32 photos with
none held out, EfficientNet-Lite0 at 10 % of its bytes has a KL divergence of 0.003 on these photos
and of 1.5 on others (`benchmarks/few_photos.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tiedconv.data.grouping import Indices

FRACTION, FEWEST, LARGEST = 10, 16, 4
"""One image of `FRACTION` is held out; of few images more, up to `FEWEST` in all, but no more than
one of `LARGEST`."""


def split(readable: int, seed: int, lost: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Indices of the images to fit and of those held out, both sorted.

    Which image of a data set is held out does not depend on which others can be read. A single
    image is both.

    Args:
        readable: images of the data set that can be read.
        seed: decides which are held out.
        lost: indices into the data set of the images that can't be read.

    Returns:
        two lists of indices among the readable images.
    """
    train, held = _split(readable + len(lost), seed)
    if lost:
        places = np.setdiff1d(np.arange(readable + len(lost)), lost)
        parts = [np.flatnonzero(np.isin(places, part)) for part in (train, held)]
        train, held = parts if all(map(len, parts)) else _split(readable, seed)
    return torch.from_numpy(train), torch.from_numpy(held)


def _split(count: int, seed: int) -> tuple[Indices, Indices]:
    order = np.random.default_rng((seed, 1)).permutation(count)
    if count < 2:
        return order, order
    held = max(1, count // FRACTION, min(FEWEST, count // LARGEST))
    return np.sort(order[held:]), np.sort(order[:held])

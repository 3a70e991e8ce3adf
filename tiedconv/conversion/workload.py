"""The multiply-adds of a model, counted on an input that it takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.sample_inputs import named_inputs
from tiedconv.conversion.symmetry_proof import first_image
from tiedconv.core.workload import Workload
from tiedconv.runtime.call_hooks import hooked, text_hooks
from tiedconv.runtime.example_inputs import (
    Example,
    as_arguments,
    on_device_of,
    usual_inputs,
)
from tiedconv.runtime.macs import measure
from tiedconv.sources import Source


def count_macs(
    model: nn.Module,
    source: Source | None = None,
    example: Example | None = None,
    calib: Calibration | None = None,
) -> Workload | None:
    """The workload of a plain model on one input.

    The input is the first that the model takes of: the example, a calibration's first sample, an
    image of the size that the model's preprocessing names, images of the sizes that the model
    names, tokens, indices. Only its shape counts, unless what the model runs depends on values.

    Args:
        model: its parameters may be on the meta device.
        source: where it came from, which tells how its images are prepared.
        example: an input of the model.
        calib: what it is calibrated on.

    Returns:
        None if it takes none of them.
    """
    for given in _inputs(model, source, example, calib):
        args, kwargs = as_arguments(given)
        try:
            with hooked(model, text_hooks(model)):
                found = measure(model, args, kwargs)
        except Exception:  # models reject inputs with any error
            continue
        if found.total:
            return found
    return None


def _inputs(
    model: nn.Module, source: Source | None, example: Example | None, calib: Calibration | None
) -> Iterator[Example]:
    if example is not None:
        yield example
    if calib is not None and (sample := _sample(model, calib)) is not None:
        yield on_device_of(model, sample)
    prepared = None if source is None else source.preprocess
    if prepared is not None:
        image = torch.zeros(1, prepared.channel_count(), prepared.size, prepared.size)
        yield on_device_of(model, image)
    kinds: Iterable[Iterator[Example]] = usual_inputs(model)
    yield from itertools.chain.from_iterable(kinds)


def _sample(model: nn.Module, calib: Calibration) -> Example | None:
    """The first sample of a data set, as a batch of one; a folder's have the usual size."""
    data: Any = calib.data.dataset if isinstance(calib.data, DataLoader) else calib.data
    if not hasattr(data, "__getitem__") or isinstance(data, str) or not len(data):
        return None
    first = data[0]
    if isinstance(first, Mapping):
        return {
            name: torch.as_tensor(first[name]).unsqueeze(0) for name in named_inputs(model, first)
        }
    return first_image(data)

"""A recipe carried out on weights, and what is kept of it until the blocks are fitted too.

What is kept is a compact file like any other, whose history says what it was made of. A calibration
that was interrupted goes on from it, without measuring and fitting again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from tiedconv.calibration import CalibConfig
from tiedconv.calibration.state import digest_of, foreign, settings_of
from tiedconv.conversion.fit import Fit
from tiedconv.data import Loader
from tiedconv.errors import CheckpointError
from tiedconv.io.checkpoint import Checkpoint, read, write_compact
from tiedconv.io.run_dir import FIT, RunDir
from tiedconv.planning.recipe import Recipe
from tiedconv.training.state import prepare_folder, require_same, weights_digest

_IMAGES = 16  # by which sets of images are told apart


def identity_of(
    config: CalibConfig, recipe: Recipe, original: nn.Module, data: Dataset[Any]
) -> dict[str, Any]:
    """What must be the same for a calibration to go on from a fit that was kept.

    Raises:
        DataError: what the data set raises when it is read.
    """
    count = len(data)  # type: ignore[arg-type]
    few = Subset(data, range(0, count, -(-count // _IMAGES)))
    with contextlib.closing(Loader(few, _IMAGES, workers=0)) as loader:
        images = [batch.images for batch in loader.epoch() if len(batch.images)]
    return {
        **settings_of(config),
        "recipe": json.dumps(recipe.to_json()),
        "weights": weights_digest(original),
        "number of images": count,
        "images": digest_of(torch.cat(images)) if images else "none",
    }


def save_fits(
    folder: Path, fits: Sequence[Fit], source: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    """Write the fits that a calibration goes on with.

    Args:
        folder: of the run; it is made.
        fits: the best first.
        source: where the model came from.
        identity: from `identity_of`.

    Raises:
        OutputError: it can't be written to.
    """
    for i, fit in enumerate(fits):
        part = RunDir(folder).part(i, len(fits))
        prepare_folder(part)
        entry = {
            "step": "fit",
            "recipe": fit.recipe.to_json(),
            "cost": fit.cost,
            "ridge": fit.ridge,
            "fits": len(fits),
            "identity": dict(identity),
        }
        write_compact(
            part / FIT,
            fit.plan,
            source,
            [entry],
            lambda name, tensors=fit.tensors: tensors[name].detach().cpu().contiguous(),  # type: ignore[misc]
            force=True,
        )


def load_fits(folder: Path, recipes: Sequence[Recipe], identity: Mapping[str, Any]) -> list[Fit]:
    """The fits that `save_fits` wrote; none where it was not done with them.

    Args:
        folder: of the run.
        recipes: that may have been carried out.
        identity: from `identity_of`.

    Raises:
        CheckpointError: a file is damaged.
        UserError: they were made with other options, another model or other images.
    """
    found: list[Fit] = []
    count = 1 if (folder / FIT).exists() else 2
    while len(found) < count:
        path = RunDir(folder).part(len(found), count) / FIT
        if not path.exists():
            return []
        with _opened(path) as file:
            entry = file.history[0]
            require_same(path, entry["identity"], identity, "calibration")
            count = int(entry["fits"])
            recipe = next(r for r in recipes if _same(r.to_json(), entry["recipe"]))
            cost, ridge = float(entry["cost"]), entry["ridge"]
            found.append(Fit(recipe, file.plan, cost, ridge, dict(file.tensors())))
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Checkpoint]:
    """A compact file of ours; whatever else it is, it is no fit to go on from."""
    try:
        file = read(path)
        with contextlib.closing(file.file):
            yield file
    except (CheckpointError, KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
        raise foreign(path) from error


def _same(ours: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
    """As plain data: a file knows no tuples."""
    return bool(json.loads(json.dumps(ours)) == dict(written))

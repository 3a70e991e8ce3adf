"""A recipe carried out on weights, and its files until the blocks are fitted too.

Each is a compact file, whose history records what it was made from. An interrupted calibration
resumes from it, without measuring and fitting again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset

from tiedconv.calibration import CalibConfig
from tiedconv.calibration.state import KIND, settings_of
from tiedconv.conversion.fit import Fit
from tiedconv.data import ImageList, Loader
from tiedconv.errors import CheckpointError
from tiedconv.io.checkpoint import write_compact
from tiedconv.io.checkpoint_reader import Checkpoint, read
from tiedconv.io.run_dir import FIT, RunDir
from tiedconv.io.run_state import (
    foreign,
    prepare_folder,
    require_same,
    tensor_digest,
    weights_digest,
)
from tiedconv.planning.recipe import Recipe

_AT_ONCE = 16  # images


def identity_of(
    config: CalibConfig, recipe: Recipe, original: nn.Module, data: Dataset[Any]
) -> dict[str, Any]:
    """What must be the same for a calibration to resume from saved fits.

    Raises:
        DataError: what the data set raises when it is read.
    """
    return {
        **settings_of(config),
        "recipe": json.dumps(recipe.to_json()),
        "weights": weights_digest(original),
        "number of images": len(data),  # type: ignore[arg-type]
        "images": _digest_of_images(data),
    }


def _digest_of_images(data: Dataset[Any]) -> str:
    """Of all contents: the encoded bytes of images in files, the tensors of others.

    Of images in files the first are decoded as well, which shows how images are prepared. A data
    set whose entries stand for others has a method `digest()` that tells those.
    """
    stated = getattr(data, "digest", None)
    if stated is not None:
        return str(stated())
    digest = hashlib.sha256()
    decoded = data
    if isinstance(data, ImageList):
        for i in range(len(data)):
            digest.update(_encoded(data, i))
        decoded = Subset(data, range(min(_AT_ONCE, len(data))))
    with contextlib.closing(Loader(decoded, _AT_ONCE, workers=0)) as loader:
        for batch in loader.epoch():
            digest.update(tensor_digest(batch.images).encode())
    return digest.hexdigest()[:12]


def _encoded(data: ImageList, index: int) -> bytes:
    """SHA-256 of an image's bytes; of its name where it can't be read, as it is skipped later."""
    try:
        opened = data.images.open(index)
        if isinstance(opened, str | Path):
            return hashlib.sha256(Path(opened).read_bytes()).digest()
        with opened:
            return hashlib.sha256(opened.read()).digest()
    except OSError:
        return hashlib.sha256(data.images.name(index).encode()).digest()


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
            "symmetries": fit.symmetries,
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
            require_same(path, entry["identity"], identity, KIND)
            count = int(entry["fits"])
            recipe = next(r for r in recipes if _same(r.to_json(), entry["recipe"]))
            cost, ridge = float(entry["cost"]), entry["ridge"]
            symmetries = entry.get("symmetries", {})
            found.append(Fit(recipe, file.plan, cost, ridge, dict(file.tensors()), symmetries))
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Checkpoint]:
    """A compact file; any error means that it is not a saved fit."""
    try:
        file = read(path)
        with contextlib.closing(file.file):
            yield file
    except (CheckpointError, KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
        raise foreign(path, KIND) from error


def _same(ours: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
    """Compared as JSON, which has no tuples."""
    return bool(json.loads(json.dumps(ours)) == dict(written))

"""Images with a mask each, as semantic segmentation has them.

Known are `ROOT/images/validation/*.jpg` with `ROOT/annotations/validation/*.png` (ADE20K), the
same without parts, and `ROOT/JPEGImages` with `ROOT/SegmentationClass` (Pascal VOC). The folder of
masks may also be called `masks` or `labels`. A mask has the name of its image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tiedconv.data.annotations import Masks
from tiedconv.data.images import SUFFIXES, Images
from tiedconv.data.layouts._base import VAL_NAMES, Layout, Parts
from tiedconv.errors import DataError
from tiedconv.io.plain_file import require_plain_file

_IMAGES = ("images", "JPEGImages")
_MASKS = ("annotations", "masks", "labels", "SegmentationClass")
_TRAIN = ("train", "training")


class MaskFolders(Layout):
    """A folder of images and a folder of masks."""

    name = "masks"
    labels_from = "classes for whole images: its annotations are masks"
    expected = (
        "Expected ROOT/images/validation/*.jpg and ROOT/annotations/validation/*.png, each mask "
        "with the name of its image"
    )

    def takes(self, spec: str) -> bool:
        found = _folders(Path(spec))
        return found is not None and any(f.suffix == ".png" for f in found[1].glob("**/*.*"))

    def parts(self, spec: str, *, labels: bool) -> Parts:
        found = _folders(Path(spec))
        assert found is not None  # as `takes` found
        there = {name: folder for name in (*_TRAIN, *VAL_NAMES)
                 if (folder := found[0] / name).is_dir()}  # fmt: skip
        if not there:
            return Parts(whole=partial(_listed, *found))
        lists = {name: partial(_listed, found[0] / name, found[1] / name) for name in there}
        train = next((name for name in _TRAIN if name in lists), None)
        val = next((lists[name] for name in VAL_NAMES if name in lists), None)
        return Parts(
            train=lists[train] if train else None, val=val,
            train_spec=str(there[train]) if train else "",
        )  # fmt: skip


LAYOUT = MaskFolders()


@dataclass(frozen=True)
class _Photos:
    """Image files: a store."""

    paths: tuple[str, ...]

    def name(self, at: int) -> str:
        return self.paths[at]

    def open(self, at: int) -> str:
        require_plain_file(Path(self.paths[at]))
        return self.paths[at]


def _folders(root: Path) -> tuple[Path, Path] | None:
    """The folder of images and that of masks."""
    pairs = ((root / images, root / masks) for images in _IMAGES for masks in _MASKS)
    return next(((a, b) for a, b in pairs if a.is_dir() and b.is_dir()), None)


def _listed(images: Path, masks: Path) -> Images:
    """The images that have a mask, in the order of their names.

    Raises:
        DataError: there is none (`no-masks`).
    """
    known = {file.stem: file for file in sorted(masks.glob("*.png"))}
    pairs = [
        (str(file), str(known[file.stem]))
        for file in sorted(images.iterdir())
        if file.suffix.lower() in SUFFIXES and file.stem in known
    ]
    if not pairs:
        raise DataError(
            f"No image of {images} has a mask in {masks}",
            "There is nothing to compare with",
            MaskFolders.expected,
            code="no-masks",
        )
    photos, beside = zip(*pairs, strict=True)
    return Images.all_of(_Photos(photos), len(photos), None, (), masks=Masks(beside))

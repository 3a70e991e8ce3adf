"""From what the user names to lists of images: the same three ways for every layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tiedconv.data.images import Images, are_indices
from tiedconv.data.layouts import Layout, Parts, layout_of
from tiedconv.data.layouts._base import listed
from tiedconv.data.splitting import hold_out, limited, some_of
from tiedconv.errors import DataError, UserError

Labels = Literal["required", "optional", "ignore"]
"""Labels: an error without them, used where there are any, or never read."""


@dataclass(frozen=True)
class Split:
    """Images to train on and images to evaluate on; both have the same classes.

    Attributes:
        train: the training images.
        val: the images to evaluate on.
        held_out: whether `val` was held out of the training images.
        title: a short name of the data, without any path.
    """

    train: Images
    val: Images
    held_out: bool
    title: str = ""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; empty if the images have no labels."""
        return self.train.classes

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return self.train.labels is not None


def open_split(
    spec: str | Path,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    labels: Labels = "required",
) -> Split:
    """Finds training and validation images.

    Args:
        spec: a folder of images, a folder or pattern of tar shards, or `hf:` with the name or
            folder of a Hugging Face data set.
        val_fraction: fraction of each class to hold out where there is no part to evaluate on.
        seed: decides which images are held out, and which ones `limit` keeps.
        limit: maximum number of images in each of the two parts, spread evenly over the classes.
        labels: whether labels are required, optional or ignored.

    Raises:
        DataError: no images, no labels though they are needed, or parts with different classes.
        MissingExtra: the layout needs an optional package.
        UserError: `val_fraction` or `limit` out of range.
    """
    if not 0 < val_fraction < 1:
        raise UserError(
            f"The held-out fraction is {val_fraction}",
            hint="Choose a number between 0 and 1",
            code="invalid-val-fraction",
        )
    _check_limit(limit)
    layout, parts = _parts(spec, labels)
    first = parts.whole or parts.train
    if first is None:
        raise DataError(
            f"{spec} has a part to evaluate on but none to train on",
            "There is nothing to train on",
            layout.expected,
            code="no-training-part",
        )
    train = first()
    if parts.val is None:
        _check_labels(train, spec, layout, labels)
        train, val = hold_out(train, val_fraction, seed)
    else:
        train, val = _matched(train, parts.val())
        _check_labels(train, spec, layout, labels)
    train, val = limited(train, limit, seed), limited(val, limit, seed)
    return Split(train, val, parts.val is None, layout.title(str(spec)))


def open_images(spec: str | Path, *, seed: int = 0, limit: int | None = None) -> Images:
    """Finds the labelled images to evaluate on: the validation part, else test, else all.

    Args:
        spec: as for `open_split`.
        seed: decides which images `limit` keeps.
        limit: maximum number of images, spread evenly over the classes.

    Raises:
        DataError: no images, images without labels, or only a part to train on.
        MissingExtra: the layout needs an optional package.
    """
    _check_limit(limit)
    layout, parts = _parts(spec, "required")
    part = parts.whole or parts.val
    if part is None:
        raise DataError(
            f"{spec} has a part to train on (train) but no val or test",
            "There is nothing to evaluate on",
            f"Pass {parts.train_spec} to evaluate on the training images",
            code="no-validation-part",
        )
    images = part()
    _check_labels(images, spec, layout, "required")
    return limited(images, limit, seed)


def open_unlabelled(spec: str | Path, *, count: int, seed: int = 0) -> Images:
    """Some images, whatever their classes: of the training part if there is one, else of all.

    Args:
        spec: as for `open_split`; in a folder, images may lie at any depth.
        count: maximum number of images.
        seed: decides which.

    Returns:
        the images in their own order, without labels.

    Raises:
        DataError: no images.
        MissingExtra: the layout needs an optional package.
        UserError: `count` below 2.
    """
    if count < 2:
        raise UserError(
            f"{count} calibration images were asked for",
            hint="Use 2 or more",
            code="too-few-images",
        )
    _, parts = _parts(spec, "ignore")
    part = parts.whole or parts.train or parts.val
    assert part is not None  # a data set has at least one part
    return some_of(part().unlabelled(), count, seed)


def _parts(spec: str | Path, labels: Labels) -> tuple[Layout, Parts]:
    layout = layout_of(str(spec))
    return layout, layout.parts(str(spec), labels=labels != "ignore")


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UserError(
            f"The limit is {limit} images", hint="Choose 1 or more", code="invalid-limit"
        )


def _check_labels(images: Images, spec: str | Path, layout: Layout, labels: Labels) -> None:
    if labels == "required" and not images.annotated:
        raise DataError(
            f"The images of {spec} have no labels (no {layout.labels_from})",
            "Nothing says what they show",
            f"{layout.expected}. To learn from a teacher alone, give one and use --distill 1",
            code="no-labels",
        )


def _matched(train: Images, val: Images) -> tuple[Images, Images]:
    """Both parts with the same classes, or both without labels.

    Raises:
        DataError: their classes differ.
    """
    if train.objects is not None and val.objects is not None:
        known = dict(zip(train.objects.category_ids, train.objects.names, strict=True))
        found = dict(zip(val.objects.category_ids, val.objects.names, strict=True))
        if known != found:
            odd = sorted(set(known.items()) ^ set(found.items()))
            raise DataError(
                "The categories of training and validation differ: only one of them has "
                f"{listed(f'{number} ({name})' for number, name in odd)}",
                "The model would be evaluated on other classes than it is trained on",
                "Give both JSON files the same list of categories",
                code="classes-differ",
            )
    if train.labels is None or val.labels is None:
        return train.unlabelled(), val.unlabelled()
    if train.classes == val.classes:
        return train, val
    longer = max(train.classes, val.classes, key=len)
    if all(are_indices(images.classes) for images in (train, val)):
        # The classes have no names: one part just lacks images of the last few.
        return replace(train, classes=longer), replace(val, classes=longer)
    only_train = sorted(set(train.classes) - set(val.classes))
    only_val = sorted(set(val.classes) - set(train.classes))
    parts = [
        f"only the {part} part has the {'classes' if len(names) > 1 else 'class'} {listed(names)}"
        for part, names in (("training", only_train), ("validation", only_val))
        if names
    ] or ["they are in a different order"]
    raise DataError(
        f"Training and validation classes differ: {'; '.join(parts)}",
        "Their labels would not mean the same",
        "Give both parts the same classes (an empty class folder will do in validation)",
        code="classes-differ",
    )

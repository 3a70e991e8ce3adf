"""Whether images are to be classified, or objects found in them."""

from __future__ import annotations

from dataclasses import replace

from tiedconv.data import Images
from tiedconv.errors import DataError, UserError
from tiedconv.training import TrainConfig

TASKS = ("auto", "classification", "detection")


def detects(task: str, images: Images) -> bool:
    """Whether it is a detector's task: by the user's word, or by what stands beside the images.

    Raises:
        UserError: there is no such task.
        DataError: the data are not for it.
    """
    if task not in TASKS:
        raise UserError(f"Unknown task {task!r}", remedy=f"Choose {', '.join(TASKS)}")
    found = images.objects is not None
    if task == "classification" and found:
        raise DataError(
            "The data have boxes, and no class for a whole image",
            "A classifier can't be scored or taught with them",
            "Give class folders, or leave --task out",
        )
    return found if task == "auto" else task == "detection"


def for_detector(config: TrainConfig) -> TrainConfig:
    """The options as a detector can take them: "crop" only mirrors, and norms stay as they are.

    Raises:
        UserError: an option that boxes don't go with.
    """
    odd = {
        "augment": config.augment not in ("none", "flip", "crop"),
        "mixup": config.mixup > 0,
        "cutmix": config.cutmix > 0,
        "erasing": config.erasing > 0,
    }
    for option in (name for name, set_ in odd.items() if set_):
        raise UserError(
            f"{option}={getattr(config, option)} is for classifiers",
            "A detector's boxes would not follow it",
            f"Leave --{option} out; --augment flip mirrors images and boxes",
        )
    for option, usual in (("distillation", "soft"), ("label_smoothing", 0.0)):
        if getattr(config, option) != usual:
            raise UserError(
                f"{option}={getattr(config, option)} is for classifiers",
                "A detector's own loss, and its distance to the teacher's answer, have no place "
                "for it",
                f"Leave --{option.replace('_', '-')} out",
            )
    augment = "none" if config.augment == "none" else "flip"
    return replace(config, augment=augment, bn_recalibrate=0)

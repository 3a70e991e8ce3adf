"""The interface of a task, and the features that some tasks read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tiedconv.data import ImageList, Images, eval_transform
from tiedconv.errors import UserError
from tiedconv.runtime.outputs import named_outputs
from tiedconv.sources import Preprocess


@dataclass(frozen=True)
class Given:
    """What an evaluation reads.

    Attributes:
        images: to evaluate on.
        train: the training images, for a task that needs them too; else None.
        preprocess: how the model's images are prepared.
        first_class: the value in a mask that means the model's first class.
        strict: a broken image is an error rather than skipped.
        batch_size: images at a time.
        workers: processes that read images; None chooses.
    """

    images: Images
    train: Images | None
    preprocess: Preprocess
    first_class: int = 0
    strict: bool = False
    batch_size: int = 64
    workers: int | None = None

    def listed(self, images: Images) -> ImageList:
        """Images as the model wants them."""
        wanted = self.preprocess
        return ImageList(
            images, eval_transform(wanted), strict=self.strict, channels=wanted.channel_count(),
            exif=wanted.exif,
        )  # fmt: skip


class EvaluationTask(ABC):
    """What a model is evaluated at.

    Attributes:
        name: as `--task` has it.
        needs: what data it needs, for messages.
        columns: the title of each metric in a table, in order.
        by_default: whether data that fit mean this task.
        with_train: whether it needs the training images too.
        by_outputs: whether labels are compared with the model's outputs.
        last: whether it is asked only if no other task fits.
    """

    name: ClassVar[str]
    needs: ClassVar[str]
    columns: ClassVar[Mapping[str, str]]
    by_default: ClassVar[bool] = True
    with_train: ClassVar[bool] = False
    by_outputs: ClassVar[bool] = True
    last: ClassVar[bool] = False

    @abstractmethod
    def fits(self, images: Images) -> bool:
        """Whether data are for this task."""

    @abstractmethod
    def data(self, given: Given) -> Dataset[Any]:
        """The data set to evaluate on; its own `task` scores, or it has labels of classes."""


def features_of(output: Any) -> Tensor:
    """One row of features for each image, `(B, width)`, float32.

    The pooled output or the embedding of the image where it has a name; else the only tensor:
    as it is, the first token of `(B, n, width)`, or the mean over a map `(B, C, H, W)`.

    Raises:
        UserError: there are several tensors and none is known by its name (`features-unknown`).
    """
    found = {n: t for n, t in named_outputs(output).items() if t.is_floating_point() and t.ndim}
    known = [n for n in ("pooler_output", "image_embeds", "last_hidden_state") if n in found]
    if not known and len(found) != 1:
        raise UserError(
            f"The model returns {', '.join(found)}",
            "Which of them are the features of an image is not known",
            "Say it with --output-name",
            code="features-unknown",
        )
    tensor = found[known[0] if known else next(iter(found))].float()
    if tensor.ndim == 3:
        return tensor[:, 0]
    return tensor.flatten(2).mean(2) if tensor.ndim == 4 else tensor


def normalised(features: Tensor) -> Tensor:
    """Rows of length 1."""
    return torch.nn.functional.normalize(features.float(), dim=-1)

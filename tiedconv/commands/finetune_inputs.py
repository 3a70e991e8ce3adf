"""What a fine-tuning reads: the compact model, its teacher, and images with matched classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from tiedconv.commands.evaluate import open_teacher
from tiedconv.data import (
    ImageList,
    Labels,
    Split,
    eval_transform,
    first_readable,
    open_split,
    train_transform,
)
from tiedconv.data.class_match import ClassMatch, match_classes
from tiedconv.detection import DetectionList, detects, for_detector
from tiedconv.errors import DataError, UserError
from tiedconv.outputs import Imitated, Imitation, kind_of
from tiedconv.outputs.class_logits import ClassLogits
from tiedconv.runtime.call_hooks import (
    ChosenOutput,
    Pick,
    hooked,
    text_hooks,
)
from tiedconv.runtime.forward_check import checked_forward
from tiedconv.runtime.soft_codes import soften
from tiedconv.runtime.tie import state_of
from tiedconv.sources import Preprocess, Source
from tiedconv.sources.class_names import ClassNames, class_names_of
from tiedconv.sources.models import load, source_of, with_preprocess
from tiedconv.training import TrainConfig, with_teacher_labels
from tiedconv.training.batchnorm import modes_kept


@dataclass(frozen=True)
class FinetuneRequest:
    """Which model to train on which images, and how; fields as the arguments of `finetune`."""

    file: str | Path
    data: str | Path
    config: TrainConfig = field(default_factory=TrainConfig)
    teacher: str | nn.Module = "auto"
    preprocess: Callable[[Preprocess], Preprocess] | None = None
    val_split: float = 0.1
    limit: int | None = None
    class_map: str | Path | None = None
    unlabelled: bool = False
    task: str = "auto"
    device: str = "auto"
    strict: bool = False
    trust_code: bool = False
    output_name: Pick | None = None


@dataclass(frozen=True)
class FinetuneInputs:
    """What a training needs: the model, its teacher and the images.

    Args:
        model: the compact model.
        source: where it came from, with the preprocessing of this run.
        teacher: None for none.
        name: of the teacher, or `none`.
        split: the images, their labels those of the model's outputs.
        train_data, val_data: the same, prepared for the model.
        config: the training options, for the task.
        match: how classes were matched; None without labels.
        classes: the names of the classes, where they are to be recorded.
    """

    model: nn.Module
    source: Source
    teacher: nn.Module | None
    name: str
    split: Split
    train_data: Dataset[Any]
    val_data: Dataset[Any]
    config: TrainConfig
    match: ClassMatch | None
    classes: tuple[str, ...]

    @property
    def detects(self) -> bool:
        """Whether a detector is trained."""
        return isinstance(self.train_data, DetectionList)

    @property
    def labelled(self) -> bool:
        """Whether the images have labels or boxes."""
        return self.detects or self.split.labelled


def open_inputs(request: FinetuneRequest) -> FinetuneInputs:
    """Open the model, the teacher and the images; integers of the model can be trained then.

    Raises:
        UserError: one of them can't be used, or the classes are not those of the model.
    """
    config, teacher, strict = request.config, request.teacher, request.strict
    split = open_split(
        request.data, val_fraction=request.val_split, seed=config.seed, limit=request.limit,
        labels=_label_use(request),
    )  # fmt: skip
    model = load(request.file, trust_code=request.trust_code)
    source = with_preprocess(source_of(state_of(model).source), request.preprocess)
    if isinstance(teacher, str):
        network, name = open_teacher(teacher, source, trust_code=request.trust_code)
    else:
        network, name = teacher, type(teacher).__name__
    known = class_names_of(source, model, state_of(model).history)
    split, match = _matched(split, known, request.class_map)
    prepared = source.preprocess or Preprocess(224)
    train: Dataset[Any]
    val: Dataset[Any]
    if detects(request.task, split.train):
        config = for_detector(config)
        train, val = (DetectionList(p, prepared, strict=strict) for p in (split.train, split.val))
    else:
        transform = train_transform(prepared, config.augment, config.erasing)
        form: dict[str, Any] = {
            "strict": strict, "channels": prepared.channel_count(), "exif": prepared.exif,
        }  # fmt: skip
        train = ImageList(split.train, transform, **form)
        val = ImageList(split.val, eval_transform(prepared), **form)
    soften(model)
    # What the file or its source says already need not be recorded again.
    classes = () if known is not None and match and match.how == "name" else split.classes
    return FinetuneInputs(model, source, network, name, split, train, val, config, match, classes)


@contextmanager
def images_alone(work: FinetuneInputs, output_name: Pick | None) -> Iterator[None]:
    """Within it the model and its teacher are called with images, and return what is compared.

    Args:
        work: the inputs.
        output_name: what of their outputs is compared; None for all.
    """
    after = [] if output_name is None else [ChosenOutput(output_name)]
    with ExitStack() as stack:
        for network in (work.model, work.teacher):
            if network is not None:
                stack.enter_context(hooked(network, text_hooks(network), after))
        yield


def with_teacher_outputs(
    work: FinetuneInputs, data: str | Path, device: torch.device
) -> tuple[Dataset[Any], Dataset[Any]]:
    """Training and validation images, the teacher's outputs in place of labels that are missing.

    Args:
        work: the inputs.
        data: as the user named it.
        device: to run the teacher on.

    Raises:
        DataError: there are neither labels nor a teacher (`no-labels`).
    """
    found = imitated(work)
    if found is not None:
        return found
    if work.labelled:
        return work.train_data, work.val_data
    if work.teacher is None:
        raise DataError(
            f"The images of {data} have no labels, and there is no teacher",
            "There is nothing to learn from",
            "Name a teacher with --teacher, or give images with labels",
            code="no-labels",
        )
    taught = with_teacher_labels(work.val_data, work.teacher, work.model, work.config, device)
    return work.train_data, taught


@torch.no_grad()
def imitated(work: FinetuneInputs) -> tuple[Dataset[Any], Dataset[Any]] | None:
    """The images with the task of giving the teacher's outputs, if that is all there is to learn.

    None where there are labels to learn too, and for one row of class logits an image, whose
    predictions are compared.
    """
    teacher, alone = work.teacher, work.config.distill_weight == 1
    if teacher is None or work.detects or (work.labelled and not alone):
        return None
    sample = first_readable(work.val_data)
    if sample is None:
        return None
    weight = next(teacher.parameters())
    with modes_kept(teacher):
        teacher.eval()
        output = checked_forward(teacher, sample[0].unsqueeze(0).to(weight.device, weight.dtype))
    kind = kind_of(output, teacher)
    if isinstance(kind, ClassLogits) and kind.values(output)[0].ndim == 2:
        return None
    task = Imitation(kind, teacher)
    return Imitated(work.train_data, task), Imitated(work.val_data, task)


def _matched(
    split: Split, known: ClassNames | None, class_map: str | Path | None
) -> tuple[Split, ClassMatch | None]:
    """Both parts, with the labels of the model's outputs."""
    train, match = match_classes(split.train, known, class_map)
    val, _ = match_classes(split.val, known, class_map)
    return dataclasses.replace(split, train=train, val=val), match


def _label_use(request: FinetuneRequest) -> Labels:
    """Whether labels are needed: not where the distillation is the whole loss."""
    weight, teacher = request.config.distill_weight, request.teacher
    distilled = weight == 1 and teacher != "none"
    if request.unlabelled and not distilled:
        raise UserError(
            "Training without labels needs a teacher, and distillation as the whole loss",
            f"The distillation's weight is {weight:g}, the teacher {teacher}",
            "Use --distill 1 with a teacher, or leave --unlabelled out",
            code="unlabelled-needs-distillation",
        )
    return "ignore" if request.unlabelled else "optional" if distilled else "required"

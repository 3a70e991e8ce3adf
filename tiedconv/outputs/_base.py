"""The interface of a kind of output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tiedconv.detection import tensor_in
from tiedconv.errors import UserError
from tiedconv.runtime.sample_table import kept_tokens


class OutputKind(ABC):
    """How outputs of one kind are compared.

    A kind sees an output as a probability distribution, and a distance is its KL divergence from
    that of another model, in nats for each image. `drawn_loss` samples from the same distribution,
    so that its gradients give the Fisher matrix of the distance.

    Attributes:
        name: for people, such as `class logits`.
        compares: what `agreement` measures, such as `same prediction`.
        counts: whether that is a share of cases, rather than a similarity.
        last: whether it is asked only if no other kind matches.
    """

    name: ClassVar[str]
    compares: ClassVar[str]
    counts: ClassVar[bool] = True
    last: ClassVar[bool] = False

    @abstractmethod
    def matches(self, output: Any, model: nn.Module) -> bool:
        """Whether what a model returned is of this kind."""

    @abstractmethod
    def values(self, output: Any) -> list[Tensor]:
        """The tensors that are compared, float32."""

    @abstractmethod
    def distance(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        """KL(answer || output), mean over the images; a differentiable scalar.

        Args:
            output: of the student.
            answer: of the teacher.
            model: the student.

        Raises:
            UserError: their shapes differ (`teacher-mismatch`).
        """

    @abstractmethod
    def drawn_loss(self, output: Any, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Negative log-likelihood of values sampled from the predicted distribution, summed.

        Args:
            output: of the model.
            model: the model.
            generator: of the samples, on the CPU.
        """

    @abstractmethod
    def divergence(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        """KL(answer || output) of what `drawn_loss` draws from, summed over the images.

        Args:
            output: of a changed model.
            answer: of the model as it was.
            model: either of them.
        """

    @abstractmethod
    def agreement(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        """How far two outputs say the same, `(images,)`: 1 where they do, see `compares`."""


def kept_rows(rows: Tensor, model: nn.Module) -> Tensor | None:
    """Which rows `(B, n, ...)` are of tokens that are not padding, `(B, n)`; None where all are."""
    kept = kept_tokens(model)
    return None if kept is None or rows.shape[:2] != kept.shape else kept.to(rows.device)


def mean_of_rows(values: Tensor, kept: Tensor | None) -> Tensor:
    """The mean of `(B, n)` over the rows of each image, `(B,)`; of those that count."""
    if kept is None:
        return values.mean(1)
    return values.masked_fill(~kept, 0.0).sum(1) / kept.sum(1)


def is_multi_label(model: nn.Module) -> bool:
    """Whether a model of transformers is configured for several labels an image."""
    config = getattr(model, "config", None)
    return getattr(config, "problem_type", None) == "multi_label_classification"


def is_reconstruction(output: Any) -> bool:
    """Whether an output says how its patches were shuffled, as masked pretraining does."""
    return tensor_in(output, "ids_restore") is not None


def require_same_shapes(found: Sequence[Tensor], known: Sequence[Tensor]) -> None:
    """Check that a model and its teacher return tensors of the same shapes.

    Raises:
        UserError: they do not (`teacher-mismatch`).
    """
    ours, theirs = ([tuple(t.shape) for t in part] for part in (found, known))
    if ours != theirs:
        raise UserError(
            f"The teacher returns {theirs} and the model {ours}",
            "Their outputs can't be compared",
            "Choose a teacher with the same outputs, such as --teacher auto",
            code="teacher-mismatch",
        )

"""A model that rejects images differs from one with a bug, and from memory that ran out."""

from __future__ import annotations

import pytest
import torch
from error_codes import raises
from torch import Tensor, nn

from tiedconv.errors import UserError, first_line
from tiedconv.runtime.forward_check import checked_forward, is_out_of_memory

IMAGES = torch.zeros(1, 3, 8, 9)


def raising(error: Exception) -> Tensor:
    def model(images: Tensor) -> Tensor:
        raise error

    return checked_forward(model, IMAGES)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "error",
    [AssertionError("a\nb"), RuntimeError("a"), ValueError("a"), TypeError("a"), IndexError("a")],
)
def test_what_libraries_raise_for_a_wrong_size_is_a_user_error(error: Exception) -> None:
    with pytest.raises(UserError) as caught:
        raising(error)
    assert caught.value.code == "images-rejected"
    assert "8 x 9" in caught.value.what
    assert f"{type(error).__name__}: a)" in caught.value.what
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [KeyError("block"), AttributeError("block"), MemoryError(), torch.OutOfMemoryError("full"),
     UserError("other", code="other")],
)  # fmt: skip
def test_a_bug_or_a_lack_of_memory_passes_through(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        raising(error)
    assert caught.value is error


def test_memory_that_ran_out_on_the_cpu_passes_through() -> None:
    def model(images: Tensor) -> Tensor:
        return torch.empty(10**15)

    with pytest.raises(RuntimeError) as caught:
        checked_forward(model, IMAGES)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("a\nb")) == "a"
    assert first_line(ValueError()) == "ValueError"


class Reader(nn.Module):
    """A model of text alone, or of text and images."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        rows, tokens = input_ids.shape
        return torch.zeros(rows, tokens)


def test_a_model_of_text_is_named_as_one() -> None:
    with raises(UserError, "model-takes-text"):
        checked_forward(Reader(), IMAGES)

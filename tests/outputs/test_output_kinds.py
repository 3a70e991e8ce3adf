"""The laws of every kind of output: a distance, and draws whose gradients give its curvature."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from error_codes import raises
from torch import Tensor, nn

import tiedconv
from tiedconv.calibration import CalibConfig
from tiedconv.conversion.calibrate import Calibration
from tiedconv.data import TensorList
from tiedconv.errors import UserError
from tiedconv.outputs import all_output_kinds, kind_of
from tiedconv.runtime.tie import state_of


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MODEL = nn.Identity()
NO_CLASSIFIER = nn.Identity()
NO_CLASSIFIER.num_classes = 0  # type: ignore[assignment]
SEVERAL = nn.Identity()
SEVERAL.config = SimpleNamespace(problem_type="multi_label_classification")  # type: ignore[assignment]

# An output, made of a tensor; the kind that it is of; and the tensor's shape.
CASES: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "rows": (lambda x: x, "class logits", (3, 4)),
    "named rows": (lambda x: SimpleNamespace(logits=x), "class logits", (3, 4)),
    "rows in a tuple": (lambda x: (x, x[0]), "class logits", (3, 4)),
    "tokens": (lambda x: {"logits": x}, "class logits", (3, 2, 4)),
    "pixels": (lambda x: {"logits": x}, "class logits of each pixel", (2, 3, 2, 2)),
    "torchvision's pixels": (lambda x: {"out": x}, "class logits of each pixel", (2, 3, 2, 2)),
    "features": (lambda x: {"last_hidden_state": x}, "features", (2, 3, 4)),
    "unnamed tokens": (lambda x: x, "features", (2, 3, 4)),
    "a map": (lambda x: x, "features", (2, 3, 2, 2)),
    "depth": (lambda x: {"logits": x}, "features", (2, 1, 2, 2)),
    "pyramid": (lambda x: [x, x.mean((2, 3), keepdim=True)], "features", (2, 3, 2, 2)),
    "a depth map": (lambda x: {"predicted_depth": x}, "depth", (2, 3, 4)),
    "masked pixels": (
        lambda x: {"logits": x, "ids_restore": torch.arange(3), "mask": x[..., 0] > 0},
        "masked pixels", (2, 3, 4),
    ),
    "two towers": (
        lambda x: {"image_embeds": x[:, :4], "text_embeds": x[:, 4:], "logits_per_image": x @ x.T},
        "image and text embeddings", (3, 9),
    ),
    "several labels": (lambda x: x, "multi-label logits", (3, 4)),
    "boxes": (
        lambda x: SimpleNamespace(logits=x[..., 4:], pred_boxes=x[..., :4].sigmoid()),
        "boxes", (2, 3, 6),
    ),
}  # fmt: skip


def model_of(case: str) -> nn.Module:
    return SEVERAL if case == "several labels" else MODEL


each_case = pytest.mark.parametrize("case", CASES)


@each_case
def test_an_output_is_of_one_kind(case: str) -> None:
    made, name, shape = CASES[case]
    output = made(_normal(*shape))
    model = model_of(case)
    matching = [k.name for k in all_output_kinds() if not k.last and k.matches(output, model)]
    assert matching == ([] if name == "features" else [name])
    assert kind_of(output, model_of(case)).name == name


def test_a_timm_model_without_a_classifier_gives_features() -> None:
    assert kind_of(_normal(3, 4), NO_CLASSIFIER).name == "features"


@each_case
def test_nothing_is_as_near_as_the_output_itself(case: str) -> None:
    made, _, shape = CASES[case]
    own, other = made(_normal(*shape)), made(-_normal(*shape))
    kind = kind_of(own, model_of(case))
    assert float(kind.distance(own, own, model_of(case))) == pytest.approx(0, abs=1e-5)
    assert float(kind.divergence(own, own, model_of(case))) == pytest.approx(0, abs=1e-6)
    assert kind.agreement(own, own, model_of(case)).tolist() == pytest.approx([1] * shape[0])
    assert float(kind.distance(other, own, model_of(case))) > 0.01
    assert float(kind.agreement(other, own, model_of(case)).mean()) < 1


@each_case
def test_the_divergence_is_the_distance_of_all_images(case: str) -> None:
    made, name, shape = CASES[case]
    if name == "boxes":
        pytest.skip("a detector is distilled by another distance than is drawn from")
    own, other = made(_normal(*shape)), made(_normal(*shape, seed=1))
    kind = kind_of(own, model_of(case))
    rows = shape[0]
    assert float(kind.divergence(other, own, model_of(case))) == pytest.approx(
        rows * float(kind.distance(other, own, model_of(case))), rel=1e-4
    )


@each_case
def test_the_gradients_of_draws_are_the_curvature_of_the_divergence(case: str) -> None:
    """In one random direction: the mean square of the gradient along it, twice the divergence."""
    made, name, shape = CASES[case]
    if name == "boxes":
        shape = (1, 3, 6)  # tests/detection has its exact values
    x = _normal(*shape).double()
    step = _normal(*shape, seed=2).double()
    if name == "boxes":
        step[..., :4] = 0  # the likelihood of boxes has a kink
    kind = kind_of(made(x), model_of(case))
    size = 1e-3
    divergence = float(kind.divergence(made(x + size * step), made(x), model_of(case)))
    asking = x.clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    slopes = []
    for _ in range(1500):
        loss = kind.drawn_loss(made(asking), model_of(case), generator)
        (gradient,) = torch.autograd.grad(loss, asking)
        slopes.append(float((gradient * step).sum()))
    mean_square = sum(s * s for s in slopes) / len(slopes)
    assert size * size * mean_square / 2 == pytest.approx(divergence, rel=0.15)


@pytest.mark.parametrize("case", ["features", "pixels"])
def test_another_shape_is_refused(case: str) -> None:
    made, _, shape = CASES[case]
    own, other = made(_normal(*shape)), made(_normal(*shape[:-1], shape[-1] + 1))
    with raises(UserError, "teacher-mismatch"):
        kind_of(own, MODEL).distance(other, own, MODEL)


def test_what_returns_no_numbers_is_refused() -> None:
    for output in ({"indices": torch.zeros(2, 3, dtype=torch.int64)}, "text"):
        with raises(UserError, "no-tensors-returned"):
            kind = kind_of(output, MODEL)
            kind.distance(output, output, MODEL)


class Returning(nn.Module):
    """Residual convolutions, and an output of some kind."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x).relu()
        if self.how == "tokens":
            tokens = x.flatten(2).mT
            return {"last_hidden_state": tokens, "pooler_output": tokens.mean(1)}
        if self.how == "pixels":
            return {"logits": self.head(x)}
        return self.head(x)


@pytest.mark.parametrize("effort", ["fast", pytest.param("normal", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["tokens", "pixels", "map"])
def test_other_outputs_than_classes_are_calibrated(how: str, effort: str) -> None:
    model = Returning(how).eval()
    images = TensorList(_normal(24, 3, 8, 8), torch.zeros(24, dtype=torch.int64))
    calib = Calibration(images, images=24, config=CalibConfig(effort=effort), workers=0)
    made = tiedconv.convert(model, "lowrank", params="60%", calib=calib)
    blind = tiedconv.convert(model, "lowrank", params="60%")
    fresh = _normal(16, 3, 8, 8, seed=3)
    with torch.no_grad():
        answer = model(fresh)
        kind = kind_of(answer, model)
        fitted, unfitted = (
            float(kind.distance(each.eval()(fresh), answer, model)) for each in (made, blind)
        )
    assert fitted < unfitted
    found = state_of(made).history[0]["calibration"]["agreement"]
    assert found["compares"] == kind.compares
    assert found["images"] == 6
    assert 0 < found["mean"] <= 1

"""`sensitivity`: exact predictions, measurements that leave the model whole, a picture."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cli_helpers import MODEL_ARGS, SPEC, World, figures, plain, refused, run
from covering import slow_unless
from error_codes import raises
from micro import all_micros
from torch import Tensor, nn

import tiedconv
from tiedconv.calibration import CalibConfig, gather_statistics
from tiedconv.commands.sensitivity import Sensed, Sensitivity, matrices_of, sensitivity
from tiedconv.commands.sensitivity_picture import draw
from tiedconv.conversion.calibrate import Calibration
from tiedconv.data import TensorList
from tiedconv.errors import DataError, MissingExtra, NothingToConvert, OutputError, UserError
from tiedconv.families.inspect import inspect_model
from tiedconv.numerics.kfac_metric import KfacMetric
from tiedconv.numerics.rounding import Rounding, entropy
from tiedconv.training import logits_of

FAST = CalibConfig(effort="fast")
HERE = ["--workers", "0", "--device", "cpu"]
SIDES = {"timm-vit": 16, "torchvision-vit": 16, "hf-vit": 16, "torchvision-resnet": 32,
         "torchvision-resnext": 32, "convmixer": 16}  # fmt: skip


def pixels(side: int, count: int = 6) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def calibration(images: Tensor) -> Calibration:
    data = TensorList(images, torch.zeros(len(images), dtype=torch.int64))
    return Calibration(data, len(images), FAST, "cpu", 0)


def answers(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return logits_of(model.eval()(images)).double().log_softmax(-1)


@pytest.mark.parametrize("name", slow_unless(SIDES, ("timm-vit", "torchvision-resnet")))
def test_predictions_are_exact_and_measurements_true(name: str) -> None:
    model, images = all_micros()[name].model(), pixels(SIDES[name])
    before = copy.deepcopy(model.state_dict())
    found = sensitivity(model, calibration(images), keep=0.3, measure=True, batch_size=4)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert (found.images, found.skipped) == (6, 0)
    places = matrices_of(inspect_model(model))
    assert len(places) == len(found.rows) > 3
    weights = {p.slot.tensor: p.slot.transposed for p in places}
    statistics = gather_statistics(
        copy.deepcopy(model), weights, calibration(images).open(None), device="cpu", workers=0
    )  # type: ignore[arg-type]
    right = answers(model, images)
    for place, row in zip(places, found.rows, strict=True):
        matrix = place.slot.matrix_of(before[row.tensor])
        out, inputs = matrix.shape
        assert row.parameters == matrix.numel()
        assert row.stored == row.rank * (out + inputs)
        assert row.rank == 1 or row.stored <= 0.3 * row.parameters
        metric = statistics.metrics[row.tensor]
        b, a = metric.truncate(matrix, row.rank)
        cost = metric.cost(matrix - b @ a)
        assert row.predicted == pytest.approx(cost, rel=1e-2, abs=1e-7), row.name

        changed = copy.deepcopy(model)
        with torch.no_grad():
            place.slot.matrix_of(changed.get_parameter(row.tensor)).copy_(b @ a)
        wrong = answers(changed, images)
        kl = float((right.exp() * (right - wrong)).sum(-1).mean())
        assert row.measured == pytest.approx(kl, rel=1e-2, abs=1e-6), row.name
        assert row.changed == float((right.argmax(-1) != wrong.argmax(-1)).double().mean())


def test_no_approximation_of_that_rank_costs_less() -> None:
    model, images = all_micros()["timm-vit"].model(), pixels(16)
    row = sensitivity(model, calibration(images)).rows[1]
    data = calibration(images).data
    statistics = gather_statistics(
        copy.deepcopy(model), {row.tensor: False}, data, device="cpu", workers=0
    )  # type: ignore[arg-type]
    metric, matrix = statistics.metrics[row.tensor], model.state_dict()[row.tensor]
    b, a = metric.truncate(matrix, row.rank)
    generator = torch.Generator().manual_seed(0)
    assert row.predicted is not None
    for scale in (1e-3, 1e-2, 0.1):
        other = (b + scale * torch.randn(b.shape, generator=generator)) @ a
        assert metric.cost(matrix - other) > 0.999 * row.predicted


def test_matrices_stand_in_the_models_order_under_its_names() -> None:
    def names(name: str) -> list[str]:
        places = matrices_of(inspect_model(all_micros()[name].model()))
        return [f"{p.layer} {p.role}" for p in places]

    assert names("timm-vit")[1:6] == [
        "blocks.0 attn.qkv", "blocks.0 attn.o", "blocks.0 mlp.up", "blocks.0 mlp.down",
        "blocks.1 attn.qkv",
    ]  # fmt: skip
    assert names("torchvision-resnet")[1:6] == [
        "layer1.0 conv1", "layer1.0 conv2", "layer1.0 conv3", "layer1.0 shortcut",
        "layer1.1 conv1",
    ]  # fmt: skip


def test_what_more_is_kept_costs_less() -> None:
    model, images = all_micros()["timm-vit"].model(), pixels(16)
    some, more = (sensitivity(model, calibration(images), keep=k).rows for k in (0.2, 0.6))
    for a, b in zip(some, more, strict=True):
        assert a.predicted is not None
        assert b.predicted is not None
        assert a.predicted > b.predicted
        assert a.stored < b.stored


def test_a_rounded_matrix_costs_what_it_moves_and_more_bits_cost_less() -> None:
    model, images = all_micros()["timm-vit"].model(), pixels(16)
    right, places = answers(model, images), matrices_of(inspect_model(model))
    found = {b: sensitivity(model, calibration(images), bits=b, measure=b == 3) for b in (3, 5)}
    assert found[3].how == "3 bits"
    for place, row, finer in zip(places, found[3].rows, found[5].rows, strict=True):
        assert (row.rank, row.stored, row.bits) == (None, row.parameters, 3)
        assert row.predicted is not None
        assert finer.predicted is not None
        assert 0 < finer.predicted < 0.2 * row.predicted  # a bit is worth a factor of four
        assert row.per_megabyte == pytest.approx(8e6 * row.measured / (29 * row.parameters))
        matrix = place.slot.matrix_of(model.state_dict()[row.tensor])
        changed = copy.deepcopy(model)
        with torch.no_grad():
            other = Rounding(matrix, metric_of(model, images, row.tensor)).to_bits(3)
            place.slot.matrix_of(changed.get_parameter(row.tensor)).copy_(other.matrix)
        assert 2.8 < entropy(other.values) < 3.2
        wrong = answers(changed, images)
        kl = float((right.exp() * (right - wrong)).sum(-1).mean())
        assert row.measured == pytest.approx(kl, rel=1e-2, abs=1e-6), row.name


def metric_of(model: nn.Module, images: Tensor, tensor: str) -> KfacMetric:
    data, places = calibration(images).data, matrices_of(inspect_model(model))
    weights = {p.slot.tensor: p.slot.transposed for p in places}
    found = gather_statistics(copy.deepcopy(model), weights, data, device="cpu", workers=0)  # type: ignore[arg-type]
    return found.metrics[tensor]


class Half(nn.Module):
    """Numbered layers, the last of which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(3))
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 3, 4, 4)` to `(n, 5)`."""
        x = x.flatten(1)
        for layer in self.layers[:2]:
            x = torch.relu(layer(x))
        return self.head(x)


def test_a_matrix_that_no_image_reaches_has_no_price() -> None:
    torch.manual_seed(0)
    found = sensitivity(Half(), calibration(pixels(4)), measure=True)
    reached = {r.name: r.predicted is not None for r in found.rows}
    assert list(reached.values()) == [True, True, False]
    assert found.rows[2].measured == 0
    assert found.rows[2].changed == 0


def test_agreement_of_prediction_and_measurement() -> None:
    def row(i: int, predicted: float, measured: float | None) -> Sensed:
        return Sensed(f"m{i}", "m", str(i), "w", 1000, 1, 500, 32, predicted, measured)

    def result(*pairs: tuple[float, float | None]) -> Sensitivity:
        return Sensitivity("", 0.5, None, 1, 0, tuple(row(i, *p) for i, p in enumerate(pairs)), 0.0)

    same = result((1, 2), (2, 4), (3, 6), (4, 8))
    assert same.rank_correlation == pytest.approx(1)
    assert same.measured_to_predicted == 2
    assert same.by_price == ("m0", "m1", "m2", "m3")
    assert same.rows[0].per_megabyte == pytest.approx(2 * 500)
    assert result((1, 9), (2, 5), (3, 1)).rank_correlation == pytest.approx(-1)
    assert result((1, None), (2, None), (3, None)).rank_correlation is None
    assert result((1, None)).measured_to_predicted is None


# The command


def test_what_is_printed_and_drawn(world: World, tmp_path: Path) -> None:
    picture = tmp_path / "costs.png"
    command = ("sensitivity", SPEC, *MODEL_ARGS, "--weights", world.weights, "--calib", world.data,
               "-n", 6, *HERE)  # fmt: skip
    result = run(*command, "--measure", "-o", picture)
    text = plain(result.stdout)
    assert "blocks.1.mlp.down" in text
    assert "Least sensitive per byte saved: " in text
    assert "rank correlation" in text
    assert "6 images" in text
    assert result.stderr.endswith(f"Drew {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused(*command, "-o", picture, error_code="output-exists", words=["--force"])
    run(*command, "-o", picture, "--force")
    run(*command, "-o", tmp_path / "costs.svg")


def test_sorting_and_figures(world: World) -> None:
    command = ("sensitivity", SPEC, *MODEL_ARGS, "--weights", "none", "--calib", world.data,
               "-n", 6, *HERE)  # fmt: skip
    found = figures(*command, "--keep", "0.25")
    assert found["keep"] == 0.25
    assert [r["measured"] for r in found["rows"]] == [None] * 9  # the patch embedding too
    assert found["rank_correlation"] is None
    dearest = max(found["rows"], key=lambda r: r["predicted"])["name"]
    text = plain(run(*command, "--keep", "25%", "--sort", "cost").stdout)
    assert text.splitlines()[3].startswith(dearest)
    assert figures(*command, "--keep", "25%", "--sort", "cost")["rows"][0]["name"] == dearest
    assert "rank correlation" not in text


def test_without_matplotlib_the_table_still_prints(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    picture = tmp_path / "costs.png"
    result = run(
        "sensitivity", SPEC, *MODEL_ARGS, "--weights", "none", "--calib", world.data, "-n", 4,
        *HERE, "-o", picture, code=2,
    )  # fmt: skip
    assert "blocks.0.attn.qkv" in result.stdout
    assert "needs the package matplotlib" in result.stderr
    assert "pip install 'tiedconv[demo]'" in result.stderr
    assert not picture.exists()


def test_mistakes_are_reported_in_one_line(world: World, tmp_path: Path) -> None:
    def is_refused(*options: object, code: str, words: Sequence[str] = ()) -> None:
        refused(
            "sensitivity",
            SPEC,
            *MODEL_ARGS,
            "--weights",
            "none",
            *options,
            error_code=code,
            words=words,
        )

    data = ("--calib", world.data, *HERE)
    is_refused(*data, "--keep", "150%", code="invalid-fraction", words=["150%"])
    is_refused(*data, "--keep", "half", code="invalid-fraction")
    is_refused(*data, "--bits", "7", code="invalid-bits", words=["7"])
    is_refused(*data, "--bits", "4", "--keep", "50%", code="options-conflict")
    is_refused(*data, "--sort", "name", code="unknown-sort")
    is_refused(*data, "-o", tmp_path / "costs.txt", code="unknown-picture-format")
    is_refused(*data, "-o", tmp_path / "no" / "costs.png", code="output-folder-missing")
    is_refused("--calib", tmp_path / "missing", *HERE, code="no-data-folder")
    refused("sensitivity", "resnet5000", *data, error_code="unknown-model", words=["resnet5000"])
    refused("sensitivity", world.tied, *data, error_code="already-compact")


def test_mistakes_in_python(tmp_path: Path) -> None:
    model, images = all_micros()["timm-vit"].model(), pixels(16, 2)
    with raises(UserError, "keep-out-of-range"):
        sensitivity(model, calibration(images), keep=1.0)
    with raises(NothingToConvert, "no-block-known"):
        sensitivity(nn.Linear(3, 4), calibration(images))
    with raises(UserError, "already-tied"):
        sensitivity(tiedconv.convert(model, "tied"), calibration(images))
    with pytest.raises(DataError):
        sensitivity(model, tmp_path)
    found = sensitivity(model, calibration(images))
    with pytest.raises(OutputError):
        draw(found, tmp_path / "costs.bmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(MissingExtra):
            draw(found, tmp_path / "costs.png")

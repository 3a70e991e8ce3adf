"""Block-wise calibration: units and spans, streams, fits that never harm, resumes to the bit."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import covering, slow_unless
from error_codes import raises
from micro import Micro, all_micros
from torch import Tensor, nn
from torch.utils.data import Dataset

import tiedconv
from tiedconv.calibration import (
    BlockwiseResult,
    CalibConfig,
    CalibEvent,
    Fitted,
    Fitting,
    Joint,
    blockwise,
    fit_blocks,
    fitting,
)
from tiedconv.calibration.activation_cache import Cache
from tiedconv.calibration.augmentation import corner_copies
from tiedconv.calibration.fitting import Schedule
from tiedconv.calibration.held_out import split
from tiedconv.calibration.objectives import JointObjective
from tiedconv.calibration.output_metric import _rows
from tiedconv.calibration.state import identity_of
from tiedconv.calibration.teacher_student import Pair
from tiedconv.data import Batch, Broken
from tiedconv.errors import (
    CheckpointError,
    DataError,
    OutputError,
    TiedconvError,
    TrainingError,
    UserError,
)
from tiedconv.runtime.tie import freeze, state_of
from tiedconv.training import recalibrate_batchnorm
from tiedconv.training.device import Placement

MICROS = all_micros()
CPU = Placement(torch.device("cpu"))
QUICK = {"batch_size": 8, "steps": 2, "passes": 1, "joint_steps": 0}


class Images(Dataset[Any]):
    """Images in memory; those of `broken` can't be read."""

    in_memory = True

    def __init__(self, images: Tensor, broken: tuple[int, ...] = ()) -> None:
        self.images, self.broken = images, broken

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        if index in self.broken:
            return Broken(f"image{index}.jpg", "it is broken")
        return self.images[index], -1


def images_of(micro: Micro, count: int = 16) -> Tensor:
    """Seeded inputs of a micro model."""
    parts = [micro.example(torch.Generator().manual_seed(10 + i)) for i in range(-(-count // 2))]
    return torch.cat(parts)[:count]


def pair_of(name: str, scheme: str = "lowrank", **options: Any) -> tuple[nn.Module, nn.Module]:
    """A tied model and its original, whose batch norms know the images."""
    return copy.deepcopy(_pair(name, scheme, tuple(options.items())))


@functools.cache
def _pair(name: str, scheme: str, options: tuple[tuple[str, Any], ...]) -> Any:
    teacher = MICROS[name].model()
    images = images_of(MICROS[name])
    if images.is_floating_point():
        recalibrate_batchnorm(teacher, [Batch(images, torch.zeros(len(images)))], CPU)
    return tiedconv.convert(teacher, scheme, **dict(options)), teacher


def fit(
    name: str, student: nn.Module, teacher: nn.Module, count: int = 16, **options: Any
) -> BlockwiseResult:
    """A short calibration on the CPU."""
    fields = {k: options.pop(k) for k in list(options) if k in CalibConfig.__dataclass_fields__}
    config = CalibConfig(**{**QUICK, **fields})
    data = Images(images_of(MICROS[name], count))
    return fit_blocks(student, teacher, data, config, device="cpu", **options)


def spans_of(student: nn.Module, teacher: nn.Module, images: Tensor) -> list[tuple[str, ...]]:
    """Names of the units, span by span."""
    return [s.units for s in Pair.probed(student, teacher, images, CPU).spans]


def hooks_of(model: nn.Module) -> int:
    """How many hooks hang on a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


SPANS: dict[tuple[str, str], list[tuple[str, ...]]] = {
    ("timm-vit", "tied"): [("blocks.0",), ("blocks.1",), ("blocks.2",)],
    ("timm-vit", "lors"): [("blocks.0", "blocks.1", "blocks.2")],
    # The patch embedding is a matrix of low rank too.
    ("hf-vit", "lowrank"): [("vit.embeddings",), *((f"vit.layers.{n}",) for n in range(3))],
    ("torchvision-vit", "lowrank"): [
        ("conv_proj",),
        *((f"encoder.layers.encoder_layer_{n}",) for n in range(3)),
    ],
    ("torchvision-resnet", "tied"): [("layer1.1",), ("layer2.1",), ("layer2.2",)],
    ("torchvision-resnet", "lors"): [
        ("layer1.0", "layer1.1"),
        ("layer2.0", "layer2.1", "layer2.2"),
    ],
    ("hf-resnet", "tied"): [
        ("resnet.encoder.stages.0.layers.1",),
        ("resnet.encoder.stages.1.layers.1",),
        ("resnet.encoder.stages.1.layers.2",),
    ],
    ("torch-transformer", "lors"): [
        ("transformer.encoder.layers.0", "transformer.encoder.layers.1"),
        ("transformer.decoder.layers.0", "transformer.decoder.layers.1"),
    ],
    # Its numbered modules are never called themselves.
    ("convmixer", "tied"): [(f"trunk.{n}.expand", f"trunk.{n}.project") for n in range(3)],
    # One layer is called twice.
    ("aliased", "tied"): [("",)],
    ("perceptron", "lors"): [("",)],
}


@pytest.mark.parametrize(("name", "scheme"), SPANS)
def test_units_are_residual_blocks_and_spans_share_numbers(name: str, scheme: str) -> None:
    student, teacher = pair_of(name, scheme)
    assert spans_of(student, teacher, images_of(MICROS[name])) == SPANS[name, scheme]


CALIBRATED = list(itertools.product(MICROS, ["tied", "lors"]))


@pytest.mark.parametrize(("name", "scheme"), slow_unless(CALIBRATED, covering(CALIBRATED, 0, 5)))
def test_every_model_can_be_calibrated_and_is_left_in_order(name: str, scheme: str) -> None:
    try:
        student, teacher = pair_of(name, scheme)
    except tiedconv.errors.NothingToConvert:
        pytest.skip("nothing to convert")
    pair = Pair.probed(student, teacher, images_of(MICROS[name]), CPU)
    units = [u for span in pair.spans for u in span.units]
    read = {ref for expr in state_of(student).plan.weights.values() for ref in expr.refs}
    fitted = {id(p) for span in pair.spans for p in pair.parameters(span.units)}
    assert len(set(units)) == len(units)
    assert {id(student.get_parameter(ref)) for ref in read} <= fitted
    student.train()
    next(student.parameters()).requires_grad_(False)
    modes = [m.training for m in student.modules()]
    flags = [p.requires_grad for p in student.parameters()]
    parameters = [id(p) for p in student.parameters()]
    original = copy.deepcopy(teacher.state_dict())
    result = fit(name, student, teacher)
    assert [r.units for r in result.spans] == [s.units for s in pair.spans]
    assert all(r.after <= r.before for r in result.spans)
    assert all(torch.equal(v, original[k]) for k, v in teacher.state_dict().items())
    assert not teacher.training
    assert [m.training for m in student.modules()] == modes
    assert [p.requires_grad for p in student.parameters()] == flags
    assert [id(p) for p in student.parameters()] == parameters
    assert all(p.grad is None for p in student.parameters())
    assert not hooks_of(student)
    assert not hooks_of(teacher)
    assert result.images == 16
    assert result.held_out == 4


class Stage(nn.Module):
    """Blocks, and a matrix between this stage and the next."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(blocks))
        self.down = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block((x, None))[0]
        return self.down(x)


class Residual(nn.Module):
    """A block that takes and gives a tuple, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(inplace=True), nn.Linear(64, 32))

    def forward(self, pair: tuple[Tensor, None]) -> tuple[Tensor, None]:
        x = pair[0].mul_(1.0)
        return x + self.mlp(x), None


class Staged(nn.Module):
    """Two stages of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Stage(2), Stage(2)])
        self.head = nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


@pytest.fixture
def staged() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    teacher = Staged().eval()
    return tiedconv.convert(teacher, "lowrank"), teacher, torch.randn(24, 32)


def test_a_matrix_between_blocks_does_not_make_a_unit_of_its_stage(
    staged: tuple[nn.Module, nn.Module, Tensor],
) -> None:
    student, teacher, images = staged
    units = [u for s in spans_of(student, teacher, images) for u in s]
    assert [u for u in units if ".blocks." in u] == [
        f"stages.{s}.blocks.{b}" for s in range(2) for b in range(2)
    ]
    assert not {"", "stages.0", "stages.1"} & set(units)


def test_blocks_may_take_tuples_and_write_into_their_input(
    staged: tuple[nn.Module, nn.Module, Tensor],
) -> None:
    student, teacher, images = staged
    config = CalibConfig(**QUICK)
    before = images.clone()
    result = fit_blocks(student, teacher, Images(images), config, device="cpu")
    assert torch.equal(images, before)
    again = tiedconv.convert(teacher, "lowrank")
    # The same blocks, but nothing in place: the same errors.
    for model in (again, teacher):
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
    other = fit_blocks(again, teacher, Images(images), config, device="cpu")
    assert [r.after for r in result.spans] == [r.after for r in other.spans]


class Between(nn.Module):
    """Blocks between which something is written into the tensor."""

    def __init__(self, gap: bool) -> None:
        super().__init__()
        self.gap = gap
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if self.gap:
                x.add_(1.0)
        return x


@pytest.mark.parametrize("gap", [False, True])
def test_blocks_chain_only_if_nothing_happens_between_them(gap: bool) -> None:
    torch.manual_seed(0)
    teacher = Between(gap).eval()
    pair = Pair.probed(tiedconv.convert(teacher, "lowrank"), teacher, torch.randn(8, 32), CPU)
    assert [s.units for s in pair.spans] == [("blocks.0",), ("blocks.1",)]
    assert (pair.spans[1].entry is None) == gap


def test_a_student_that_is_its_teacher_has_no_error_and_stays_as_it_is() -> None:
    student, _ = pair_of("torch-transformer", "lors")
    teacher = tiedconv.untie(copy.deepcopy(student))
    start = copy.deepcopy(student.state_dict())
    result = fit("torch-transformer", student, teacher)
    assert max(r.before for r in result.spans) < 1e-5
    assert result.kl_before < 1e-6
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, start[name], rtol=1e-2, atol=1e-3)


def test_streams_of_chained_and_unchained_units_agree() -> None:
    """The error before the second fit, by chaining, is what the network itself gives."""
    student, teacher = pair_of("torch-transformer", "tied")
    images = images_of(MICROS["torch-transformer"])
    pair = Pair.probed(student, teacher, images, CPU)
    assert [s.entry is None for s in pair.spans] == [True, False, True, False]
    with Cache(2**30) as cache, torch.no_grad():
        for index in (1, 3):
            span, last = pair.spans[index], pair.spans[index - 1]
            direct = pair.student.stream(span, images, 8, cache)
            stream = pair.student.stream(last, images, 8, cache)
            assert span.entry is not None
            chained = pair.student.advance(stream, last, span.entry, 8, cache)
            assert len(chained.tensors) == (1 if index == 1 else 2)
            for a, b in zip(direct.tensors, chained.tensors, strict=True):
                torch.testing.assert_close(a, b)


def test_more_steps_mend_more_and_the_joint_fit_lowers_the_divergence() -> None:
    student, teacher = pair_of("timm-vit", "tied")
    result = fit("timm-vit", student, teacher, count=64, steps=30, lr=0.03)
    assert all(r.after <= r.before for r in result.spans)
    assert sum(r.after for r in result.spans) < 0.95 * sum(r.before for r in result.spans)
    assert result.kl_after < result.kl_before
    joint = fit("timm-vit", student, teacher, count=64, steps=0, joint_steps=20)
    assert joint.spans == ()
    assert joint.kl_before == pytest.approx(result.kl_after)
    assert joint.kl_after < joint.kl_before


@pytest.mark.parametrize("augment", [True, False])
def test_the_whole_model_is_fitted_to_augmented_images(augment: bool) -> None:
    student, teacher = pair_of("timm-vit", "tied")
    given, new = {image.numpy().tobytes() for image in images_of(MICROS["timm-vit"])}, 0

    def note(_: nn.Module, args: tuple[Tensor]) -> None:
        nonlocal new
        if torch.is_grad_enabled():
            new += sum(image.numpy().tobytes() not in given for image in args[0])

    student.register_forward_pre_hook(note)
    fit("timm-vit", student, teacher, passes=0, joint_steps=6, augment=augment)
    assert (new > 20) is augment


@pytest.mark.parametrize(("augment", "copies"), [(True, 5), (False, 1)])
def test_an_error_is_the_mean_of_the_images_and_of_shifted_copies(
    augment: bool, copies: int
) -> None:
    student, teacher = pair_of("timm-vit", "tied")
    images = images_of(MICROS["timm-vit"], 4)
    joint = JointObjective(student, (), (), teacher, (), images, CPU, augment=augment)
    views = list(corner_copies(images))[:copies]
    with torch.no_grad():
        expected = torch.stack([divergence(student(v), teacher(v)) for v in views]).mean()
        assert joint.error(torch.arange(4)) == pytest.approx(float(expected), rel=1e-5)


def divergence(found: Tensor, expected: Tensor) -> Tensor:
    """Mean KL divergence of logits."""
    ours, theirs = found.log_softmax(-1), expected.log_softmax(-1)
    return nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def test_a_rate_far_too_high_does_no_harm() -> None:
    student, teacher = pair_of("timm-vit", "tied")
    start = copy.deepcopy(student.state_dict())
    result = fit("timm-vit", student, teacher, steps=10, lr=1e30, joint_steps=10, joint_lr=1e30)
    assert all(r.after == r.before for r in result.spans)
    assert result.kl_after == result.kl_before
    assert all(torch.equal(v, start[k]) for k, v in student.state_dict().items())


@pytest.mark.parametrize("options", [{"effort": "fast"}, {"steps": 4}])
def test_batch_norms_are_estimated_anew(options: dict[str, Any]) -> None:
    student, teacher = pair_of("torchvision-resnet", "tied")
    before = copy.deepcopy(student.state_dict())
    fields = {**options, "passes": None} if "effort" in options else options
    result = fit("torchvision-resnet", student, teacher, **fields)
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert result.kl_after < result.kl_before
    if "effort" in options:
        assert "layer2.1.bn3.running_mean" in changed
        assert all("running_" in k or "num_batches" in k for k in changed)
        assert result.spans == ()


def test_batch_norms_keep_statistics_that_are_not_those_of_the_images() -> None:
    teacher = MICROS["torchvision-resnet"].model()  # random statistics
    student = tiedconv.convert(teacher, "tied")
    result = fit("torchvision-resnet", student, teacher, steps=10, lr=0.03)
    assert all(r.after < r.before for r in result.spans)


def test_the_efforts_differ_in_passes_and_steps() -> None:
    fast, normal, thorough = (CalibConfig(effort=e) for e in ("fast", "normal", "thorough"))
    assert fast.total_passes == 0 < normal.total_passes
    assert fast.total_joint_steps(1000) == 0
    assert normal.span_steps(1000) == thorough.span_steps(1000)
    for images in (100, 1000, 10**6):
        assert normal.total_joint_steps(images) < thorough.total_joint_steps(images)
    assert CalibConfig(effort="fast", passes=1).span_steps(1000) == normal.span_steps(1000)


class Interrupt(Exception):
    """Ctrl-C."""


def steps_counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every step of a fit from now on."""
    seen: list[int] = []
    step = fitting._OptimLoop._step

    def counted(self: fitting._OptimLoop, number: int, index: Tensor) -> Tensor:
        seen.append(number)
        return step(self, number, index)

    monkeypatch.setattr(fitting._OptimLoop, "_step", counted)
    return seen


IN_THE_WHOLE = 99  # interrupted in the fit of the whole


@pytest.mark.parametrize(
    ("name", "scheme", "stop"),
    [("timm-vit", "tied", 3)]
    + [("convmixer", "tied", 0)]
    + [
        pytest.param(name, "tied", n, marks=pytest.mark.slow)
        for name, n in [
            ("timm-vit", 1),
            ("timm-vit", IN_THE_WHOLE),
            ("torchvision-resnet", IN_THE_WHOLE),
            ("torchvision-resnet", 1),
            ("convmixer", IN_THE_WHOLE),
        ]
    ],
)
def test_a_resumed_calibration_ends_with_the_same_bits(
    name: str, scheme: str, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"passes": 2, "joint_steps": 9}
    whole, teacher = pair_of(name, scheme)
    parts = copy.deepcopy(whole)
    expected = fit(name, whole, teacher, **options)
    seen: list[Fitted] = []

    def interrupt(event: CalibEvent) -> None:
        if isinstance(event, Fitted):
            seen.append(event)
            if len(seen) == stop + 1:
                raise Interrupt
        if stop == IN_THE_WHOLE and isinstance(event, Joint) and event.step == event.steps:
            raise Interrupt

    modes = [m.training for m in parts.modules()]
    with pytest.raises(Interrupt):
        fit(name, parts, teacher, **options, checkpoint_dir=tmp_path, on_event=interrupt)
    assert [m.training for m in parts.modules()] == modes
    assert all(p.requires_grad for p in parts.parameters())
    assert not hooks_of(parts)
    assert not hooks_of(teacher)
    fresh, _ = pair_of(name, scheme)
    later: list[CalibEvent] = []
    steps = steps_counted(monkeypatch)
    result = fit(
        name, fresh, teacher, **options, checkpoint_dir=tmp_path, resume=True,
        on_event=later.append,
    )  # fmt: skip
    fitted = [e for e in later if isinstance(e, Fitted)]
    if stop == IN_THE_WHOLE:
        assert steps == [9]  # eight were kept
    assert len(seen) + len(fitted) == 2 * len(expected.spans)
    assert result.spans == expected.spans
    assert (result.kl_before, result.kl_after) == (expected.kl_before, expected.kl_after)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in whole.state_dict().items())
    again, _ = pair_of(name, scheme)
    done = fit(name, again, teacher, **options, checkpoint_dir=tmp_path, resume=True)
    assert done == result
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


def test_a_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path: Path) -> None:
    student, teacher = pair_of("perceptron", "lors")
    result = fit("perceptron", student, teacher, checkpoint_dir=tmp_path / "new", resume=True)
    assert len(result.spans) == 1
    assert (tmp_path / "new" / "calibration.safetensors").exists()


def test_what_makes_a_calibration_the_same() -> None:
    student, teacher = pair_of("perceptron", "lors")
    plan = state_of(student).plan
    images = torch.randn(5, 3, 8, 8)
    same = identity_of(CalibConfig(), plan, teacher, images)
    # The last digits of a fit's error depend on the number of threads.
    groups = tuple(dataclasses.replace(g, error=0.123) for g in plan.groups)
    other_threads = dataclasses.replace(plan, groups=groups)
    assert identity_of(CalibConfig(cache_bytes=0), other_threads, teacher, images) == same
    assert identity_of(CalibConfig(), plan, teacher, images + 1)["images"] != same["images"]
    assert identity_of(CalibConfig(), plan, student, images)["weights"] != same["weights"]


def test_a_foreign_or_damaged_checkpoint_is_reported(tmp_path: Path) -> None:
    student, teacher = pair_of("perceptron", "lors")
    fit("perceptron", student, teacher, checkpoint_dir=tmp_path)
    for change in ({"seed": 3}, {"count": 14}):
        with pytest.raises(UserError) as error:
            fit("perceptron", student, teacher, checkpoint_dir=tmp_path, resume=True, **change)
        assert error.value.hint
    fit("perceptron", student, teacher, checkpoint_dir=tmp_path, resume=True, cache_bytes=0)
    other, _ = pair_of("perceptron", "lowrank")
    with raises(UserError, "state-of-other-run"):
        fit("perceptron", other, teacher, checkpoint_dir=tmp_path, resume=True)
    path = tmp_path / "calibration.safetensors"
    good = path.read_bytes()
    flipped = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in (40, len(good) - 2)]
    for content in (b"", good[:-9], b"\x00" * 64, *flipped):
        path.write_bytes(content)
        with raises(CheckpointError, "state-damaged", str(path)):
            fit("perceptron", student, teacher, checkpoint_dir=tmp_path, resume=True)


@pytest.mark.parametrize("name", ["torch-transformer", "torchvision-resnet", "convmixer"])
def test_activations_in_files_give_the_same_bits(name: str, tmp_path: Path) -> None:
    memory, teacher = pair_of(name, "tied")
    files = copy.deepcopy(memory)
    expected = fit(name, memory, teacher, joint_steps=2)
    result = fit(name, files, teacher, joint_steps=2, cache_bytes=0)
    assert result.spans == expected.spans
    assert all(torch.equal(v, files.state_dict()[k]) for k, v in memory.state_dict().items())


def test_the_cache_keeps_to_its_limit_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Cache(100) as cache:
        first = cache.make((5, 4), torch.float32)
        assert not list(tmp_path.iterdir())
        second = cache.make((5, 4), torch.float32)
        second.fill_(2.0)
        files = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert len(files) == cache.spilled == 1
        assert files[0].stat().st_size == 80
        cache.free(first)
        cache.make((5, 4), torch.float32)
        cache.free(second)
        assert cache.spilled == 1
        assert float(second.sum()) == 40.0
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_reported_and_not_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with Cache(0) as cache, raises(OutputError, "disk-full", "No space left"):
        cache.make((4,), torch.float32)


def test_broken_images_are_left_out_and_counted() -> None:
    student, teacher = pair_of("timm-vit")
    images = images_of(MICROS["timm-vit"])
    config = CalibConfig(**QUICK)
    data = Images(images, broken=(3, 9))
    result = fit_blocks(student, teacher, data, config, device="cpu")
    assert (result.images, result.skipped) == (14, 2)
    assert result.example_of_skipped is not None
    assert "image3.jpg" in result.example_of_skipped
    with pytest.raises(DataError):
        fit_blocks(student, teacher, Images(images, tuple(range(16))), config, device="cpu")


def test_labels_and_order_of_dropout_play_no_part() -> None:
    student, teacher = pair_of("torch-encoder", "tied")
    other = copy.deepcopy(student)
    state = torch.get_rng_state()
    a = fit("torch-encoder", student, teacher)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    b = fit("torch-encoder", other, teacher)
    assert a.spans == b.spans


@pytest.mark.parametrize("count", [1, 2, 3])
def test_very_few_images_are_enough(count: int) -> None:
    for name in ("timm-vit", "torchvision-resnet"):
        student, teacher = pair_of(name, "tied")
        result = fit(name, student, teacher, count=count, joint_steps=1)
        assert result.images == count
        assert all(r.after <= r.before for r in result.spans)


@pytest.mark.parametrize("count", [1, 2, 20, 32, 100, 1000])
def test_a_tenth_is_held_out_but_sixteen_where_there_are_enough(count: int) -> None:
    train, held = split(count, 0)
    expected = {1: 1, 2: 1, 20: 5, 32: 8, 100: 16, 1000: 100}[count]
    assert len(held) == expected
    if count > 1:
        assert sorted([*train.tolist(), *held.tolist()]) == list(range(count))
        assert count < 3 or not torch.equal(split(count, 1)[1], held)


def test_which_images_are_held_out_does_not_depend_on_what_can_be_read() -> None:
    train, held = split(100, 0)
    lost = [0, 7, int(held[3])]
    places = [i for i in range(100) if i not in lost]
    found = [[places[i] for i in part.tolist()] for part in split(97, 0, lost)]
    assert found == [[i for i in part.tolist() if i not in lost] for part in (train, held)]
    # Nothing that is held out can be read: others are.
    left = split(len(train), 0, held.tolist())
    assert [len(part) for part in left] == [len(part) for part in split(len(train), 0)]


def test_the_caches_of_a_student_are_dropped() -> None:
    student, teacher = pair_of("timm-vit", "lowrank")
    freeze(student)
    result = fit("timm-vit", student, teacher, steps=20, lr=0.05)
    assert all(r.after <= r.before for r in result.spans)
    assert any(r.after < r.before for r in result.spans)


def test_events_report_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiedconv.calibration.blockwise.EVENT_SECONDS", 0.0)
    student, teacher = pair_of("timm-vit", "tied")
    events: list[CalibEvent] = []
    result = fit("timm-vit", student, teacher, passes=2, joint_steps=2, on_event=events.append)
    fitting = [e for e in events if isinstance(e, Fitting)]
    assert [(e.pass_index, e.index, e.step) for e in fitting] == [
        (p, n, s) for p in range(2) for n in range(3) for s in (1, 2)
    ]
    assert {(e.count, e.steps) for e in fitting} == {(3, 2)}
    assert fitting[0].units == ("blocks.0",)
    fitted = [e for e in events if isinstance(e, Fitted)]
    assert [e.before for e in fitted[:3]] == [r.before for r in result.spans]
    assert [e.after for e in fitted[3:]] == [r.after for r in result.spans]
    assert [e.step for e in events if isinstance(e, Joint)] == [1, 2]


def wrong_calls() -> Iterator[tuple[str, Any]]:
    def untied(student: nn.Module, teacher: nn.Module, data: Any) -> None:
        fit_blocks(teacher, teacher, data)

    def same(student: nn.Module, teacher: nn.Module, data: Any) -> None:
        fit_blocks(student, student, data)

    def foreign(student: nn.Module, teacher: nn.Module, data: Any) -> None:
        fit_blocks(student, nn.Sequential(nn.Flatten(), nn.Linear(768, 7)), data)

    def nowhere(student: nn.Module, teacher: nn.Module, data: Any) -> None:
        fit_blocks(student, teacher, data, resume=True)

    def device(student: nn.Module, teacher: nn.Module, data: Any) -> None:
        fit_blocks(student, teacher, data, device="abacus")

    def empty(student: nn.Module, teacher: nn.Module, data: Any) -> None:
        fit_blocks(student, teacher, Images(torch.empty(0, 3, 16, 16)))

    for call in (untied, same, foreign, nowhere, device, empty):
        yield call.__name__, call


@pytest.mark.parametrize(("what", "call"), list(wrong_calls()))
def test_wrong_calls_are_reported_with_a_remedy(what: str, call: Any) -> None:
    student, teacher = pair_of("timm-vit", "tied")
    with pytest.raises(TiedconvError) as error:
        call(student, teacher, Images(images_of(MICROS["timm-vit"])))
    assert error.value.hint
    assert all(p.requires_grad for p in student.parameters())


def test_outputs_that_are_not_finite_are_reported() -> None:
    student, teacher = pair_of("timm-vit", "tied")
    with torch.no_grad():
        teacher.get_parameter("blocks.0.norm1.weight").fill_(torch.nan)
    with raises(TrainingError, "outputs-not-finite"):
        fit("timm-vit", student, teacher)


@pytest.mark.parametrize(
    "option",
    [
        {"effort": "lazy"}, {"batch_size": 0}, {"lr": 0.0}, {"lr": float("nan")},
        {"joint_lr": -1.0}, {"passes": -1}, {"steps": -1}, {"joint_steps": -2}, {"clip": -1.0},
        {"cache_bytes": -1}, {"amp": "on"}, {"seed": -1},
    ],
)  # fmt: skip
def test_options_out_of_range_are_reported(option: dict[str, Any]) -> None:
    with raises(UserError, "invalid-calibration-option", next(iter(option))) as error:
        CalibConfig(**option)
    assert error.value.hint


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda() -> None:
    student, teacher = pair_of("timm-vit", "tied")
    data = Images(images_of(MICROS["timm-vit"]))
    result = fit_blocks(student, teacher, data, CalibConfig(**QUICK), device="cuda")
    assert next(student.parameters()).device.type == "cuda"
    assert all(r.after <= r.before for r in result.spans)


def test_tokens_of_a_block_with_a_convolution_have_channels_last() -> None:
    tokens, image = torch.randn(2, 9, 4), torch.randn(2, 4, 3, 3)
    assert torch.equal(_rows(tokens, first=True), tokens)
    assert torch.equal(_rows(image, first=True), image.flatten(2).mT)


def test_the_learning_rate_goes_with_the_root_of_what_is_lost() -> None:
    schedule = Schedule(steps=1, lr=0.5, much=0.1, clip=1.0, batch_size=1, seed=(0,))
    rates = [schedule.lr_for(lost) for lost in (0.0, 1e-3, 0.025, 0.1, 3.0, math.inf)]
    assert rates == sorted(rates)
    assert rates[1:] == pytest.approx([0.05, 0.25, 0.5, 0.5, 0.5])
    assert rates[0] > 0


@pytest.mark.parametrize("options", [{"joint_steps": 0}, {"steps": 0, "joint_steps": 2}])
def test_the_less_is_lost_the_lower_the_learning_rate(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    """Of the fits of units, each by the error of its own, and of the whole model."""
    for name in ("MUCH", "MUCH_OF_UNIT"):
        monkeypatch.setattr(blockwise, name, 10.0)  # micro-models lose much
    used: list[float] = []
    step = fitting._OptimLoop._step

    def spied(self: Any, *given: Any) -> Tensor:
        loss = step(self, *given)
        used.append(max(group["lr"] for group in self._optimizer.param_groups))
        return loss

    monkeypatch.setattr(fitting._OptimLoop, "_step", spied)
    found = []
    for params in ("95%", "30%"):
        used.clear()
        student, teacher = pair_of("timm-vit", params=params)
        fit("timm-vit", student, teacher, augment=False, **{"steps": 2, **options})
        found.append(sum(used))
    assert found[0] < 0.7 * found[1]


def test_a_table_of_positions_makes_no_unit_of_the_whole_model() -> None:
    """Where it is stored with fewer bits, it is part of the plan, and lies beside all blocks."""
    model = MICROS["timm-vit"].model()
    tied = tiedconv.convert(copy.deepcopy(model), "auto", bytes="20%")
    plan = state_of(tied).plan
    assert "pos_embed" in plan.weights
    images = torch.stack([images_of(MICROS["timm-vit"], 2)[i] for i in range(2)])
    units = [unit for span in spans_of(tied, model, images) for unit in span]
    assert units[0] == "patch_embed"
    assert [unit for unit in units if unit.startswith("blocks.")]
    assert "" not in units


@pytest.mark.parametrize("joint_steps", [0, 20])
def test_something_was_gained_if_the_distance_that_decides_is_smaller(joint_steps: int) -> None:
    student, teacher = pair_of("timm-vit", params="60%")
    config = CalibConfig(**{**QUICK, "steps": 0, "joint_steps": joint_steps})
    images = torch.stack([images_of(MICROS["timm-vit"], 16)[i] for i in range(16)])
    held = images[split(16, config.seed)[1]]
    copies = torch.cat(list(corner_copies(held))) if joint_steps else held
    start = apart(student, teacher, copies)
    result = fit("timm-vit", student, teacher, steps=0, joint_steps=joint_steps)
    assert result.gained is (apart(student, teacher, copies) < start) is (joint_steps > 0)


@torch.no_grad()
def apart(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    """KL(teacher || student) of the class logits."""
    known, found = (model.eval()(images).log_softmax(1) for model in (teacher, student))
    return float((known.exp() * (known - found)).sum(1).mean())

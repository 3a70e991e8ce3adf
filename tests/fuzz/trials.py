"""What a mutated file does to its readers."""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cli_helpers import SIZES, SPEC
from html_pages import check
from micro import all_micros, settle
from mutations import DAMAGE, KINDS, mutated
from safetensors import safe_open
from torch import Tensor, nn
from typer.testing import CliRunner

import tiedconv
import tiedconv.sources as sources
from tiedconv.cli import app
from tiedconv.errors import TiedconvError
from tiedconv.io.checkpoint_reader import Checkpoint, read
from tiedconv.runtime.tie import dense_state_dict, set_state, state_of

SECONDS, MEGABYTES = 1.0, 200


@dataclass(frozen=True)
class Sound:
    """A sound file, and what it gives.

    Args:
        name: the model and the scheme.
        data: the file's bytes.
        digest: in its metadata.
        dense: its weights.
        model: makes an instance to load into; None if the file names its own source.
    """

    name: str
    data: bytes
    digest: str
    dense: dict[str, Tensor]
    model: Callable[[], nn.Module] | None


@dataclass
class Tally:
    """What came of many mutations."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    slowest: tuple[float, str] = (0.0, "")
    fattest: tuple[float, str] = (0.0, "")
    wrong: list[str] = field(default_factory=list)


@functools.cache
def sound_files() -> tuple[Sound, ...]:
    """Small files of several schemes and models."""
    made = [
        _sound(f"{SPEC}, {scheme}", tiedconv.convert(_tiny(), scheme, **options), None)
        for scheme, options in (("tied", {"rank": 2}), ("basis", {"tie": True}))
    ]
    for name, scheme in (("aliased", "lors"), ("torchvision-resnet", "tied")):
        build = all_micros()[name].model
        made.append(_sound(f"{name}, {scheme}", tiedconv.convert(build(), scheme), build))
    return tuple(made)


def _tiny() -> nn.Module:
    return settle(sources.open_source(SPEC, SIZES, "none")[0])


def _sound(name: str, model: nn.Module, build: Callable[[], nn.Module] | None) -> Sound:
    if build is None:  # as the command line does it
        record = sources.describe(SPEC, SIZES)[1].to_json()
        set_state(model, source=record)
    entry = {
        "step": "finetune", "data": "digits", "train_images": 9, "val_images": 3, "steps": 2,
        "teacher": "x", "top1_before": 0.5, "top1": 0.75, "held_out": True,
    }  # fmt: skip
    set_state(model, history=(*state_of(model).history, entry))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound.safetensors"
        tiedconv.save(model, path)
        digest = read(path).file.metadata["digest"]
        return Sound(name, path.read_bytes(), digest, dense_state_dict(model), build)


def attempt(kind: str, seed: int, path: Path, tally: Tally, *, show: bool) -> None:
    """Make one mutation, let every reader have it, and note what came of it.

    Args:
        kind, seed: of the mutation.
        path: where to write it.
        tally: gets the outcome.
        show: also print the report as the command does.
    """
    sound = sound_files()[seed % len(sound_files())]
    data = mutated(kind, seed, sound.data)
    path.write_bytes(data)
    what = f"{kind} {seed}"
    model: nn.Module | None = None
    loaded: nn.Module | None = None
    before: dict[str, Tensor] = {}
    try:
        with measured(tally, f"{what}, report"):
            tiedconv.report(path)
        if sound.model is not None:
            model = sound.model()
            before = {n: t.clone() for n, t in model.state_dict().items()}
        with measured(tally, f"{what}, load"):
            loaded = tiedconv.load(path, model=model)
        if model is None:
            with measured(tally, f"{what}, verify"):
                tiedconv.verify(path)
        outcome = _judged(what, path, loaded, sound, data, tally)
    except TiedconvError as error:
        outcome = f"refused ({type(error).__name__})"
        if len(str(error)) > 2000 or not str(error).isprintable():
            tally.wrong.append(f"{what}: the error can't be printed: {str(error)!r:.300}")
    if loaded is None and model is not None and not _same(model, before):
        tally.wrong.append(f"{what}: refused, but the caller's model was changed")
    tally.outcomes.setdefault(kind, Counter())[outcome] += 1
    if show:
        _show(what, path, tally)


def _judged(
    what: str, path: Path, loaded: nn.Module, sound: Sound, data: bytes, tally: Tally
) -> str:
    """Whose weights a file gives that nothing refused."""
    checkpoint = read(path)
    if not _agrees_with_safetensors(path, checkpoint):
        tally.wrong.append(f"{what}: safetensors reads other tensors")
    if data == sound.data:
        return "unchanged"
    if _same(dense_state_dict(loaded), sound.dense):
        return "harmless: the same weights"
    if checkpoint.file.metadata["digest"] == sound.digest:
        tally.wrong.append(f"{what}: other weights under the same digest")
    if what.rpartition(" ")[0] in DAMAGE:
        tally.wrong.append(f"{what}: other weights, and nothing was forged")
    return "another sound file, of another digest"


def _same(a: nn.Module | dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    own = a.state_dict() if isinstance(a, nn.Module) else a
    return own.keys() == b.keys() and all(_equal(t, b[n]) for n, t in own.items())


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def _agrees_with_safetensors(path: Path, checkpoint: Checkpoint) -> bool:
    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
        return names == checkpoint.shapes.keys() and all(
            _equal(file.get_tensor(n), checkpoint.file.tensor(n)) for n in names
        )


def _show(what: str, path: Path, tally: Tally) -> None:
    for form in ("table", "md", "csv", "json"):
        result = CliRunner().invoke(app, ["report", str(path), "--format", form])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        if result.exit_code not in (0, 2):
            tally.wrong.append(f"{what}: report --format {form} ends with {result.exit_code}")
        bad = [c for c in result.output if not (c.isprintable() or c == "\n")]
        if bad:
            tally.wrong.append(f"{what}: report --format {form} prints {bad[:5]!r}")
    with suppress(TiedconvError):
        check(tiedconv.report_page(path))


@contextmanager
def measured(tally: Tally, what: str) -> Iterator[None]:
    """Notes seconds of the processor, and how far the memory's peak rose."""
    base = _reset_peak()
    start = time.process_time()
    try:
        yield
    finally:
        seconds = time.process_time() - start
        grown = _memory("VmHWM") - base
        tally.slowest = max(tally.slowest, (round(seconds, 3), what))
        tally.fattest = max(tally.fattest, (round(grown, 1), what))
        if seconds > 3 * SECONDS:  # a machine may be slower; the benchmark holds to the limit
            tally.wrong.append(f"{what}: took {seconds:.2f} s")
        if grown > MEGABYTES:
            tally.wrong.append(f"{what}: took {grown:.0f} MB")


def _reset_peak() -> float:
    if sys.platform != "linux":
        return 0.0
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not allowed here: the peak so far hides smaller ones
        return _memory("VmHWM")
    return _memory("VmRSS")


def _memory(what: str) -> float:
    """Megabytes, from the kernel; 0 elsewhere than on Linux."""
    if sys.platform != "linux":
        return 0.0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    return 0.0


@functools.cache
def warm() -> None:
    """Import and make what is imported or made only once: that is no mutation's doing."""
    for sound in sound_files():
        if sound.model is None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "warm.safetensors"
                path.write_bytes(sound.data)
                tiedconv.verify(path)
                _show("warm", path, Tally())


def campaign(count: int, start: int = 0, *, show_every: int = 99) -> Tally:
    """`count` mutations, the kinds by turns; some reports are printed as the command does."""
    warm()
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated.safetensors"
        for i in range(start, start + count):
            show = i % show_every == 0
            attempt(KINDS[i % len(KINDS)], i // len(KINDS), path, tally, show=show)
    return tally

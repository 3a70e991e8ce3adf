"""Files that are damaged, forged, foreign or in the way: refused in words, and nothing lost."""

from __future__ import annotations

import concurrent.futures
import copy
import errno
import functools
import hashlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from error_codes import raises
from micro import all_micros
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiedconv
import tiedconv.io.checkpoint as checkpoint
from tiedconv.errors import CheckpointError, OutputError, UserError
from tiedconv.io.atomic import check_output, replacing
from tiedconv.sources.models import is_compact

NAME = "timm-vit"


@functools.cache
def model() -> nn.Module:
    return tiedconv.convert(all_micros()[NAME].model(), "lors")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound file."""
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    tiedconv.save(model(), path)
    return path


def load(path: Path) -> nn.Module:
    return tiedconv.load(path, model=all_micros()[NAME].model())


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(t, other[n]) for n, t in a.state_dict().items())


def parts(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file."""
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata()), load_file(path)


def forge(
    good: Path, path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]
) -> Path:
    """A file whose record and tensors were changed, with digests that fit."""
    metadata, tensors = parts(good)
    record = json.loads(metadata["tiedconv"])
    change(record, tensors)
    metadata["tiedconv"] = json.dumps(record)
    text = f"{metadata['tiedconv']}\n{metadata['source']}"
    metadata["digest"] = hashlib.sha256(text.encode()).hexdigest()
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata)
    return path


def rehash(record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    record["sha256"] = {n: checkpoint.tensor_hash(t) for n, t in tensors.items()}


def test_a_good_file_is_good(good: Path) -> None:
    assert same(load(good), model())
    assert is_compact(good)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with raises(CheckpointError, "file-not-found"):
            tiedconv.load(path)
        with pytest.raises(CheckpointError):
            tiedconv.report(path)
        assert not is_compact(path)


def test_a_truncated_file(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    path = tmp_path / "short.safetensors"
    for length in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError) as caught:
            load(path)
        assert caught.value.code == "file-damaged"
        assert not is_compact(path)


def test_bytes_after_the_end(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(good.read_bytes() + b"\0")
    with pytest.raises(CheckpointError):
        load(path)


def test_a_flipped_bit_in_each_tensor_is_found_and_the_tensor_named(
    good: Path, tmp_path: Path
) -> None:
    data = bytearray(good.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    path = tmp_path / "flipped.safetensors"
    for i, (name, entry) in enumerate(header.items()):
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        position = 8 + length + start + (i * 7919) % (stop - start)
        data[position] ^= 1 << (i % 8)
        path.write_bytes(data)
        data[position] ^= 1 << (i % 8)
        assert tiedconv.report(path).stored  # the head alone is sound
        with raises(CheckpointError, "tensor-damaged") as caught:
            load(path)
        assert name in str(caught.value)


@pytest.mark.slow
def test_a_flipped_bit_anywhere_is_refused_or_harmless(good: Path, tmp_path: Path) -> None:
    data = bytearray(good.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    generator = torch.Generator().manual_seed(0)
    head = torch.randint(0, header, (140,), generator=generator).tolist()
    anywhere = torch.randint(0, len(data), (60,), generator=generator).tolist()
    bits = torch.randint(0, 8, (200,), generator=generator).tolist()
    path = tmp_path / "flipped.safetensors"
    refused = 0
    for position, bit in zip([*head, *anywhere], bits, strict=True):
        data[position] ^= 1 << bit
        path.write_bytes(data)
        data[position] ^= 1 << bit
        try:
            loaded = load(path)
        except CheckpointError:
            refused += 1
        else:
            assert same(loaded, model()), (position, bit)
    assert refused >= 190


def test_someone_elses_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({"w": torch.zeros(2)}, path)
    with raises(CheckpointError, "not-compact-file"):
        tiedconv.load(path)
    save_file({"w": torch.zeros(2)}, path, {"tiedconv": "{}"})
    with pytest.raises(CheckpointError):
        tiedconv.load(path)


def swap_two(record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    a, b = "blocks.0.norm1.bias", "blocks.1.norm1.bias"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def deep(record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    expr: Any = ["ref", "x", [2, 2]]
    for _ in range(300):
        expr = ["permute", expr, [1, 0]]
    record["plan"]["weights"]["head.weight"] = expr


FORGERIES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "an extra tensor": (
        lambda r, t: t.update(extra=torch.zeros(2)) or rehash(r, t),
        "metadata-invalid",
    ),
    "a missing tensor": (
        lambda r, t: t.pop("head.bias") is None or rehash(r, t),
        "metadata-invalid",
    ),
    "a tensor of another shape": (
        lambda r, t: t.update({"head.bias": torch.zeros(3)}) or rehash(r, t),
        "metadata-invalid",
    ),
    "two tensors swapped": (swap_two, "tensor-damaged"),
    "a tensor of another type": (
        lambda r, t: t.update({"head.bias": t["head.bias"].to(torch.int32)}),
        "wrong-model",
    ),
    "no hash for a tensor": (lambda r, t: r["sha256"].pop("head.bias"), "metadata-invalid"),
    "a hash that is no text": (lambda r, t: r["sha256"].update({"head.bias": 3}), "tensor-damaged"),
    "a newer format": (lambda r, t: r.update(format=99), "format-too-new"),
    "an older format": (lambda r, t: r.update(format=0), "metadata-invalid"),
    "a format that is no number": (lambda r, t: r.update(format=True), "metadata-invalid"),
    "no plan": (lambda r, t: r.pop("plan"), "metadata-invalid"),
    "a plan that is a list": (lambda r, t: r.update(plan=[]), "malformed-plan"),
    "an expression too deep": (deep, "metadata-invalid"),
    "an expression that names code": (
        lambda r, t: r["plan"]["weights"].update({"head.weight": ["os.system", "x"]}),
        "malformed-expression",
    ),
    "a history that is a text": (lambda r, t: r.update(history="x"), "metadata-invalid"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_file_is_refused(what: str, good: Path, tmp_path: Path) -> None:
    change, code = FORGERIES[what]
    path = forge(good, tmp_path / "forged.safetensors", change)
    with raises(CheckpointError, code):
        load(path)


@pytest.mark.parametrize(
    "history",
    [[3], ["x"], [None], [[]], [{"top1": "high"}], [{"step": 3}], [{"top1": True}], [{}]],
)
def test_a_forged_history_is_refused_or_reported(
    history: list[Any], good: Path, tmp_path: Path
) -> None:
    path = forge(good, tmp_path / "f.safetensors", lambda r, t: r.update(history=history))
    try:
        report = tiedconv.report(path)
        assert report.top1 is None or 0 <= report.top1 <= 1
    except UserError:
        pass


@pytest.mark.parametrize("source", ["3", "[]", '"resnet50"', '{"spec": 3}', '{"spec": "x"}', "{"])
def test_a_forged_source_is_refused(source: str, good: Path, tmp_path: Path) -> None:
    metadata, tensors = parts(good)
    metadata["source"] = source
    text = f"{metadata['tiedconv']}\n{metadata['source']}"
    metadata["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path = tmp_path / "forged.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(UserError):
        tiedconv.load(path)


def test_a_plan_changed_without_its_digest_is_refused(good: Path, tmp_path: Path) -> None:
    metadata, tensors = parts(good)
    metadata["tiedconv"] = metadata["tiedconv"].replace('"history"', '"History"')
    save_file(tensors, tmp_path / "f.safetensors", metadata)
    with raises(CheckpointError, "plan-damaged"):
        tiedconv.report(tmp_path / "f.safetensors")


def test_loading_into_the_wrong_model_names_the_first_tensors_that_differ(good: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer

    wide = VisionTransformer(16, 8, num_classes=9, embed_dim=32, depth=3, num_heads=2)
    before = {n: t.clone() for n, t in wide.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        tiedconv.load(good, model=wide)
    message = str(caught.value)
    assert "head.bias is (7,) in the file, (9,) in the model" in message
    assert "head.weight is (7, 32) in the file, (9, 32) in the model" in message
    assert all(torch.equal(before[n], t) for n, t in wide.state_dict().items())
    with raises(CheckpointError, "wrong-model"):
        tiedconv.load(good, model=all_micros()["hf-vit"].model())


def test_a_file_of_a_model_in_memory_says_how_to_load_it(good: Path) -> None:
    with raises(UserError, "class-not-recorded"):
        tiedconv.load(good)


def test_loading_into_a_tied_model_is_refused(good: Path) -> None:
    with pytest.raises(UserError):
        tiedconv.load(good, model=copy.deepcopy(model()))


def test_saving_a_plain_model_is_refused(tmp_path: Path) -> None:
    with raises(UserError, "not-tied"):
        tiedconv.save(all_micros()[NAME].model(), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_text("mine")
    with raises(OutputError, "output-exists", "force=True"):
        tiedconv.save(model(), path)
    assert path.read_text() == "mine"
    tiedconv.save(model(), path, force=True)
    assert same(load(path), model())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_is_missing_or_stands_in_the_way(tmp_path: Path) -> None:
    with raises(OutputError, "output-folder-missing"):
        tiedconv.save(model(), tmp_path / "none" / "m.safetensors")
    with raises(OutputError, "output-is-folder"):
        tiedconv.save(model(), tmp_path, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        tiedconv.save(model(), tmp_path / "file" / "m.safetensors")


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("tiedconv.io.atomic.tempfile.mkstemp", refuse)
        with raises(OutputError, "folder-not-writable"):
            check_output(tmp_path / "m.safetensors")
    tied = model()
    with monkeypatch.context() as patch:
        patch.setattr("tiedconv.io.atomic.os.open", refuse)
        with raises(OutputError, "output-not-written"):
            tiedconv.save(tied, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError(), KeyboardInterrupt()],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    failure: BaseException, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(good.read_bytes())

    def half(file: io.RawIOBase, data: memoryview) -> None:
        file.write(data[: len(data) // 2])
        raise failure

    monkeypatch.setattr("tiedconv.io.safetensors_file.write_all", half)
    expected = OutputError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        tiedconv.save(model(), path, force=True)
    assert path.read_bytes() == good.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint.write_tensors
    monkeypatch.setattr(
        checkpoint, "write_tensors", lambda _, *rest: original(Path("/dev/full"), *rest)
    )
    with raises(OutputError, "output-not-written") as caught:
        tiedconv.save(model(), tmp_path / "m.safetensors")
    assert caught.value.code == "output-not-written"
    assert not list(tmp_path.iterdir())


def test_a_written_file_is_an_ordinary_one(tmp_path: Path) -> None:
    path = tmp_path / "m.txt"
    before = os.umask(0o027)
    try:
        with replacing(path) as part:
            assert part.name.endswith(".part")
            assert not path.exists()
            part.write_text("x")
        tiedconv.save(model(), tmp_path / "m.safetensors")
    finally:
        os.umask(before)
    for written in tmp_path.iterdir():
        assert written.stat().st_mode & 0o777 == 0o640


def test_a_symbolic_link_as_output(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("mine")
    link.symlink_to(target)
    with pytest.raises(OutputError):
        tiedconv.save(model(), link)
    assert target.read_text() == "mine"


def test_buffers_come_back_and_shared_tensors_stay_shared(tmp_path: Path) -> None:
    for name in ("torchvision-resnet", "aliased"):
        micro = all_micros()[name]
        tied = tiedconv.convert(micro.model(), "tied")
        tiedconv.save(tied, tmp_path / f"{name}.safetensors")
        loaded = tiedconv.load(tmp_path / f"{name}.safetensors", model=micro.model())
        assert same(tied, loaded)
        count = sum(p.numel() for p in loaded.parameters())
        assert count == sum(p.numel() for p in tied.parameters())


def test_other_precisions_are_kept(tmp_path: Path) -> None:
    tied = copy.deepcopy(model()).to(torch.bfloat16)
    size = tiedconv.save(tied, tmp_path / "half.safetensors")
    report = tiedconv.report(tmp_path / "half.safetensors")
    assert report.tensor_bytes == 2 * sum(p.numel() for p in tied.parameters())
    assert report.file_bytes == size
    loaded = load(tmp_path / "half.safetensors")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert same(loaded, tied)


def test_a_file_can_have_the_longest_name_there_is(tmp_path: Path) -> None:
    path = tmp_path / ("m" * 243 + ".safetensors")
    tiedconv.save(model(), path)
    assert same(load(path), model())


@pytest.mark.slow
def test_many_writers_of_one_file_and_a_reader_that_never_sees_half_of_it(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    first, second = model(), copy.deepcopy(model())
    with torch.no_grad():
        next(second.parameters()).add_(1)
    tiedconv.save(first, path)
    umask = os.umask(0o022)
    done = threading.Event()

    def write(one: nn.Module) -> None:
        while not done.is_set():
            tiedconv.save(one, path, force=True)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write, one) for one in (first, second, first)]
        try:
            seen = [load(path) for _ in range(40)]
        finally:
            done.set()
        for writer in writers:
            writer.result()
    assert all(same(one, first) or same(one, second) for one in seen)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert os.umask(umask) == 0o022  # a shared setting of the process, and as it was


def test_of_many_writers_without_force_one_wins_and_the_others_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    barrier = threading.Barrier(4)

    def write(number: int) -> str:
        try:
            with replacing(path) as part:
                part.write_text(str(number))
                barrier.wait()  # all have begun, as nothing stood there
        except OutputError as error:
            return error.what
        return str(number)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        reported = list(pool.map(write, range(4)))
    assert path.read_text() in reported
    assert sum("exists already" in what for what in reported) == 3
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


WRITER = """
import json, signal, sys
from pathlib import Path
from micro import all_micros
import tiedconv
from tiedconv.io.safetensors_file import SafetensorsFile

path = Path(sys.argv[1])
model = tiedconv.convert(all_micros()["timm-vit"].model(), "lors")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
print("ready", flush=True)
turn = 0
while True:
    try:
        while True:
            turn += 1
            if turn % 2:
                path.unlink(missing_ok=True)
            tiedconv.save(model, path, force=True)
    except KeyboardInterrupt:
        pass
    whole = not path.exists() or bool(SafetensorsFile(path).shapes)
    left = [p.name for p in path.parent.iterdir() if p != path]
    print(json.dumps([whole, left]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of this kind are those of POSIX")
def test_interrupted_writers_leave_whole_files_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    here = Path(__file__).parents[1] / "helpers"
    command = [sys.executable, "-c", WRITER, str(path)]
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        assert writer.stdout is not None
        try:
            assert writer.stdout.readline() == "ready\n"
            for i in range(40):
                time.sleep(0.003 + 0.0007 * i)
                writer.send_signal(signal.SIGINT)
                # Python drops an interrupt that comes while it frees an object: then once more.
                for _ in range(12):
                    if select.select([writer.stdout], [], [], 5)[0]:
                        break
                    writer.send_signal(signal.SIGINT)
                else:
                    pytest.fail("an interrupt was not heard")
                assert json.loads(writer.stdout.readline()) == [True, []]
        finally:
            writer.kill()  # as nobody can clean up after this, a .part may stay, and does no harm
    assert all(p == path or p.name.endswith(".part") for p in tmp_path.iterdir())
    if path.exists():
        assert same(load(path), model())
    tiedconv.save(model(), path, force=True)
    assert same(load(path), model())

"""Files from strangers: no code runs, nothing hangs, one line says what is wrong."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import MODEL_ARGS, QUICK, World, check_error, refused, run
from error_codes import raises
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiedconv
from tiedconv.cli.common import command_line
from tiedconv.commands._bench_worker import BenchTarget, make_runner
from tiedconv.commands.evaluate import open_teacher
from tiedconv.data import open_images
from tiedconv.errors import CheckpointError, OutputError, UserError, printable
from tiedconv.exporters import all_formats
from tiedconv.io.atomic import check_output
from tiedconv.io.plain_file import read_text
from tiedconv.io.run_dir import RunDir
from tiedconv.sources import Source

MODEL = ("timm:vit_tiny_patch16_224", *MODEL_ARGS)


# .pt2


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def program(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "good.pt2"
    tiedconv.export(world.tied, path)
    return path


def changed(program: Path, path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of the archive with other members."""
    with zipfile.ZipFile(program) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def pickled(thing: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def with_member(ending: str, data: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        name = next((n for n in members if n.endswith(ending)), None)
        members[name or f"{next(iter(members)).split('/')[0]}/{ending}"] = data

    return change


def with_size(text: str) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        name = next(n for n in members if n.endswith("models/model.json"))
        old = members[name].decode()
        assert "expr_str" in old
        data = json.loads(old)
        found = []

        def visit(value: Any) -> None:
            if isinstance(value, dict):
                for key in value:
                    if key == "expr_str":
                        value[key] = text
                        found.append(key)
                    else:
                        visit(value[key])
            elif isinstance(value, list):
                for item in value:
                    visit(item)

        visit(data)
        assert found
        members[name] = json.dumps(data).encode()

    return change


@pytest.mark.parametrize(
    "where", ["sample_inputs/model.pt", "data/weights/weight_0", "constants/x.pt", "extra/a.pkl"]
)
def test_a_pickle_in_an_exported_program_runs_no_code(
    world: World, program: Path, tmp_path: Path, where: str
) -> None:
    mark = tmp_path / "code-ran"
    put = with_member(where, pickled(Evil(mark)))

    def change(members: dict[str, bytes]) -> None:
        put(members)
        if where.startswith("data/weights/"):  # torch would not read it as a pickle else
            name = next(n for n in members if n.endswith("_weights_config.json"))
            members[name] = members[name].replace(b'"use_pickle": false', b'"use_pickle": true')
            assert b'"use_pickle": true' in members[name]

    evil = changed(program, tmp_path / "evil.pt2", change)
    refused("verify", world.tied, "--against", evil, error_code="file-contains-code")
    assert not mark.exists()
    with raises(CheckpointError, "file-contains-code"):
        all_formats()["pt2"].run(evil, torch.rand(2, 3, 32, 32))
    assert not mark.exists()


def test_a_pickle_in_place_of_raw_numbers_runs_no_code(program: Path, tmp_path: Path) -> None:
    mark = tmp_path / "code-ran"
    put = with_member("data/weights/weight_0", pickled(Evil(mark)))
    with pytest.raises(CheckpointError):
        all_formats()["pt2"].tensors(changed(program, tmp_path / "evil.pt2", put))
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch MARK')",
        "Symbol('s0').func.__class__",
        "eval('1')",
        "(lambda: 1)()",
        "[Symbol][0]('x')",
        "open('MARK', 'w')",
        "getattr(Symbol, 'x')",
    ],
)
def test_a_size_that_is_code_is_refused(program: Path, tmp_path: Path, text: str) -> None:
    mark = tmp_path / "mark"
    text = text.replace("MARK", str(mark))
    evil = changed(program, tmp_path / "evil.pt2", with_size(text))
    with raises(CheckpointError, "file-contains-code"):
        all_formats()["pt2"].tensors(evil)
    assert not mark.exists()


def test_objects_and_programs_in_an_archive_are_refused(program: Path, tmp_path: Path) -> None:
    for member in ("data/constants/custom_obj_0", "data/aotinductor/model/x.so"):
        evil = changed(program, tmp_path / "e.pt2", with_member(member, b"\x7fELF"))
        with raises(CheckpointError, "file-contains-code"):
            all_formats()["pt2"].tensors(evil)


def test_a_broken_program_is_one_line(
    world: World, program: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = program.read_bytes()
    for n, broken in enumerate((b"hello", data[: len(data) // 2], b"PK" + data[2:][::-1])):
        path = tmp_path / f"{n}.pt2"
        path.write_bytes(broken)
        refused("verify", world.tied, "--against", path, error_code="file-damaged")
    assert "Traceback" not in capfd.readouterr().err
    (tmp_path / "x.xml").write_text("hello")
    refused("verify", world.tied, "--against", tmp_path / "x.xml", error_code="file-damaged")


# What a file says of itself


def test_a_files_own_word_for_a_folder_or_a_repository_is_not_followed() -> None:
    for spec in ("hf:attacker/repo", "hf:/private/folder"):
        with raises(UserError, "original-unavailable", spec):
            open_teacher("auto", Source(spec, weights="default", config={}))


def test_a_file_keeps_no_path(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "o.safetensors"
    run("convert", *MODEL, "--weights", world.weights, "--scheme", "tied", f"--output={output}")
    with safe_open(output, "pt") as file:
        text = json.dumps(file.metadata())
    assert str(tmp_path) not in text
    assert str(world.root) not in text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir").mkdir()
    words = ["convert", f"hf:{tmp_path}/dir", "hf:dir", "hf:google/vit", "--calib=a/b", "../x/y"]
    monkeypatch.setattr(sys, "argv", ["tiedconv", *words])
    assert command_line() == "tiedconv convert hf:dir hf:dir hf:google/vit --calib=b y"


# Pipes, devices, names


def test_pipes_and_devices_do_not_hang(world: World, tmp_path: Path) -> None:
    pipe = tmp_path / "p.safetensors"
    os.mkfifo(pipe)
    words = ("convert", *MODEL, "-o", tmp_path / "o.safetensors")
    refused(*words, "--weights", pipe, error_code="weights-unreadable")
    refused(*words, "--weights", "/dev/zero", error_code="weights-unreadable")
    for recipe in (pipe, "/dev/zero", "/dev/null"):
        code = "recipe-malformed" if recipe == "/dev/null" else "recipe-unreadable"
        code = "recipe-unreadable"
        refused("convert", *MODEL, "--recipe", recipe, "--dry-run", error_code=code)
    index = tmp_path / "model.safetensors.index.json"
    os.mkfifo(index)
    refused(*words, "--weights", index, error_code="weights-unreadable")
    refused("verify", pipe, error_code="file-not-found")
    data = tmp_path / "data"
    for name in ("blue", "green", "red"):
        (data / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(data / name / "0.png")
    os.mkfifo(data / "red" / "1.png")
    done = run("evaluate", world.tied, "--data", data, "--workers", 0)
    assert "1.png" in done.stderr
    refused("evaluate", world.tied, "--data", data, "--workers", 0, "--strict",
            error_code="image-unreadable", words=["1.png"])  # fmt: skip


def test_text_is_read_up_to_a_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("ä" * 10, "utf-8")
    assert read_text(tmp_path / "a", 20) == "ä" * 10
    with pytest.raises(OSError, match="larger"):
        read_text(tmp_path / "a", 19)
    with pytest.raises(OSError, match="folder"):
        read_text(tmp_path, 19)


def test_names_that_are_not_utf8_or_hold_control_characters(world: World, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for part in ("train", "val"):
        for name in ("blue", "green", "red"):
            (data / part / name).mkdir(parents=True)
            for i in range(4):
                pixels = np.full((8, 8, 3), 60 * i, np.uint8)
                Image.fromarray(pixels).save(data / part / name / f"{i}.png")
    odd = os.fsencode(data / "train" / "red") + b"/caf\xe9\x1b[2J.png"
    with open(odd, "wb") as file:
        file.write(b"broken")
    words = ("--data", data, "-o", tmp_path / "o.safetensors", "--steps", 2, *QUICK)
    done = run("finetune", world.tied, *words, "--teacher", "none")
    assert "\x1b" not in done.stderr
    assert len(open_images(data).digest()) == 64


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
        ("one\ntwo", "one two"),
        ("schön 重み", "schön 重み"),
        ("\u202etxt", "\\u202etxt"),
    ],
)
def test_messages_are_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert shown in str(UserError(text))


@pytest.mark.parametrize("output", ["", "/", "."])
def test_an_output_that_is_no_file_name(world: World, output: str) -> None:
    with raises(OutputError, "output-is-folder"):
        check_output(Path(output))
    refused(
        "convert", *MODEL, "--weights", world.weights, "-o", output, error_code="output-is-folder"
    )


def program_of(*words: object) -> list[str]:
    return [sys.executable, "-m", "tiedconv", *map(str, words)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.slow
def test_a_full_standard_output_is_one_line(world: World) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            program_of("report", world.tied), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "output-not-written" in done.stderr


# Runs


def test_a_second_run_is_told_of_the_first(world: World, tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    words = ("finetune", world.tied, "--data", world.data, "-o", output, "--teacher", "none")
    with RunDir.beside(output).locked():
        for more in ([], ["--force"]):
            line = refused(*words, *more, "--steps", 1, *QUICK, error_code="run-in-progress")
            assert f"process {os.getpid()}" in line
    assert not (tmp_path / "o.safetensors.run").exists()
    run(*words, "--steps", 1, *QUICK, "--no-picture")
    assert [p.name for p in tmp_path.iterdir()] == ["o.safetensors"]


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "o.run")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom tiedconv.io.run_dir import RunDir\n"
        "with RunDir(Path(sys.argv[1])).locked():\n    print('held', flush=True)\n"
        "    time.sleep(60)"
    )
    held = subprocess.Popen([sys.executable, "-c", code, folder.path], stdout=subprocess.PIPE)
    assert held.stdout is not None
    assert held.stdout.readline() == b"held\n"
    with raises(UserError, "run-in-progress", f"process {held.pid}"), folder.locked():
        raise AssertionError
    held.kill()
    held.communicate()
    with folder.locked():
        assert folder.path.exists()
    assert not folder.path.exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
@pytest.mark.slow
def test_a_hangup_leaves_nothing_half_written(world: World, tmp_path: Path) -> None:
    words = ("finetune", world.tied, "--data", world.data, "-o", tmp_path / "o.safetensors")
    with subprocess.Popen(
        program_of(*words, "--teacher", "none", "--steps", 100_000, *QUICK),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup ignores it
    ) as process:
        folder = tmp_path / "o.safetensors.run"
        while not folder.exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGHUP)
        try:
            _, text = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGHUP, text
    assert "Traceback" not in text
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "o.safetensors").exists()


def replaced_in_place(data: Path) -> None:
    for n, path in enumerate(sorted(data.rglob("*.png"))):
        pixels = np.random.default_rng(n).integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)


def swapped(data: Path) -> None:
    for part in ("train", "val"):
        (data / part / "red").rename(data / part / "x")
        (data / part / "blue").rename(data / part / "red")
        (data / part / "x").rename(data / part / "blue")


def one_byte(data: Path) -> None:
    path = sorted((data / "train").rglob("*.png"))[0]
    with Image.open(path) as image:
        pixels = np.asarray(image).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("change", [replaced_in_place, swapped, one_byte])
def test_a_data_set_is_its_contents(
    world: World, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    import shutil

    from tiedconv.data import open_split

    data = tmp_path / "data"
    shutil.copytree(world.data, data)

    def digests() -> list[str]:
        split = open_split(data)
        return [split.train.digest(), split.val.digest()]

    before = digests()
    moved = tmp_path / "elsewhere"
    shutil.copytree(data, moved)
    assert [p.digest() for p in (open_split(moved).train, open_split(moved).val)] == before
    change(data)
    assert digests() != before


def test_batch_norm_with_one_value_is_one_line(world: World, tmp_path: Path) -> None:
    file = tmp_path / "r.safetensors"
    run("convert", "resnet18", "--weights", "none", "--model-arg", "num_classes=3",
        "--scheme", "shared", "--option", "groups=adjacent:2", "-o", file)  # fmt: skip
    words = ("finetune", file, "--data", world.data, "-o", tmp_path / "o.safetensors")
    more = ("--teacher", "none", "--steps", 2, "--image-size", 32, "--workers", 0)
    done = run(*words, *more, "--batch-size", 1, code=2)
    check_error(done.stderr.splitlines()[-1], "batch-too-small", ["--batch-size"])
    assert not (tmp_path / "o.safetensors").exists()


def test_a_damaged_weights_index_names_what_is_wrong(world: World, tmp_path: Path) -> None:
    save_file(load_file(world.weights), tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    words = ("convert", *MODEL, "-o", tmp_path / "o.safetensors", "--weights", index)
    refused(*words, error_code="shards-inconsistent", words=["x"])


def test_sizes_too_many_to_look_at_are_not_loaded(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiedconv.exporters._pt2_safety._MOST_JSON", 10)
    with raises(CheckpointError, "file-damaged", "larger than 10 bytes"):
        all_formats()["pt2"].tensors(program)


def test_memory_is_measured_of_a_program_that_was_looked_at(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiedconv.exporters._pt2_safety._MOST_JSON", 10)
    with raises(CheckpointError, "file-damaged", "larger than 10 bytes"):
        make_runner(BenchTarget(str(program), "pt2"))

"""Tar shards: what the package reads of them, what is refused, and the cached index."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import contents, encoded, expected, pictures, sample, write_tar, written
from error_codes import raises

from tiedconv.cli.command import guarded
from tiedconv.data import open_images, open_split
from tiedconv.data.layouts import _tar_index
from tiedconv.errors import DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# --- shards ------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_the_index_holds_what_the_package_reads(tmp_path: Path, style: int) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    files = [
        ("__meta__/x.txt", b"skipped"),
        ("README", b"no key"),
        ("._0000.png", b"of another system"),
        *sample("0000", 3, b"first"),
        *sample("folder.d/0000", 4, b"x" * 512),
        *sample(f"{'long' * 20}/{'name' * 15}", 5, b"y" * 513),
        ("upper.PNG", b"z"),
        ("upper.json", b'{"label": 6}'),
        ("upper.pth", b"never opened"),
    ]
    if style != tarfile.USTAR_FORMAT:
        files += sample("é" * 150, 7, b"beyond")
    path = write_tar(tmp_path / "a.tar", files, style)
    with open(path, "rb") as stream:
        read = tar_file_expander([{"url": str(path), "stream": stream}])
        theirs = {sample["__key__"]: sample["png"] for sample in group_by_keys(read)}
    images = open_images(path)
    assert [images.open(at).read() for at in range(len(images))] == list(theirs.values())  # type: ignore[union-attr]
    assert images.labels is not None
    assert images.labels.tolist() == [3, 4, 5, 6, 7][: len(images)]
    assert images.name(0) == f"{path}/0000.png"


def test_what_the_packages_writer_wrote(tmp_path: Path) -> None:
    import webdataset

    with webdataset.ShardWriter(str(tmp_path / "own-%03d.tar"), maxcount=4, verbose=0) as writer:
        for key, label, image in pictures("train"):
            writer.write({"__key__": key, "png": image, "cls": label})
    for spec in (tmp_path, tmp_path / "own-{000..004}.tar", tmp_path / "own-*.tar"):
        images = open_images(spec)
        assert contents(images) == expected("train")
        assert images.classes == ("0", "1", "2")


def test_named_shards_are_all_that_is_read(tmp_path: Path) -> None:
    root = Path(written(tmp_path, "shards"))
    split = open_split(root / "train-{000000..000001}.tar")
    assert split.held_out
    assert len(split.train) + len(split.val) == 14
    assert len(open_images(root / "train-000002.tar")) == 5
    both = open_split(str(root / "{train,val}-000000.tar"))
    assert (len(both.train), len(both.val), both.held_out) == (7, 7, False)


def test_validation_may_lack_the_last_classes(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", [f for p in pictures("train") for f in sample(*p)])
    write_tar(tmp_path / "test.tar", sample("a", 1, encoded(0, 1)))
    split = open_split(tmp_path)
    assert split.classes == split.val.classes == ("0", "1", "2")


def test_shards_without_labels(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{k}.png", i) for k, _, i in pictures("train")])
    with raises(DataError, "no-labels", ".cls or .json members", "distill_weight=1"):
        open_split(path)
    assert not open_split(path, labels="optional").labelled


def test_the_index_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = written(tmp_path, "shards")
    first = contents(open_split(spec).train)
    kept = list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.npy"))
    assert len(kept) == 2

    def forbidden(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(_tar_index, "_read", forbidden)
    assert contents(open_split(spec).train) == first
    os.utime(Path(spec) / "train-000000.tar")
    with pytest.raises(AssertionError, match="read again"):
        open_split(spec)
    monkeypatch.undo()
    kept[0].write_bytes(b"damaged")
    assert contents(open_split(spec).train) == first


def test_a_long_reading_is_reported_by_commands_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_tar_index, "_LOG_SECONDS", 0.0)
    spec = written(tmp_path, "shards")
    shards = len(list(Path(spec).glob("train-*.tar")))

    def opening() -> None:
        open_split(spec)

    guarded(opening)()
    reported = capsys.readouterr().err
    assert f"shard {shards} of {shards}" in reported
    guarded(opening)()  # it lies in the cache
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    open_split(spec)  # a program that imports the package decides what it hears
    assert capsys.readouterr().err == ""


def _tar(*files: tuple[str, bytes]) -> Callable[[Path], object]:
    return lambda path: write_tar(path, files)


def _cut(count: int) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        files = [*sample("a", 0, b"x" * 2000), *sample("b", 1, b"y" * 2000)]
        write_tar(path, files, tarfile.GNU_FORMAT)
        path.write_bytes(path.read_bytes()[:count])

    return write


def _scribbled(path: Path) -> None:
    write_tar(path, [*sample("a", 0, b"x"), *sample("b", 1, b"y")], tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    content[2 * 1024 + 3] ^= 1  # in the name of the third file
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("write", "code", "words"),
    [
        (_tar(("a.png", b""), ("a.png", b"")), "duplicate-key", ["a.png"]),
        (_tar(("a.png", b""), ("b.png", b""), ("a.cls", b"0")), "duplicate-key", ["key a "]),
        (_tar(*sample("a", 0, b""), ("b.png", b"")), "mixed-labels", ["sample b of", " no label"]),
        (_tar(("b.png", b""), *sample("a", 0, b"")), "mixed-labels", ["sample a of", " a label"]),
        (_tar(("a.cls", b"0")), "invalid-sample", ["sample a of", "no image", "cls"]),
        (_tar(("a.b.png", b""), ("a.cls", b"0")), "invalid-sample", ["b.png, cls"]),
        (_tar(("a.png", b""), ("a.jpg", b"")), "invalid-sample", ["several images", "jpg, png"]),
        (_tar(("a.png", b""), ("a.cls", b"cat")), "invalid-label", ["sample a ", "'cat'"]),
        (_tar(("a.png", b""), ("a.cls", b"1700000000")), "invalid-label", ["999,999"]),
        (_tar(("a.png", b""), ("a.cls", b"9" * 5000)), "invalid-label", []),
        (_tar(("a.png", b""), ("a.cls", b"-1")), "invalid-label", ["is -1"]),
        (_tar(("a.png", b""), ("a.json", b'{"label": "x"}')), "invalid-label", ["is 'x'"]),
        (_tar(("a.png", b""), ("a.json", b"[" * 100_000)), "invalid-label", []),
        (_tar(), "no-images", []),
        (_cut(6000), "shard-damaged", []),
        (_cut(1024 + 512 + 300), "shard-damaged", []),
        (_cut(0), "shard-damaged", []),
        (lambda path: path.write_bytes(b"PK" + bytes(range(256)) * 8), "shard-damaged", []),
        (_scribbled, "shard-damaged", []),
        (lambda path: path.mkdir(), "shards-missing", []),
    ],
)  # fmt: skip
def test_shards_that_will_not_do(
    tmp_path: Path, write: Callable[[Path], object], code: str, words: list[str]
) -> None:
    write(tmp_path / "x.tar")
    with raises(DataError, code, "x.tar", *words):
        open_images(tmp_path / "x.tar")


@pytest.mark.parametrize("at", range(512, 10240, 512))
def test_a_cut_is_always_seen(tmp_path: Path, at: int) -> None:
    _cut(at)(tmp_path / "x.tar")
    if at > 7168:  # both samples and a block of the end mark are there
        assert len(open_images(tmp_path / "x.tar")) == 2
        return
    with raises(DataError, "shard-damaged"):
        open_images(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("none.tar", "shards-missing", ["none.tar"]),
        ("a-{0..9}.tar", "shards-missing", ["and 5 more", "10 of 10"]),
        ("a-{0..9.tar", "invalid-shard-pattern", ["a-{0..9.tar"]),
        ("a.tar.gz", "shards-compressed", ["a.tar.gz"]),
        ("https://example.org/a.tar", "shards-not-files", ["https://example.org/a.tar"]),
        ("pipe:cat a.tar", "shards-not-files", ["pipe:cat a.tar"]),
    ],
)
def test_shards_that_can_not_be_reached(
    tmp_path: Path, spec: str, code: str, words: list[str]
) -> None:
    with raises(DataError, code, *words):
        open_split(spec if ":" in spec else tmp_path / spec)


def test_a_folder_of_classes_may_hold_a_tar_file(tmp_path: Path) -> None:
    spec = written(tmp_path, "folder")
    _cut(100)(tmp_path / "folder" / "train.tar")
    assert contents(open_split(spec).train) == expected("train")


def test_class_names_must_suffice(tmp_path: Path) -> None:
    spec = written(tmp_path, "shards")
    (Path(spec) / "classes.txt").write_text("one\n")
    with raises(DataError, "too-few-class-names", " 1 ", "up to 2", "classes.txt"):
        open_split(spec)

"""Labels of data are matched to a model's outputs by name, or refused; they are never shifted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import QUICK, World, figures, refused, run
from error_codes import raises
from PIL import Image

from tiedconv.data import open_images
from tiedconv.data.class_match import match_classes, read_class_map
from tiedconv.data.images import Images
from tiedconv.errors import DataError, UserError
from tiedconv.io.checkpoint_reader import read
from tiedconv.sources import Source
from tiedconv.sources.class_names import class_names_of, imagenet_names
from tiedconv.sources.torchvision_compat import import_torchvision

import_torchvision()
import timm  # noqa: E402


def folder(root: Path, *classes: str, images: int = 2) -> Path:
    for index, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(images):
            pixel = np.full((8, 8, 3), 40 * index + i, np.uint8)
            Image.fromarray(pixel).save(root / name / f"{i}.png")
    return root


def labels_of(images: Images) -> dict[str, int]:
    """Folder name to label."""
    return {Path(images.name(i)).parent.name: images.label(i) for i in range(len(images))}


KNOWN = (("n03", "cat", "house cat"), ("n01", "Great_Dane"), ("n02", "eel"))


def test_names_decide_whatever_their_order_and_number(tmp_path: Path) -> None:
    images = open_images(folder(tmp_path, "eel", "cat"))
    matched, how = match_classes(images, KNOWN)
    assert labels_of(matched) == {"eel": 2, "cat": 0}
    assert matched.classes == ("n03", "n01", "n02")
    assert how is not None
    assert (how.how, how.classes) == ("name", 2)
    assert labels_of(images) == {"cat": 0, "eel": 1}


@pytest.mark.parametrize(
    ("name", "label"),
    [("n01", 1), ("great dane", 1), ("GREAT-DANE", 1), ("House_Cat", 0), ("eel", 2)],
)
def test_case_and_separators_make_no_difference(tmp_path: Path, name: str, label: int) -> None:
    matched, _ = match_classes(open_images(folder(tmp_path, name)), KNOWN)
    assert labels_of(matched) == {name: label}


def test_names_that_differ_in_case_alone_are_two_classes(tmp_path: Path) -> None:
    known = (("cat",), ("Cat",), ("dog",))
    matched, _ = match_classes(open_images(folder(tmp_path / "a", "Cat", "cat", "DOG")), known)
    assert labels_of(matched) == {"Cat": 1, "cat": 0, "DOG": 2}
    with raises(DataError, "classes-unmatched", "CAT"):
        match_classes(open_images(folder(tmp_path / "b", "CAT")), known)


def test_a_class_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    with raises(DataError, "classes-unmatched", "owl"):
        match_classes(open_images(folder(tmp_path / "a", "cat", "owl")), KNOWN)
    with raises(DataError, "classes-unmatched"):  # two folders of one class
        match_classes(open_images(folder(tmp_path / "b", "cat", "n03")), KNOWN)


MAPS: dict[str, tuple[str, str]] = {
    "text": ("map.txt", "eel\ncat\n\n"),
    "list": ("map.json", '["eel", "cat"]'),
    "object": ("map.json", '{"cat": 1, "eel": 0, "tabby": 1}'),
}


@pytest.mark.parametrize("form", MAPS)
def test_a_class_map_in_any_form(tmp_path: Path, form: str) -> None:
    name, text = MAPS[form]
    (tmp_path / name).write_text(text, "utf-8")
    images = open_images(folder(tmp_path / "data", "cat", "eel"))
    matched, how = match_classes(images, KNOWN, tmp_path / name)
    assert labels_of(matched) == {"eel": 0, "cat": 1}
    assert how is not None
    assert how.how == "class map"


@pytest.mark.parametrize(
    "text", ["{", '{"cat": -1}', '{"cat": "one"}', "[1, 2]", "\xff\xfe", '{"cat": true}', None]
)
def test_a_class_map_that_is_none(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "map.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with raises(UserError, "class-map-unreadable", "map.json"):
        read_class_map(path)


def test_imagenet_by_its_numbers_and_words(tmp_path: Path) -> None:
    names = imagenet_names()
    assert len(names) == 1000
    assert names[0][0] == "n01440764"
    images = open_images(folder(tmp_path, "n03028079", "n01440764", "tench, Tinca tinca"[:5] + "x"))
    with raises(DataError, "classes-unmatched", "tenchx"):
        match_classes(images, None, "imagenet")
    shutil.rmtree(tmp_path / "tenchx")
    matched, _ = match_classes(open_images(tmp_path), None, "imagenet")
    assert labels_of(matched) == {"n01440764": 0, "n03028079": 497}


def test_who_says_what_a_models_classes_are() -> None:
    model = timm.create_model("test_vit")
    published = Source("timm:test_vit", weights="default")
    assert class_names_of(published, model) == imagenet_names()
    # A file may hold weights for any thousand classes.
    assert class_names_of(Source("timm:test_vit", weights="file"), model) is None
    few = timm.create_model("test_vit", num_classes=5)
    assert class_names_of(published, few) is None
    labelled = Source("hf:x", config={"id2label": {"0": "cat", "1": "dog"}}, weights="file")
    assert class_names_of(labelled, few) == (("cat",), ("dog",))
    nameless = Source("hf:x", config={"id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    assert class_names_of(nameless, few) is None
    history = ({"step": "finetune", "classes": ["a", "b"]}, {"step": "finetune"})
    assert class_names_of(published, model, history) == (("a",), ("b",))
    names = class_names_of(Source("resnet18", weights="default"), model)
    assert names is not None
    assert {"n01440764", "tench"} <= set(names[0])
    assert len(names) == 1000


@pytest.fixture
def three(tmp_path: Path) -> Callable[..., Path]:
    def made(*names: str) -> Path:
        for part in ("train", "val"):
            folder(tmp_path / "data" / part, *names, images=8 if part == "train" else 4)
        return tmp_path / "data"

    return made


def evaluated(*words: object) -> Any:
    return figures("evaluate", *words, "--workers", 0)


@pytest.mark.slow
def test_a_part_of_the_classes_is_refused_unless_it_is_said_which(
    world: World, tmp_path: Path, three: Callable[..., Path]
) -> None:
    data = three("red", "blue")
    refused(
        "evaluate", world.tied, "--data", data, error_code="classes-unmatched", words=["2", "3"]
    )
    tune = ("finetune", world.tied, "--data", data, "-o", tmp_path / "o.safetensors", *QUICK)
    refused(*tune, "--teacher", "none", error_code="classes-unmatched")
    assert not (tmp_path / "o.safetensors").exists()
    (tmp_path / "map.json").write_text(json.dumps({"red": 2, "blue": 0}), "utf-8")
    whole = evaluated(world.tied, "--data", data, "--class-map", tmp_path / "map.json")
    first = evaluated(world.tied, "--data", data, "--class-map", "position")
    assert whole["classes"] == first["classes"] == 2
    assert whole["result"]["loss"] != first["result"]["loss"]


@pytest.mark.slow
def test_a_val_that_lacks_a_class_is_refused(world: World, three: Callable[..., Path]) -> None:
    data = three("blue", "green", "red")
    evaluated(world.tied, "--data", data)
    shutil.rmtree(data / "val" / "green")
    refused("evaluate", world.tied, "--data", data, error_code="classes-unmatched")
    (data / "val" / "green").mkdir()
    evaluated(world.tied, "--data", data)


def test_what_a_finetuning_learned_is_known_afterwards(
    world: World, tmp_path: Path, three: Callable[..., Path]
) -> None:
    data, output = three("blue", "green", "red"), tmp_path / "o.safetensors"
    words = ("--data", data, "-o", output, "--teacher", "none", "--steps", 2, *QUICK)
    run("finetune", world.tied, *words)
    assert read(output).history[-1]["classes"] == ["blue", "green", "red"]
    shutil.rmtree(data / "val" / "blue")
    found = evaluated(output, "--data", data)
    assert found["classes"] == 2
    # The same images under the labels of all three classes.
    (data / "val" / "blue").mkdir()
    assert evaluated(output, "--data", data)["result"]["loss"] == found["result"]["loss"]
    shutil.move(data / "val" / "red", data / "val" / "pink")
    refused("evaluate", output, "--data", data, error_code="classes-unmatched", words=["pink"])


def test_numbers_sorted_as_text_are_said(world: World, three: Callable[..., Path]) -> None:
    data = three("1", "10", "9")
    done = run("evaluate", world.tied, "--data", data, "--workers", 0)
    assert "1 is not label 1" in done.stderr
    other = three_named(data.parent / "plain", "a", "b", "c")
    assert "not label" not in run("evaluate", world.tied, "--data", other, "--workers", 0).stderr


def three_named(root: Path, *names: str) -> Path:
    return folder(root, *names)

"""The page of a report: alone, accessible, complete; and no text of a file is ever markup."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import MISSING, browser
from calibration_helpers import images_of
from cli_helpers import QUICK, World, figures, files_of, refused, run
from error_codes import raises
from html_pages import Page, check
from hypothesis import example, given, settings
from hypothesis import strategies as st
from micro import all_micros
from mutations import Parts, pack, unpack
from torch.utils.data import TensorDataset

import tiedconv
from tiedconv.calibration.config import CalibConfig
from tiedconv.conversion.calibrate import Calibration
from tiedconv.errors import CheckpointError, DataError, OutputError, TiedconvError, UserError
from tiedconv.loggers import read_log
from tiedconv.loggers.log import FORMAT
from tiedconv.pages.curves import BOTTOM, LEFT, RIGHT, TOP, curves_of
from tiedconv.pages.facts import FileFacts, facts_of
from tiedconv.pages.page import check_page, write_page
from tiedconv.pages.parts import Part
from tiedconv.pages.treemap import HEIGHT, WIDTH, treemap

GOLDEN = Path(__file__).parents[1] / "io" / "golden"
FILES = sorted(GOLDEN.glob("*.safetensors"))
TEMPLATES = Path(tiedconv.__file__).parent / "pages" / "templates"
CALIBRATED = GOLDEN / "lors-calibrated.safetensors"


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of integers, made with images, so that results are on record."""
    micro = all_micros()["timm-vit"]
    data = TensorDataset(images_of(micro.name, 24), torch.zeros(24, dtype=torch.int64))
    calib = Calibration(data, config=CalibConfig("fast"), device="cpu", workers=0)
    model = tiedconv.convert(micro.model(), "auto", bytes="30%", calib=calib)
    path = tmp_path_factory.mktemp("rounded") / "rounded.safetensors"
    tiedconv.save(model, path)
    return path


@pytest.fixture
def parts() -> Parts:
    """A sound file of two steps, taken apart."""
    found = unpack(CALIBRATED.read_bytes())
    found.record["history"].append(
        {
            "step": "finetune", "data": "photos", "train_images": 8, "val_images": 4, "steps": 2,
            "teacher": "vit", "top1": 0.5, "top1_before": 0.25, "top1_teacher": 0.75,
            "classes": ["a", "b"], "options": {"lr": 0.1}, "command": "tiedconv finetune x",
            "versions": {"tiedconv": "0.1.0"},
        }
    )  # fmt: skip
    return found


def page_of(parts: Parts, folder: Path) -> str:
    path = folder / "forged.safetensors"
    path.write_bytes(pack(parts))
    return tiedconv.report_page(path)


# What is on it.


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_a_page_stands_alone_and_shows_what_the_report_says(file: Path) -> None:
    page, report = check(tiedconv.report_page(file)), tiedconv.report(file)
    assert page.headings[0] == (1, report.model)
    for group in report.groups:
        assert any(cell.startswith(group.name) for cell in page.cells), group.name
    for figure in (f"{report.original:,}", f"{report.stored:,}"):
        assert figure in page.text
    assert f"{100 * report.file_bytes / report.original_bytes:.1f} %" in page.text
    for entry in report.history:
        assert not entry.get("command") or entry["command"] in page.text
    facts = facts_of(file)
    assert facts.sha256 in page.text
    assert all(hash in page.cells for hash in facts.hashes.values())


def test_nothing_is_claimed_that_was_not_measured() -> None:
    text = check(tiedconv.report_page(GOLDEN / "tied.safetensors")).text
    for words in ("No result is recorded", "records no result", "Not recorded", "no curve"):
        assert words in text
    assert "held-out" not in text
    assert "nats" not in text


def test_what_was_measured_leads(rounded: Path) -> None:
    (found,) = facts_of(rounded).results
    page = check(tiedconv.report_page(rounded))
    assert found.sentence in page.text
    assert re.fullmatch(
        r"The same prediction as the original on \d+\.\d % .*images\.", found.sentence
    )
    assert "KL divergence of the outputs" in page.text
    assert "by rounding to integers" in page.text
    assert "pass an instance" in page.text  # it was made from a model in memory


def test_after_a_training_its_figures_lead(parts: Parts, tmp_path: Path) -> None:
    page = check(page_of(parts, tmp_path))
    expected = "Top-1 50.00 % (before the training 25.00 %, teacher 75.00 %) on 4 images of photos."
    assert expected in page.text
    assert [text for level, text in page.headings if level == 3] == [
        "1. Converted",
        "2. Fine-tuned",
    ]


def test_bytes_of_parts_add_up_to_the_file(rounded: Path) -> None:
    for file in [*FILES, rounded]:
        facts = facts_of(file)
        whole = sum(part.stored for part in facts.parts) + facts.overhead
        assert whole == pytest.approx(facts.report.file_bytes)
        assert sum(part.original for part in facts.parts) == facts.report.original_bytes


def test_bits_and_ranks_of_layers_are_those_of_the_plan() -> None:
    facts = facts_of(CALIBRATED)
    assert facts.layers is not None
    assert facts.layers.layers == (0, 1, 2)
    assert facts.layers.left_out == 0
    rows = dict(facts.layers.rows)
    assert {cell.ranks for cell in rows["blocks.*.attn.qkv"] if cell} == {(1,)}
    ranks = {cell.ranks for cell in rows["blocks.*.mlp.fc2"] if cell}
    assert ranks == {(4,), (5,)}
    stored = {p.name: p for p in facts.parts}["blocks.*.attn.qkv"]
    bits = [cell.bits for cell in rows["blocks.*.attn.qkv"] if cell]
    assert sum(bits) / len(bits) == pytest.approx(8 * 512 * 4 / 2304)  # 512 of 2,304, as floats
    assert stored.modules == 3


def test_widths_of_integers_are_shown(rounded: Path) -> None:
    facts = facts_of(rounded)
    assert any(part.bits for part in facts.parts)
    text = check(tiedconv.report_page(rounded)).cells
    shown = [" bit" in cell for cell in text]
    assert any(shown)


def test_the_licence_is_the_one_given() -> None:
    assert "apache-2.0" in check(tiedconv.report_page(CALIBRATED, license="apache-2.0")).text


def test_a_page_is_the_same_each_time() -> None:
    assert tiedconv.report_page(CALIBRATED) == tiedconv.report_page(CALIBRATED)


# Side by side.


def test_files_side_by_side(parts: Parts, tmp_path: Path) -> None:
    page_of(parts, tmp_path)
    files = [CALIBRATED, tmp_path / "forged.safetensors"]
    page = check(tiedconv.report_page(*files))
    names = [file.name for file in files]
    assert [text for level, text in page.headings if level == 2] == ["Comparison", *names]
    assert page.cells[1:3] == names
    at = page.cells.index("Top-1")
    assert [cell.strip() for cell in page.cells[at + 1 : at + 3]] == [
        "not recorded", "50.00 %4 images of photos",
    ]  # fmt: skip
    assert "models of the same parts" in page.text
    maps = [a for a in page.named("svg") if a["class"] == "map"]
    assert len(maps) == 3 + 2 * 2  # all on one scale, then both files by themselves


def test_files_of_different_models_have_no_table_of_parts_in_common() -> None:
    page = check(tiedconv.report_page(*FILES))
    assert page.headings[0] == (1, f"{len(FILES)} compact models")
    assert "models of different parts" in page.text
    assert "models of the same parts" not in page.text


# No text of a file is markup.

HOSTILE = "<script>alert(1)</script>\"'&<b>{{ 7 * 7 }}{% raw %}&amp;--></style><svg onload=x>"
printable = st.text("<>&\"'/`={}%#-! aé\u4e2d\U0001f600;:", min_size=1, max_size=30).filter(
    lambda text: text.isprintable() and text.strip()
)


def filled(parts: Parts, text: str) -> None:
    """Put a text wherever a file has one that is its own choice."""
    parts.source.update(spec=text, weights_name=text.replace("/", ""), versions={text: text})
    first, second = parts.record["history"]
    first["recipe"]["rules"] = [{"scheme": text, text: text}]
    first["recipe"]["params"] = text
    first["calibration"].update(
        effort=text, agreement={"compares": text, "mean": 0.5, "images": 3, "counts": True}
    )
    first["calibration"]["blocks"] = [[[text], 0.5, 0.25]]
    second.update(
        data=text, teacher=text, command=text, classes=[text], versions={text: text}, more=text
    )
    for group in parts.record["plan"]["groups"]:
        group["scheme"] = "s" + text.replace(".", "")


@given(printable)
@example(HOSTILE)
@settings(max_examples=10)
def test_no_text_of_a_file_is_ever_markup(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    def made(words: str) -> Page:
        parts = next(_two_steps())
        filled(parts, words)
        return check(page_of(parts, tmp_path_factory.mktemp("page")))

    harmless, page = made("harmless"), made(text)
    assert [name for name, _ in page.tags] == [name for name, _ in harmless.tags]
    assert page.headings[0] == (1, text)
    assert page.text.count(text) >= 8


def _two_steps() -> Iterator[Parts]:
    while True:
        found = unpack(CALIBRATED.read_bytes())
        more = {"step": "finetune", "train_images": 8, "val_images": 4, "steps": 2, "top1": 0.5}
        found.record["history"].append(more)
        found.record["history"][0]["calibration"] = {"images": 3}
        yield found


some_keys = st.sampled_from(["images", "agreement", "mean", "compares", "<i>"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.sampled_from(["", "<b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(some_keys, inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from(["calibration", "rounding", "symmetries", "versions", "command", "recipe",
                     "data", "top1", "similarity", "step", "blocks"]),
    anything,
    st.booleans(),
)  # fmt: skip
@settings(max_examples=25)
def test_a_history_of_anything_is_shown_or_refused(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any, inner: bool
) -> None:
    parts = next(_two_steps())
    for entry in parts.record["history"]:
        if inner:
            entry["calibration"] = {"images": 3, key: value, "agreement": value, "kl_after": value}
            entry["rounding"] = {"cost": value, "fit_cost": value}
        else:
            entry[key] = value
    try:
        html = page_of(parts, tmp_path_factory.mktemp("page"))
    except TiedconvError as error:
        assert error.hint  # noqa: PT017
    else:
        check(html)


def test_a_source_that_no_model_can_be_built_from_is_refused(parts: Parts, tmp_path: Path) -> None:
    parts.source["preprocess"] = {"size": "<b>"}
    with pytest.raises(CheckpointError):
        page_of(parts, tmp_path)


def test_templates_trust_no_text() -> None:
    for template in TEMPLATES.glob("*.html"):
        assert not re.search(r"\bsafe\b|autoescape|Markup", template.read_text("utf-8"))


# Its pictures.


@given(st.lists(st.floats(0.1, 1e9), min_size=1, max_size=12), st.floats(1, 10))
def test_a_treemap_has_areas_as_large_as_the_bytes(sizes: list[float], room: float) -> None:
    parts = [Part(f"p{i}", 1, 1, size, size) for i, size in enumerate(sizes)]
    largest = sum(sizes) * room
    boxes = treemap(parts, stored=False, largest=largest)
    assert len(boxes) == len(parts)
    for box in boxes:
        share = box.part.original / largest
        assert box.width * box.height == pytest.approx(share * WIDTH * HEIGHT, rel=1e-3, abs=1e-3)
        assert -1e-6 <= box.x <= box.x + box.width <= WIDTH + 1e-3
        assert -1e-6 <= box.y <= box.y + box.height <= HEIGHT + 1e-3
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            across = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
            along = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
            assert min(across, along) < 1e-3


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_from_their_ground() -> None:
    """WCAG 2.2 AA: 4.5 for text, in light, in dark and on paper."""
    css = (TEMPLATES / "style.css").read_text("utf-8")
    roots = re.findall(r":root \{(.*?)\n\s*\}", css, re.DOTALL)
    assert len(roots) == 3
    for root in roots:
        colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", root))
        for ground in ("ground", "card"):
            for ink in ("ink", "soft", "accent-ink"):
                assert contrast(colour[ink], colour[ground]) >= 4.5, (ink, ground)
        for part in range(10):
            assert contrast(colour["on-part"], colour[f"p{part}"]) >= 4.5, part
        heat = [int(n) for n in re.findall(r"--heat: (\d+), (\d+), (\d+);", root)[0]]
        for share in map(float, re.findall(r"rgba\(var\(--heat\), ([\d.]+)\)", css)):
            card = [int(colour["card"][i : i + 2], 16) for i in (1, 3, 5)]
            mixed = [round(share * h + (1 - share) * c) for h, c in zip(heat, card, strict=True)]
            assert contrast(colour["ink"], "#" + "".join(f"{c:02x}" for c in mixed)) >= 4.5


# The log of a training.


def log_of(folder: Path, *lines: object, output: str = "forged.safetensors") -> Path:
    path = folder / "run.jsonl"
    start = {"event": "start", "step": 0, "format": FORMAT, "output": output}
    path.write_text("".join(json.dumps(line) + "\n" for line in [start, *lines]), "utf-8")
    return path


def steps_of(count: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"event": "baseline", "step": 0, "top1": 0.5}]
    lines.append({"event": "teacher", "step": 0, "top1": 0.75})
    lines += [{"event": "step", "step": i, "loss": 2.0 / i, "lr": 0.1} for i in range(1, count + 1)]
    return [*lines, {"event": "epoch", "step": count, "epoch": 1, "loss": 1.0, "top1": 0.7}]


def test_curves_are_those_of_the_log(parts: Parts, tmp_path: Path) -> None:
    page_of(parts, tmp_path)
    log = log_of(tmp_path, *steps_of(50))
    page = check(tiedconv.report_page(tmp_path / "forged.safetensors", logs=[log]))
    assert len([a for a in page.named("svg") if a["class"] == "curve" and "role" in a]) == 2
    for words in ("Training loss", "Top-1, %", "teacher 75.00", "before 50.00", "after 70.00"):
        assert words in page.text
    assert "From the log run.jsonl" in page.text


@given(st.lists(st.tuples(st.integers(0, 10**9), st.floats(allow_nan=False, allow_infinity=False))))
@settings(max_examples=40)
def test_curves_stay_within_their_picture(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, float]]
) -> None:
    lines = [{"event": "step", "step": s, "loss": loss, "lr": 0.1} for s, loss in steps]
    lines += [{"event": "epoch", "step": s, "epoch": 1, "loss": x, "top1": x} for s, x in steps]
    found = read_log(log_of(tmp_path_factory.mktemp("log"), *lines))
    for curve in curves_of(found):
        assert len(curve.up) <= 8
        assert len(curve.across) <= 8
        for line in curve.lines:
            assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in line.points)


log_keys = st.sampled_from(["event", "step", "loss", "lr", "epoch", "top1"])
log_values = st.sampled_from(["step", "epoch", "baseline", "teacher", 3, -1, None, 0.5, True, "x"])


@given(st.lists(anything | st.dictionaries(log_keys, log_values)))
@settings(max_examples=40)
def test_a_log_of_anything_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Any]
) -> None:
    curves_of(read_log(log_of(tmp_path_factory.mktemp("log"), *lines)))


def test_a_log_cut_short_by_a_kill_is_read_up_to_there(tmp_path: Path) -> None:
    log = log_of(tmp_path, *steps_of(5))
    log.write_bytes(log.read_bytes()[:-10])
    assert len(read_log(log).course.points) == 5


def test_logs_that_do_not_belong_here_are_refused(parts: Parts, tmp_path: Path) -> None:
    other = log_of(tmp_path, output="other.safetensors")
    with raises(UserError, "log-of-another-run", "other.safetensors"):
        tiedconv.report_page(CALIBRATED, logs=[other])
    with raises(DataError, "not-a-log", CALIBRATED.name):
        read_log(CALIBRATED)
    with raises(DataError, "log-unreadable", "nowhere"):
        read_log(tmp_path / "nowhere")
    with raises(UserError, "no-file-given"):
        tiedconv.report_page()


# The command.


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert out.name in run("report", CALIBRATED, "-o", out).stdout
    assert out.read_text("utf-8") == tiedconv.report_page(CALIBRATED)
    both = figures("report", CALIBRATED, "-o", out, "--force")
    assert both == figures("report", CALIBRATED)
    assert files_of(tmp_path) == {"report.html"}


def test_what_the_command_refuses(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    command = ("report", CALIBRATED)
    refused(*command, "-o", tmp_path / "report.pdf", error_code="unknown-page-format")
    refused(*command, "-o", tmp_path / "no" / "a.html", error_code="output-folder-missing")
    refused(*command, "-o", out, "--format", "md", error_code="options-conflict")
    refused(*command, "-o", out, "--all-groups", error_code="options-conflict")
    refused(*command, "--license", "mit", error_code="needs-output")
    refused("report", tmp_path / "none.safetensors", "-o", out, error_code="file-not-found")
    assert files_of(tmp_path) == set()
    out.write_text("mine")
    refused(*command, "-o", out, error_code="output-exists")
    assert out.read_text() == "mine"
    refused(
        "report", out, "-o", out, "--force", error_code="output-paths-collide", words=[out.name]
    )


def test_a_page_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.htm"
    check_page(out)
    monkeypatch.setattr(Path, "write_bytes", _no_space)
    with raises(OutputError, "output-not-written"):
        write_page("<p>", out)
    assert files_of(tmp_path) == set()


def _no_space(path: Path, data: bytes) -> int:
    raise OSError(28, "No space left on device")


def test_a_training_and_its_page(world: World, tmp_path: Path) -> None:
    tuned, log, out = tmp_path / "t.safetensors", tmp_path / "log.jsonl", tmp_path / "t.html"
    run(
        "finetune", world.tied, "--data", world.data, "-o", tuned, *QUICK, "--teacher",
        world.weights, "--epochs", 2, "--log", log, "--no-picture",
    )  # fmt: skip
    run("report", tuned, "-o", out, "--log", log)
    page = check(out.read_text("utf-8"))
    entry = tiedconv.report(tuned).history[-1]
    for name in ("top1", "top1_before", "top1_teacher"):
        assert f"{100 * entry[name]:.2f} %" in page.text
    assert "Training loss" in page.text
    assert str(tmp_path) not in page.text


# What it says to do.


def lines_to_run(page: Page) -> Callable[[str], str]:
    return lambda start: next(text for text in page.texts if text.startswith(start))


@pytest.mark.slow
def test_the_lines_that_load_it_run(world: World, tmp_path: Path) -> None:
    file = tmp_path / "a b's.safetensors"
    file.write_bytes(world.tied.read_bytes())
    text = lines_to_run(check(tiedconv.report_page(file)))
    python = [sys.executable, "-c", text("import tiedconv")]
    assert "trust_code" not in python[-1]
    subprocess.run(python, cwd=tmp_path, check=True, timeout=120)
    shell = re.sub(
        "^tiedconv", f"{sys.executable} -m tiedconv", text("tiedconv verify"), flags=re.M
    )
    subprocess.run(
        shell, cwd=tmp_path, check=True, shell=True, timeout=300, stdout=subprocess.DEVNULL
    )
    assert (tmp_path / "a b's.onnx").exists()


def test_a_file_that_names_a_function_is_loaded_with_consent() -> None:
    text = lines_to_run(check(tiedconv.report_page(GOLDEN / "lors-adaptive.safetensors")))
    assert "trust_code=True" in text("import tiedconv")
    assert text("tiedconv verify").count("--trust-code") == 2


def test_every_fact_is_shown_somewhere() -> None:
    """A fact that no template reads is left-over work."""
    templates = "".join(path.read_text("utf-8") for path in TEMPLATES.glob("*.html"))
    for name in [*FileFacts.__dataclass_fields__, "share", "bits", "results", "schemes"]:
        assert re.search(rf"\bf\.{name}\b|facts\.{name}\b", templates), name


# In a browser.


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=MISSING or "there")
def test_a_browser_shows_it_at_any_width_without_complaint(
    rounded: Path, parts: Parts, tmp_path: Path
) -> None:
    filled(parts, HOSTILE)
    (tmp_path / "hostile.html").write_text(page_of(parts, tmp_path), "utf-8")
    log = log_of(tmp_path, *steps_of(200))
    one, many = tmp_path / "one.html", tmp_path / "many.html"
    del parts.record["history"][1]["more"]
    tuned = tmp_path / "forged.safetensors"
    one.write_text(tiedconv.report_page(tuned, logs=[log]), "utf-8")
    many.write_text(tiedconv.report_page(*FILES, rounded), "utf-8")
    with browser() as window:
        for page in (one, many, tmp_path / "hostile.html"):
            for width in (390, 1200):
                for dark in (False, True):
                    window.open(page, width, dark=dark)
                    wide, there = window.run(
                        "[document.documentElement.scrollWidth, window.innerWidth]"
                    )
                    assert wide <= there == width, (page.name, width)
                    assert window.console() == []
                    # The policy lets the style through, and what it says holds.
                    ground = window.run("getComputedStyle(document.body).backgroundColor")
                    assert ground == ("rgb(20, 23, 26)" if dark else "rgb(251, 251, 249)")
            assert window.run("document.scripts.length") == 0
            pdf = window.pdf()
            assert pdf.startswith(b"%PDF-")
            assert len(pdf) > 20_000

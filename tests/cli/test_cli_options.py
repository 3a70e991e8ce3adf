"""Options that all commands have: how much is said, and arguments of a model."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

import pytest
import typer
from cli_helpers import SIZES, SPEC, World, check_error, figures, refused, run, tiny_model
from error_codes import raises

import tiedconv
from tiedconv.cli import app
from tiedconv.cli.command import RENAMED
from tiedconv.errors import UserError

PLAN = ("convert", SPEC, "--scheme", "tied", "--dry-run")


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    file = tmp_path / "args.toml"
    file.write_text("".join(f"{name} = {value}\n" for name, value in SIZES.items()))
    return file


def test_model_kwargs_take_several_pairs_or_a_file(toml: Path) -> None:
    pairs = [f"{name}={value}" for name, value in SIZES.items()]
    singly = [word for pair in pairs for word in ("--model-arg", pair)]
    expected = figures(*PLAN, *singly)
    assert figures(*PLAN, "--model-kwargs", *pairs) == expected
    assert figures("convert", "--model-kwargs", *pairs, *PLAN[1:]) == expected
    assert figures(*PLAN, "--model-kwargs", toml) == expected
    several = figures(*PLAN, "--model-kwargs", toml, "class_token=true", "qkv_bias=false")
    assert several["original"] < expected["original"]


@pytest.mark.parametrize(
    ("text", "more", "error_code"),
    [
        ("img_size = 32", ["img_size=32"], "model-argument-repeated"),
        ("img_size = ", [], "model-arguments-unreadable"),
        ("day = 1979-05-27", [], "malformed-model-argument"),
        ("'in chans' = 3", [], "malformed-model-argument"),
    ],
)
def test_a_file_of_model_arguments_is_checked(
    tmp_path: Path, text: str, more: list[str], error_code: str
) -> None:
    file = tmp_path / "args.toml"
    file.write_text(text)
    refused(*PLAN, "--model-kwargs", file, *more, error_code=error_code)


def test_a_file_of_model_arguments_that_is_missing() -> None:
    refused(*PLAN, "--model-kwargs", "nowhere.toml", error_code="model-arguments-unreadable")


def test_quiet_leaves_results_and_errors(world: World, tmp_path: Path) -> None:
    command = world.convert(tmp_path / "c.safetensors")
    quiet = run(*command, "-q")
    assert quiet.stderr == ""
    loud = run(*command, "--force")
    assert "Next:" in loud.stderr
    refused("report", tmp_path / "none", "-q", error_code="file-not-found")


def test_verbose_logs_times_and_where_an_error_arose(world: World, tmp_path: Path) -> None:
    level = logging.getLogger("tiedconv").level
    said = run(*world.convert(tmp_path / "c.safetensors"), "-v").stderr
    assert {"fit:", "write:"} <= {line.split()[0] for line in said.splitlines() if line}
    logged = run("report", tmp_path / "none", "-v", code=2).stderr
    assert "Traceback" in logged
    check_error(logged.splitlines()[-1], "file-not-found")
    assert logging.getLogger("tiedconv").level == level


def test_quiet_and_verbose_contradict_each_other() -> None:
    refused("list", "schemes", "-q", "-v", error_code="options-conflict")


@pytest.mark.parametrize(
    ("command", "former", "now"),
    [(c, f, n) for c, names in RENAMED.items() for f, n in names.items()],
)
def test_former_names_of_options_are_accepted_and_named(
    command: str, former: str, now: str, tmp_path: Path
) -> None:
    # No value is right, so that nothing runs: the name alone counts.
    for words in ([former, "x"], [f"{former}=x"]):
        said = run(command, tmp_path / "none", *words, code=2).stderr
        assert f"{former} is now called {now}" in said
        assert "No such option" not in said
    shown = run(command, "--help").stdout
    assert now in shown
    assert f"{former} " not in shown


def test_an_effort_goes_with_images(world: World) -> None:
    model = tiny_model()
    with raises(UserError, "needs-calib"):
        tiedconv.convert(model, "tied", effort="fast")
    calib = tiedconv.Calibration(str(world.data))
    with raises(UserError, "options-conflict"):
        tiedconv.convert(model, "tied", calib=calib, effort="fast")


def test_a_report_prints_what_a_calibration_measured(world: World) -> None:
    made = tiedconv.convert(tiny_model(), "tied", calib=str(world.data / "train"), effort="fast")
    report = tiedconv.report(made)
    assert "held-out image" in str(report).splitlines()[-1]
    assert "held-out image" in report._repr_html_()


def examples() -> list[str]:
    """Command lines that end the help of a command."""
    group = typer.main.get_command(app)
    lines = "\n".join(each.epilog or "" for each in group.commands.values())  # type: ignore[attr-defined]
    return [line for line in lines.splitlines() if line.startswith("tiedconv ")]


@pytest.mark.parametrize("line", examples())
def test_examples_in_the_help_are_command_lines(line: str) -> None:
    name, *words = shlex.split(line)[1:]
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    with command.make_context(name, words):  # or it raises a usage error
        pass

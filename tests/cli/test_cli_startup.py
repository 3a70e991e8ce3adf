"""What needs no model needs no torch: help, the version, a mistyped command, completion."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import tiedconv
from tiedconv.calibration import EFFORTS, CalibConfig
from tiedconv.cli import app, common, convert, finetune, option_groups, plan
from tiedconv.cli.command import add
from tiedconv.commands.compare import BUDGETS
from tiedconv.data import AUGMENTS
from tiedconv.exporters import all_formats
from tiedconv.schemes import all_schemes

COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]
HEAVY = ["torch", "numpy", "scipy", "torchvision", "timm", "transformers", "matplotlib", "sklearn"]
SCRIPT = f"""
import sys
sys.argv[0] = "tiedconv"
from tiedconv.cli import main
try:
    main()
finally:
    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


def started(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a new process; the last line of its standard error lists heavy modules."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *words],
        env={**os.environ, "PYTHONPATH": str(Path(tiedconv.__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        *(([name, "--help"], 0) for name in COMMANDS),
        (["convrt"], 2),
        (["convert", "resnet50", "--schme", "tied"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_needs_no_model_starts_without_torch(words: list[str], code: int) -> None:
    done = started(*words)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert "Traceback" not in done.stderr


def test_a_mistyped_command_is_met_with_the_right_one() -> None:
    assert "convert" in started("convrt").stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [("tiedconv sens", ["sensitivity"]), ("tiedconv plan --par", ["--params"])],
)
def test_completion_starts_without_torch(line: str, expected: list[str]) -> None:
    done = started(
        _TIEDCONV_COMPLETE="complete_bash",
        COMP_WORDS=line,
        COMP_CWORD=str(len(line.split()) - 1),
    )
    assert done.stdout.split() == expected
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_package_loads_each_name_at_its_first_use() -> None:
    code = (
        "import sys, tiedconv\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(tiedconv.__all__) <= set(dir(tiedconv))\n"
        "assert 'torch' not in sys.modules\n"
        "from tiedconv import *\n"
        "assert tiedconv.TrainConfig is TrainConfig and tiedconv.save is save\n"
        "import tiedconv.training as training\n"
        "assert tiedconv.training is training and tiedconv.data.ImageList\n"
        "assert not hasattr(tiedconv, 'nothing') and not hasattr(tiedconv, '__nothing__')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checkers_and_python_agree_where_each_name_comes_from() -> None:
    tree = ast.parse(Path(tiedconv.__file__).read_text("utf-8"))
    imports = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tiedconv.")
        for alias in node.names
    }
    light = {"TiedconvError", "__version__"}
    lazy = {name: f"tiedconv.{module}" for name, module in tiedconv._MODULES.items()}
    assert {name: module for name, module in imports.items() if name not in light} == lazy
    assert lazy.keys() | light == set(tiedconv.__all__)


# What the signatures repeat, as the modules that define it would import torch


def test_help_names_what_there_is() -> None:
    assert common.names_in("schemes") == sorted(all_schemes())
    assert common.names_in("exporters") == sorted(all_formats())
    assert tuple(finetune.AUGMENTS.split(", ")) == AUGMENTS
    assert tuple(plan.BUDGETS.split(",")) == BUDGETS
    assert CalibConfig.batch_size == convert.BATCH_SIZE
    effort = inspect.signature(convert.convert, eval_str=True).parameters["effort"]
    help_ = effort.annotation.__metadata__[0].help
    assert all(f"[b]{name}[/b]" in help_ for name in EFFORTS)


def test_every_lazily_imported_default_is_that_of_the_work() -> None:
    from tiedconv.training import TrainConfig

    config, defaults = TrainConfig(), inspect.signature(finetune.finetune).parameters
    renamed = {"distill": "distill_weight", "bn_batches": "bn_recalibrate", "compile_": "compile"}
    shared = {n: renamed.get(n, n) for n in defaults if hasattr(config, renamed.get(n, n))}
    assert len(shared) > 20
    for option, field in shared.items():
        if option not in {"epochs", "batch_size", "only"}:  # strings, or None for a default
            assert defaults[option].default == getattr(config, field), option
    assert int(defaults["batch_size"].default) == config.batch_size


def test_a_group_of_options_is_one_value_of_the_command() -> None:
    taken: list[object] = []

    def command(
        name: str,
        *,
        images: option_groups.ImageOptions,
        options: option_groups.CalibOptions = convert.CALIB_OPTIONS,
    ) -> None:
        taken.extend([name, images, options])

    made = typer.Typer()
    add(made, command)
    typer.main.get_command(made).main(
        ["x", "--mean", "0.5", "-n", "8"], standalone_mode=False, prog_name="x"
    )
    assert taken == [
        "x",
        option_groups.ImageOptions(mean="0.5"),
        option_groups.CalibOptions(calib_images=8),
    ]
    assert option_groups.ImageOptions(resize=0, mean="0.5").given == {
        "--resize": "0", "--mean": "0.5",
    }  # fmt: skip

"""A function as a command: groups of options, how much is said, errors to exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import inspect
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from tiedconv.cli.common import MODEL_KWARGS, OUTPUT, err, hint
from tiedconv.errors import CheckpointError, OutputError, TiedconvError, UserError
from tiedconv.wording import on_command_line

Quiet = Annotated[
    bool,
    typer.Option(
        "-q",
        "--quiet",
        help="No progress and no notes: only results and errors.",
        rich_help_panel=OUTPUT,
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "-v",
        "--verbose",
        help="Also the time of each stage, and where an error arose.",
        rich_help_panel=OUTPUT,
    ),
]


RENAMED = {
    "bench": {"--batch": "--batch-size"},
    "export": {"--outputs": "--output-name"},
    "finetune": {"--keep": "--keep-checkpoints"},
    "verify": {"--images": "--data", "--count": "--limit"},
}
"""Options by their former names, which are accepted for one release."""


class Command(TyperCommand):
    """A command that accepts former names of options, and several values of `--model-kwargs`.

    These end with the first word that is neither a pair with `=` nor a .toml file.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _one_value_each([self._present_name(word) for word in args]))

    def _present_name(self, word: str) -> str:
        """An option's name of now for one of before."""
        option, equals, value = word.partition("=")
        now = RENAMED.get(self.name or "", {}).get(option)
        if now is None:
            return word
        hint(f"{option} is now called {now}; the former name goes with the next release.")
        return f"{now}{equals}{value}"


def _one_value_each(words: list[str]) -> list[str]:
    """`--model-kwargs a=1 b=2` as `--model-kwargs a=1 --model-kwargs b=2`."""
    found: list[str] = []
    several = False
    for word in words:
        is_value = ("=" in word or word.endswith(".toml")) and not word.startswith("-")
        if several and is_value and found[-1] != MODEL_KWARGS:
            found.append(MODEL_KWARGS)
        several = word == MODEL_KWARGS or (several and is_value)
        found.append(word)
    return found


def add(app: typer.Typer, function: Callable[..., None], *examples: str) -> None:
    """Add a function as a command.

    Args:
        app: gets the command.
        function: its keywords are the options, its docstring the help.
        examples: command lines that end the help.
    """
    lines = ("Examples:", *examples) if examples else ()
    app.command(cls=Command, epilog="\n\n".join(lines) or None)(guarded(function))


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """A command as Typer is to see it.

    Its known errors become one line on standard error and an exit code. Each parameter that is a
    dataclass of options becomes one option for each field of it.
    """

    @functools.wraps(function)
    @on_command_line()
    def run(quiet: bool = False, verbose: bool = False, **options: Any) -> None:
        # Imported within: torch takes seconds, in which Ctrl-C is to leave no traceback either.
        try:
            from tiedconv.training import sigterm_as_keyboard_interrupt

            with sigterm_as_keyboard_interrupt(), _loudness(quiet=quiet, verbose=verbose):
                function(**_grouped(groups, options))
        except TiedconvError as error:
            if verbose and not quiet:
                typer.echo(traceback.format_exc(), err=True)
            _print_error(error)
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            if error.filename is not None or error.errno not in _OUTPUT_ERRORS:
                raise
            _close_output(error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as interrupt:
            if _rank() == 0:
                typer.echo("Interrupted. Nothing half-written was left behind.", err=True)
            raise typer.Exit(128 + getattr(interrupt, "signum", signal.SIGINT)) from None

    signature = inspect.signature(function, eval_str=True)
    parameters = signature.parameters.values()
    groups = {p.name: p.annotation for p in parameters if dataclasses.is_dataclass(p.annotation)}
    flat = [option for p in parameters for option in _options_of(p)]
    flat += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
        for name, option in (("quiet", Quiet), ("verbose", Verbose))
    ]
    run.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in flat}
    return run


# What writing to standard output fails with: a full disk, or a device that went away. A reader
# that has ended (EPIPE) is click's to handle.
_OUTPUT_ERRORS = frozenset({errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG})


def _close_output(error: OSError) -> None:
    """Say that standard output can't be written, and let nothing try again as Python ends."""
    reason = error.strerror or str(error)
    typer.echo(
        f"error: Standard output can't be written ({reason}). [output-not-written]", err=True
    )
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _options_of(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """The parameter, or one for each field of its dataclass, with the defaults given for it."""
    kind = parameter.annotation
    if not dataclasses.is_dataclass(kind):
        return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    hints, empty = get_type_hints(kind, include_extras=True), inspect.Parameter.empty
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(kind if parameter.default is empty else parameter.default, field.name),
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(kind)
    ]


def _grouped(groups: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a command, its dataclasses filled from Typer's options."""
    for name, kind in groups.items():
        values = {field.name: options.pop(field.name) for field in dataclasses.fields(kind)}
        options[name] = kind(**values)
    return options


def _rank() -> int:
    from tiedconv.training import rank_in_environment

    return rank_in_environment()


def _print_error(error: TiedconvError) -> None:
    """One line with the error's code. Of several processes, the first one prints it."""
    rank = _rank()
    if rank == 0 or not isinstance(error, UserError | CheckpointError | OutputError):
        who = f" (process {rank})" if rank else ""
        # Through typer.echo rather than Rich: one line, neither wrapped nor marked up.
        code = typer.style(f"[{error.code}]", dim=True)
        typer.echo(f"error{who}: {error} {code}", err=True)
    else:
        time.sleep(2)  # a launcher ends all when one ends, so let the first print


class _Hints(logging.Handler):
    """Prints the library's log messages."""

    def emit(self, record: logging.LogRecord) -> None:
        if _rank() == 0:
            hint(record.getMessage())


@contextlib.contextmanager
def _loudness(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """The library's log messages become hints; quiet, there are none, and no progress."""
    if quiet and verbose:
        raise UserError(
            "-q and -v were both given", hint="Give one of them", code="options-conflict"
        )
    logger, handler = logging.getLogger("tiedconv"), _Hints()
    level, silent = logger.level, err.quiet
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.addHandler(handler)
    err.quiet = quiet
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        err.quiet = silent

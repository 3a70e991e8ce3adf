"""All that a page shows of one file, as plain data."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tiedconv.commands.history import preparation
from tiedconv.commands.loading import library_of, python_lines, shell_lines
from tiedconv.commands.measured import Measured, measured
from tiedconv.commands.report import GroupReport, Report, report_of
from tiedconv.io.checkpoint_reader import Checkpoint, read
from tiedconv.loggers import LoggedRun
from tiedconv.pages.curves import Curve, curves_of
from tiedconv.pages.errors_of_fits import FitErrors, errors_of
from tiedconv.pages.layers import LayerTable, layer_table
from tiedconv.pages.parts import Part, parts_of
from tiedconv.pages.steps import Step, steps_of, versions_text
from tiedconv.pages.tensors import tensor_figures
from tiedconv.sources import Source, sha256_of_file
from tiedconv.sources.models import source_of


@dataclass(frozen=True)
class GroupRow:
    """Groups that differ in the number of a layer alone.

    Args:
        name: theirs, with `*` for the number.
        scheme: theirs.
        groups: at least one.
    """

    name: str
    scheme: str
    groups: tuple[GroupReport, ...]

    @property
    def ranks(self) -> str:
        """The least and the largest rank, such as `4-32`."""
        found = [int(r) for g in self.groups if g.rank for r in g.rank.split("-")]
        return "-".join(map(str, dict.fromkeys((min(found), max(found))))) if found else ""

    @property
    def matrices(self) -> int:
        """How many it has."""
        return sum(group.matrices for group in self.groups)

    @property
    def original(self) -> int:
        """Parameters before."""
        return sum(group.original for group in self.groups)

    @property
    def stored(self) -> int:
        """Parameters after."""
        return sum(group.stored for group in self.groups)

    @property
    def size(self) -> int:
        """Bytes after."""
        return sum(group.size for group in self.groups)

    @property
    def bits(self) -> float:
        """Bits for each stored parameter, scales included."""
        return 8 * self.size / max(1, self.stored)


@dataclass(frozen=True)
class FileFacts:
    """All that a page shows of a file.

    Args:
        report: its figures.
        source: which model it was made from; None for one in memory.
        libraries: versions that the model was made with.
        parts: of the model, and their bytes.
        overhead: bytes of the file that are no tensors: plan, hashes, history.
        layers: bits and ranks of numbered layers.
        groups, each_group: rows of groups, those alike as one or each by itself.
        errors: of the fits.
        measured: figures, oldest first.
        steps: its history.
        run: of its training's log, if one was given.
        curves: of that.
        prepared: how images become the model's input.
        python, shell: lines that load it.
        library: that the model's class is in; "" for torchvision or one's own.
        sha256: of the file.
        hashes: of its tensors.
    """

    report: Report
    source: Source | None
    libraries: str
    parts: tuple[Part, ...]
    overhead: int
    layers: LayerTable | None
    groups: tuple[GroupRow, ...]
    each_group: tuple[GroupRow, ...]
    errors: FitErrors
    measured: tuple[Measured, ...]
    steps: tuple[Step, ...]
    run: LoggedRun | None
    curves: tuple[Curve, ...]
    prepared: str
    python: tuple[str, ...]
    shell: tuple[str, ...]
    library: str
    sha256: str
    hashes: Mapping[str, str]

    @property
    def share(self) -> float:
        """Bytes of the file, over those of the original."""
        return self.report.file_bytes / max(1, self.report.original_bytes)

    @property
    def bits(self) -> float:
        """Bits of the file for each parameter of the original."""
        return 8 * self.report.file_bytes / max(1, self.report.original)

    @property
    def original_bits(self) -> int:
        """Bits of a parameter of the original."""
        return 8 * _itemsize(self.report)

    @property
    def results(self) -> tuple[Measured, ...]:
        """The figures of the last step that measured any."""
        last = self.measured[-1].step if self.measured else 0
        return tuple(each for each in self.measured if each.step == last)

    @property
    def schemes(self) -> str:
        """The schemes of its groups."""
        return ", ".join(dict.fromkeys(group.scheme for group in self.report.groups))


def facts_of(file: str | Path, runs: Sequence[LoggedRun] = ()) -> FileFacts:
    """Read a file: its header for most, its bytes for their hash.

    Args:
        file: a compact file.
        runs: logs, of which that of this file is taken.

    Raises:
        CheckpointError: the file is missing, damaged, not tiedconv's, or records no sound source.
    """
    with contextlib.closing(read(file)) as checkpoint:
        return _facts(checkpoint, runs, sha256_of_file(file))


def _facts(checkpoint: Checkpoint, runs: Sequence[LoggedRun], sha256: str) -> FileFacts:
    report = report_of(checkpoint)
    source = None if checkpoint.source is None else source_of(checkpoint.source)
    tensors = tensor_figures(checkpoint, _itemsize(report))
    run = next((run for run in runs if run.output == report.name), None)
    return FileFacts(
        report=report,
        source=source,
        libraries=versions_text(source.versions if source else {}),
        parts=parts_of(tensors),
        overhead=report.file_bytes - report.tensor_bytes,
        layers=layer_table(tensors),
        groups=_rows(report, each=False),
        each_group=_rows(report, each=True),
        errors=errors_of(report.groups, report.history),
        measured=measured(report.history),
        steps=steps_of(report.history),
        run=run,
        curves=() if run is None else curves_of(run),
        prepared=preparation(source.preprocess if source else None),
        python=tuple(python_lines(report.name, source)),
        shell=tuple(shell_lines(report.name, source)),
        library=library_of(source),
        sha256=sha256,
        hashes=checkpoint.hashes,
    )


def _rows(report: Report, *, each: bool) -> tuple[GroupRow, ...]:
    return tuple(GroupRow(n, s, tuple(groups)) for n, s, groups in report.merged(each=each))


def _itemsize(report: Report) -> int:
    return 4 if report.original_dtype == "float32" else 2

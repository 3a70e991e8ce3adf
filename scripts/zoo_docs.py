"""docs/zoo.md from `benchmarks/results/zoo.json`.

python scripts/zoo_docs.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from generated_page import write_or_check

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "zoo.json"
PAGE = ROOT / "docs" / "zoo.md"

TEXT = """# Architectures

What of published architectures can be converted, by their names and shapes alone, and whether a conversion is
exact. Made by `python benchmarks/zoo.py --checks --exports 40`, this page by `python scripts/zoo_docs.py`.

- **covered**: the share of the weights of linear layers and convolutions (depthwise ones and embeddings
  aside) that lies in blocks, so that low rank, rounding and `auto` may have it; **in pairs**: the share that
  lies in blocks of several matrices, for `tied`.
- **tied**, **lors**: what these schemes store by their defaults, in percent of the parameters.
- **full rank**: the largest difference of outputs after a conversion that stores everything (`rank=10**6`,
  matrices of up to 2^18 values, all parameters drawn at random, float32), relative to the largest entry; a star:
  in float64, where drawn weights make a model so sensitive that float32 itself moves it. A dash: not run
  (over 60 million parameters, no small form, or torchvision's own operators absent).
- **file**: read back to the same bits, untied to the same outputs, gradients for all that is stored, and
  `verify` ends with `ok`, or what does not hold.
- **ONNX**: exported and compared, for the first forty.

{summary}

{table}
"""


def main() -> None:
    rows = json.loads(ROWS.read_text("utf-8"))
    text = TEXT.format(summary=summary(rows), table="\n".join(table(rows)))
    sys.exit(write_or_check(PAGE, text))


def summary(rows: list[dict[str, Any]]) -> str:
    """The figures of all rows together."""
    most = sum(row["coverage"] >= 0.95 for row in rows)
    least = min(row["coverage"] for row in rows)
    checked = [row for row in rows if "float32_error" in row]
    exact = sum(error_of(row) <= 1e-5 for row in checked)
    whole = sum(file_of(row) == "ok" for row in checked)
    exports = [row["export"] for row in rows if "export" in row]
    return (
        f"{len(rows)} architectures: {most} are covered to 95 % or more, the least to "
        f"{100 * least:.1f} %. {len(checked)} were converted at full rank: {exact} within 1e-5; of {whole} "
        f"the file is whole in every way. {sum(e == 'ok' for e in exports)} of {len(exports)} exports to ONNX passed."
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each architecture."""
    lines = [
        "| architecture | parameters | covered | in pairs | tied | lors | full rank | file | ONNX |",
        "|---|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in rows:
        cells = [
            row["name"].replace(":", ": "), f"{row['parameters'] / 1e6:,.1f} M",
            percent(row["coverage"]), percent(row["in_pairs"]), percent(row["tied"]),
            percent(row["lors"]), error_text(row), file_of(row), row.get("export", ""),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def error_of(row: dict[str, Any]) -> float:
    """The larger error of the two schemes, 0 where neither found a small matrix."""
    return max((row[key] for key in ("error_tied", "error_lors") if key in row), default=0.0)


def error_text(row: dict[str, Any]) -> str:
    if "float32_error" not in row:
        return "-"
    return f"{error_of(row):.0e}" + (" *" if row.get("in_double") else "")


def file_of(row: dict[str, Any]) -> str:
    """`ok`, or what does not hold; "" where it was not tried."""
    if "error" in row:
        return str(row["error"])[:60].replace("|", "/")
    if "reloads" not in row:
        return ""
    wrong = [what for what in ("reloads", "gradients") if not row[what]]
    wrong += ["untied"] if row["untied"] > 1e-5 else []
    wrong += [] if row["verify"] == "ok" else [f"verify: {row['verify']}"]
    return ", ".join(wrong) or "ok"


if __name__ == "__main__":
    main()

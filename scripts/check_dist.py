"""Build the wheel and the sdist, install each into an empty environment, and use it there.

    python scripts/check_dist.py [--keep FOLDER]

Exits with 1 if anything is missing or fails. Torch comes from constraints.txt; nothing of this checkout is on the
path of the new environment.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

IN_WHEEL = (
    "tiedconv/py.typed",
    "tiedconv/__main__.py",
    "tiedconv/pages/templates/",
    "/licenses/LICENSE",
)
IN_SDIST = (
    "/LICENSE",
    "/README.md",
    "/pyproject.toml",
    "/tiedconv/py.typed",
    "/tiedconv/pages/templates/",
)

USE = """
import sys
from pathlib import Path
import torch, tiedconv
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc1": nn.Linear(32, 64), "fc2": nn.Linear(64, 32)}) for _ in range(2)
        )
    def forward(self, x):
        for layer in self.layers:
            x = x + layer["fc2"](layer["fc1"](x).relu())
        return x

assert "site-packages" in tiedconv.__file__, tiedconv.__file__
net, file = Net(), Path(sys.argv[1])
tied = tiedconv.convert(net, "tied")
tiedconv.save(tied, file)
again = tiedconv.load(file, model=Net())
x = torch.randn(2, 32)
assert torch.equal(again.eval()(x), tied.eval()(x))
tiedconv.report_page(file)
print(tiedconv.report(file))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path, default=ROOT / "dist", help="where the two files go")
    folder = parser.parse_args().keep
    wheel, sdist = build(folder)
    require(zipfile.ZipFile(wheel).namelist(), IN_WHEEL, wheel, without=("tests/", "benchmarks/"))
    with tarfile.open(sdist) as archive:
        require(archive.getnames(), IN_SDIST, sdist, without=("/.git/", "/.venv/"))
    with tempfile.TemporaryDirectory() as place:
        python = new_environment(Path(place))
        for package in (wheel, sdist):
            install(python, package)
            use(python, Path(place))
            print(f"{package.name}: installed into an empty environment and used")


def build(folder: Path) -> tuple[Path, Path]:
    """The wheel and the sdist, built again."""
    for old in folder.glob("tiedconv-*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (wheel,), (sdist,) = folder.glob("tiedconv-*.whl"), folder.glob("tiedconv-*.tar.gz")
    return wheel, sdist


def require(
    names: list[str], parts: tuple[str, ...], package: Path, without: tuple[str, ...]
) -> None:
    """Whether a package holds what it must, and nothing that it must not."""
    for part in parts:
        if not any(part in f"/{name}" for name in names):
            sys.exit(f"{package.name} lacks {part}")
    for part in without:
        if any(part in f"/{name}" for name in names):
            sys.exit(f"{package.name} holds {part}")


def new_environment(place: Path) -> Path:
    """The Python of an empty environment with torch."""
    venv.create(place / "env", with_pip=True)
    python = place / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    for name in (
        "torch",
        "torchvision",
    ):  # one by one, so that no looser requirement picks a release
        run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", name)
    return python


def install(python: Path, package: Path) -> None:
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "tiedconv")
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", package)


def use(python: Path, place: Path) -> None:
    """The command line and the package, as somebody who has just installed them."""
    run(python, "-c", USE, place / "net.safetensors", cwd=place)
    for words in (["--version"], ["info"], ["list", "schemes"], ["report", "net.safetensors"]):
        run(python.with_name("tiedconv"), *words, cwd=place)
    (place / "net.safetensors").unlink()


def run(*words: object, cwd: Path | None = None) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))[:200]}\n{done.stdout}\n{done.stderr}")


if __name__ == "__main__":
    main()

"""Make pretrained vision models compact.

Weights are tied to their own transpose, or given by one shared base for a stack of layers plus
low-rank residuals; each number is stored once, in one self-describing file.

    >>> import tiedconv
    >>> model = tiedconv.convert("resnet50", "tied")            # doctest: +SKIP
    >>> tiedconv.save(model, "resnet50-tied.safetensors")       # doctest: +SKIP
"""

from tiedconv.calibration import CalibConfig
from tiedconv.commands.bench import bench
from tiedconv.commands.compare import compare
from tiedconv.commands.convert import convert, plan
from tiedconv.commands.evaluate import evaluate
from tiedconv.commands.export import export
from tiedconv.commands.finetune import finetune, forecast
from tiedconv.commands.report import report
from tiedconv.commands.sensitivity import sensitivity
from tiedconv.commands.verify import verify
from tiedconv.conversion.calibrate import Calibration
from tiedconv.core.plan import Plan
from tiedconv.errors import TiedconvError
from tiedconv.io.checkpoint import save
from tiedconv.planning.recipe import Recipe
from tiedconv.runtime.factored_linear import apply_factors
from tiedconv.runtime.tie import freeze, tie, unfreeze, untie
from tiedconv.sources.load import load
from tiedconv.training import TrainConfig
from tiedconv.version import __version__

__all__ = [
    "CalibConfig",
    "Calibration",
    "Plan",
    "Recipe",
    "TiedconvError",
    "TrainConfig",
    "__version__",
    "apply_factors",
    "bench",
    "compare",
    "convert",
    "evaluate",
    "export",
    "finetune",
    "forecast",
    "freeze",
    "load",
    "plan",
    "report",
    "save",
    "sensitivity",
    "tie",
    "unfreeze",
    "untie",
    "verify",
]

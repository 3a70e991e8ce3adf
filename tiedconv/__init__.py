"""Make pretrained vision models compact.

Weights are tied to their own transpose, or given by one shared base for a stack of layers plus
low-rank residuals; each number is stored once, in one self-describing file.

    >>> import tiedconv
    >>> model = tiedconv.convert("resnet50", "tied")            # doctest: +SKIP
    >>> tiedconv.save(model, "resnet50-tied.safetensors")       # doctest: +SKIP
"""

from tiedconv.applying import apply_factors
from tiedconv.bench import bench
from tiedconv.binding import freeze, tie, unfreeze, untie
from tiedconv.calibrate import Calibration
from tiedconv.calibration import CalibConfig
from tiedconv.checkpoint import save
from tiedconv.compare import compare
from tiedconv.convert import convert, plan
from tiedconv.errors import TiedconvError
from tiedconv.evaluate import evaluate
from tiedconv.export import export
from tiedconv.finetune import finetune, forecast
from tiedconv.loading import load
from tiedconv.plan import Plan
from tiedconv.recipe import Recipe
from tiedconv.report import report
from tiedconv.sensitivity import sensitivity
from tiedconv.training import TrainConfig
from tiedconv.verify import verify
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

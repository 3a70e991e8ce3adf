"""Make pretrained vision models compact.

Weights are tied to their own transpose, or given by one shared base for a stack of layers plus
low-rank residuals; each parameter is stored once, in one self-describing file.

    >>> import tiedconv
    >>> model = tiedconv.convert("resnet50", "tied")            # doctest: +SKIP
    >>> tiedconv.save(model, "resnet50-tied.safetensors")       # doctest: +SKIP

Importing the package imports no torch: each name below is loaded at its first use.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import tiedconv.utils.import_hook as _import_hook
from tiedconv.errors import TiedconvError
from tiedconv.version import __version__

if TYPE_CHECKING:
    from tiedconv.calibration import CalibConfig
    from tiedconv.commands.bench import bench
    from tiedconv.commands.card import card
    from tiedconv.commands.compare import compare
    from tiedconv.commands.convert import convert, plan
    from tiedconv.commands.evaluate import evaluate
    from tiedconv.commands.export import export
    from tiedconv.commands.finetune import finetune, forecast
    from tiedconv.commands.push import push
    from tiedconv.commands.report import report
    from tiedconv.commands.sensitivity import sensitivity
    from tiedconv.commands.transform import transform
    from tiedconv.commands.verify import verify
    from tiedconv.conversion.calibrate import Calibration
    from tiedconv.core.plan import Plan
    from tiedconv.io.checkpoint import save
    from tiedconv.pages.page import report_page
    from tiedconv.planning.recipe import Recipe
    from tiedconv.runtime.factored_linear import apply_factors
    from tiedconv.runtime.narrow_layers import narrow_layers, untie
    from tiedconv.runtime.optimize import optimize
    from tiedconv.runtime.tie import freeze, tie, unfreeze
    from tiedconv.sources.models import load
    from tiedconv.sources.weights import Reading
    from tiedconv.training import TrainConfig

_MODULES = {
    "CalibConfig": "calibration",
    "Calibration": "conversion.calibrate",
    "Plan": "core.plan",
    "Reading": "sources.weights",
    "Recipe": "planning.recipe",
    "TrainConfig": "training",
    "apply_factors": "runtime.factored_linear",
    "bench": "commands.bench",
    "card": "commands.card",
    "compare": "commands.compare",
    "convert": "commands.convert",
    "evaluate": "commands.evaluate",
    "export": "commands.export",
    "finetune": "commands.finetune",
    "forecast": "commands.finetune",
    "freeze": "runtime.tie",
    "load": "sources.models",
    "narrow_layers": "runtime.narrow_layers",
    "optimize": "runtime.optimize",
    "plan": "commands.convert",
    "push": "commands.push",
    "report": "commands.report",
    "report_page": "pages.page",
    "save": "io.checkpoint",
    "sensitivity": "commands.sensitivity",
    "tie": "runtime.tie",
    "transform": "commands.transform",
    "unfreeze": "runtime.tie",
    "untie": "runtime.narrow_layers",
    "verify": "commands.verify",
}

__all__ = [
    "CalibConfig",
    "Calibration",
    "Plan",
    "Reading",
    "Recipe",
    "TiedconvError",
    "TrainConfig",
    "__version__",
    "apply_factors",
    "bench",
    "card",
    "compare",
    "convert",
    "evaluate",
    "export",
    "finetune",
    "forecast",
    "freeze",
    "load",
    "narrow_layers",
    "optimize",
    "plan",
    "push",
    "report",
    "report_page",
    "save",
    "sensitivity",
    "tie",
    "transform",
    "unfreeze",
    "untie",
    "verify",
]


_import_hook.when_imported("transformers.quantizers.auto", "tiedconv.integrations.hf_quantizer")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # a type checker is to know every name, and to refuse all others

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            value = getattr(import_module(f"tiedconv.{_MODULES[name]}"), name)
            globals()[name] = value
            return value
        # `import tiedconv` is enough for `tiedconv.training.train`.
        if not name.startswith("_") and find_spec(f"tiedconv.{name}") is not None:
            return import_module(f"tiedconv.{name}")
        raise AttributeError(f"module 'tiedconv' has no attribute {name!r}")

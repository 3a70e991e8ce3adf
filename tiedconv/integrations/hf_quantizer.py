"""Tied models in transformers: `save_pretrained`, `from_pretrained`, `Trainer`, `pipeline`.

`config.json` carries the plan as its `quantization_config`, and `model.safetensors` each stored
tensor once, packed integers too. So a folder is loaded by the library's own classes, without code
from the folder. Without tiedconv they refuse it: a tensor of the name of a converted weight has
another shape there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tiedconv.core.plan import Plan
from tiedconv.errors import CheckpointError
from tiedconv.io.narrowing import narrowed, stored_as
from tiedconv.io.validation import check_plan
from tiedconv.runtime.other_tools import allow_savers
from tiedconv.runtime.tie import is_tied, state_of, tie, untie
from tiedconv.runtime.tied_module import EXPRS
from tiedconv.version import __version__

METHOD = "tiedconv"


class TiedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `config.json` says of a tied model.

    Args:
        plan: as JSON.
        source: what the model was made from, if known.
        history: what was done with it, oldest first.
        dtypes: of the stored tensors that are no floats, by name.
        version: of tiedconv.
    """

    def __init__(
        self,
        plan: Mapping[str, Any],
        source: Mapping[str, Any] | None = None,
        history: list[Mapping[str, Any]] | None = None,
        dtypes: Mapping[str, str] | None = None,
        version: str = __version__,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        self.quant_method = quant_method
        self.plan, self.source, self.history = plan, source, history or []
        self.dtypes, self.version = dtypes or {}, version
        if unknown:
            raise CheckpointError(
                f"The configuration of a tied model has unknown entries: {', '.join(unknown)}",
                "It may be of a newer tiedconv",
                "Update tiedconv",
                code="config-unknown",
            )

    @classmethod
    def of(cls, model: nn.Module) -> TiedConfig:
        """Of a tied model, as it is."""
        state = state_of(model)
        others = {
            name: str(parameter.dtype).removeprefix("torch.")
            for name in state.plan.factors
            if not (parameter := model.get_parameter(name)).is_floating_point()
        }
        return cls(state.plan.to_json(), state.source, [*state.history], others)


class TiedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Ties a model before its tensors are loaded, and gives them to be saved."""

    of_tied_model = True
    requires_calibration = True
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        """Always."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config = self.quantization_config
        plan = Plan.from_json(config.plan)
        check_plan(plan)
        dtypes = {name: getattr(torch, dtype) for name, dtype in config.dtypes.items()}
        empty = {
            name: torch.empty(shape, dtype=dtypes.get(name, model.dtype), device="meta")
            for name, shape in plan.factors.items()
        }
        tie(model, plan, empty, source=config.source, history=tuple(config.history))
        for module in model.modules():
            if EXPRS in module.__dict__:
                module._is_hf_initialized = True  # else the library would draw its weight
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()), f"^{_refusal(plan)}$",
        }  # fmt: skip

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model.is_quantized = False  # for `.half()` and others, which all work
        model._weight_conversions = []
        allow_savers(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The stored tensors as the file's history has their type, and the one that refuses."""
        if not is_tied(model):
            raise CheckpointError(
                "This model was tied and is no more",
                "Its folder would say that it is",
                "Save the model that tiedconv.untie gives, or remove `model.hf_quantizer`",
                code="not-tied",
            )
        model.config.quantization_config = TiedConfig.of(model)
        state = state_of(model)
        tensors = dict(model.state_dict())
        half, closely = stored_as(state.history), bool(state.plan.codes)
        tensors = {name: narrowed(t, half, closely=closely) for name, t in tensors.items()}
        return {**tensors, _refusal(state.plan): torch.empty(0)}, {}

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        return untie(model)


def _refusal(plan: Plan) -> str:
    """The first converted weight, of which an empty tensor lies in the file: others refuse it."""
    return next(iter(plan.weights))


def attach(model: nn.Module) -> None:
    """Let a tied model of transformers be saved by the library's own methods.

    Args:
        model: tied; of another library it stays as it is.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) and is_tied(model):
        model.config.quantization_config = TiedConfig.of(model)
        model.hf_quantizer = TiedQuantizer(model.config.quantization_config)
        model._weight_conversions = []  # names are written as they are
        allow_savers(model)


register_quantization_config(METHOD)(TiedConfig)
register_quantizer(METHOD)(TiedQuantizer)

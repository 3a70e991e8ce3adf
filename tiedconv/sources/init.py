"""Building models without initial values that are overwritten anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

# Methods of a tensor, and the functions of torch.nn.init that announce themselves to a mode as a
# whole (what they do inside is then hidden from it). By name, as transformers puts functions of
# its own in the place of the latter.
_RANDOM_FILLS = frozenset(
    {
        "bernoulli_",
        "cauchy_",
        "exponential_",
        "geometric_",
        "kaiming_uniform_",
        "log_normal_",
        "normal_",
        "random_",
        "uniform_",
    }
)


class _SkipInit(TorchFunctionMode):
    """Turns random fills of parameters into zero fills.

    Zeros rather than nothing: `torch.nn.init.trunc_normal_` draws again what is out of bounds,
    which memory left as it was would often be, and a skeleton without NaN is the same each time.
    Buffers are left alone, because a non-persistent one is in no weights file.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(target, nn.Parameter):
            if func is Tensor.erfinv_:  # slow, and the inverse error function of zero is zero
                return target
            if getattr(func, "__name__", "") in _RANDOM_FILLS:
                with torch.no_grad():
                    return target.zero_()
        return func(*args, **kwargs)


@contextmanager
def skip_init() -> Iterator[None]:
    """Within it, models are built with zeros where their parameters would be random.

    Deterministic fills and all buffers come out as always. It holds for the current thread, and
    is meant for models whose weights are loaded next.
    """
    with _SkipInit():
        yield


@contextmanager
def skip_memory() -> Iterator[None]:
    """Within it, models are built whose parameters have shapes, but no values and no memory.

    Each parameter is put on the meta device when a module takes it. Those that modules share stay
    shared, and all buffers come out as always. It holds for all threads.

    A constructor that reads a parameter's values fails in it.
    """
    made = WeakIdKeyDictionary()

    def replace(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if type(parameter) is not nn.Parameter or parameter.is_meta:
            return None
        if parameter not in made:
            made[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        found: nn.Parameter = made[parameter]
        return found

    # torch's annotation forgets that a hook may return a parameter.
    handle = register_module_parameter_registration_hook(replace)  # type: ignore[arg-type]
    try:
        with skip_init():
            yield
    finally:
        handle.remove()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it, torch's CPU random numbers start at `seed`; afterwards their state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield

"""Models of Hugging Face transformers: `hf:google/vit-base-patch16-224`, `hf:/local/dir`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tiedconv.errors import MissingExtra, SourceError, WeightsError
from tiedconv.io.narrowing import HALVES
from tiedconv.sources.arguments import JSON, refuse_arguments
from tiedconv.sources.hf_config import architecture, from_data, to_data
from tiedconv.sources.hf_preprocess import from_image_processor, from_model_config
from tiedconv.sources.hub import hub_if_reachable, hub_offline
from tiedconv.sources.provider import construct, first_line, is_download_error, not_downloaded
from tiedconv.sources.source import Preprocess
from tiedconv.sources.state_dict import describe_mismatch, load_into
from tiedconv.sources.torchvision_compat import import_torchvision

T = TypeVar("T")


class HfModel:
    """One model of transformers, made from a configuration.

    Args:
        name: a local directory or the name of a model on the hub.
        kwargs: values of the configuration to change.
        config: the configuration as a compact file holds it; without it, it is looked up.
        network: whether to ask the hub for what is not in the local cache.
    """

    packages: tuple[str, ...] = ("torchvision", "transformers")
    published_dtype: str | None = None

    def __init__(
        self,
        name: str,
        kwargs: Mapping[str, JSON],
        config: Mapping[str, JSON] | None = None,
        network: bool = False,
    ) -> None:
        self._transformers = _import_transformers()
        self._name, self._spec, self._network = name, f"hf:{name}", network
        self._directory = Path(name).expanduser()
        self._local = bool(name) and self._directory.is_dir()
        self.kwargs: Mapping[str, JSON] = dict(kwargs)
        self.config: Mapping[str, JSON] | None = self._look_up() if config is None else dict(config)
        self._class = architecture(self._transformers, self._spec, self.config.get("architecture"))

    def _look_up(self) -> dict[str, JSON]:
        """The configuration of a directory or a hub name, with the arguments in it."""
        refuse_arguments(self._spec, self.kwargs, ("architecture", "model_type", "architectures"))
        if not self._local and self._name.startswith(("/", ".", "~")):
            raise SourceError(
                f"There is no directory {self._name}",
                hint="Correct its path",
                code="model-folder-missing",
            )
        if not self._name:
            raise SourceError(
                "The spec hf: names no model",
                hint="Give hf:NAME or hf:DIRECTORY",
                code="model-not-named",
            )
        if self._local and not (self._directory / "config.json").is_file():
            raise SourceError(
                f"The directory {self._name} has no config.json",
                "The class of its model is not known",
                "Give a directory that save_pretrained wrote",
                code="config-missing",
            )
        config = self._fetch(
            lambda where, only_local: self._transformers.AutoConfig.from_pretrained(
                where, local_files_only=only_local, trust_remote_code=False
            ),
            "configuration",
        )
        stated = str(getattr(config, "dtype", None)).removeprefix("torch.")
        self.published_dtype = stated if stated in HALVES else None
        return to_data(self._transformers, self._spec, config, self.kwargs)

    def _configuration(self) -> Any:
        # A fresh one each time, as the class may change the one it is given.
        return from_data(self._transformers, self._spec, self.config or {})

    def build(self) -> nn.Module:
        """The model, in float32 and without the network."""
        with hub_offline():  # a configuration may name a backbone that lies elsewhere
            config = self._configuration()
            return construct(self._spec, self.kwargs, lambda: self._class(config))

    def pretrained(self) -> nn.Module:
        """The model with the weights of its directory, the local cache or the hub."""
        model, info = self._fetch(
            lambda where, only_local: self._with_weights(where, local_files_only=only_local),
            "weights",
        )
        _refuse_gaps(model, info, f"The weights of {self._spec}")
        return construct(self._spec, self.kwargs, lambda: model)

    def _with_weights(self, where: str | None, **options: Any) -> Any:
        with _quiet(self._transformers):
            return self._class.from_pretrained(
                where,
                config=self._configuration(),
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported by `_refuse_gaps`
                **options,
            )

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Loads weights by name, under the names that files of this model have if need be.

        Transformers writes some models under older names than their parameters have now.
        """
        try:
            load_into(model, tensors)
        except WeightsError as error:
            try:
                named, info = self._with_weights(None, state_dict=dict(tensors))
            except (
                Exception
            ) as second:  # the library raises many types; the first error is more exact
                raise error from second
            if info["missing_keys"] or info["unexpected_keys"]:
                raise
            _refuse_gaps(named, info, "The weights")
            load_into(model, named.state_dict())

    def preprocess(self, model: nn.Module) -> Preprocess | None:
        """As preprocessor_config.json says, else the usual one for ImageNet."""
        stated, config = self._processor_file(), self.config or {}
        if stated is None:
            found = from_model_config(config)
        else:
            found = from_image_processor(self._spec, stated, self.kwargs)
        channels = config.get("num_channels", 3)
        if found is None or not isinstance(channels, int) or channels < 1:
            return found
        return found.for_channels(channels)

    def _processor_file(self) -> Path | None:
        name = "preprocessor_config.json"
        if self._local:
            path = self._directory / name
            return path if path.is_file() else None
        try:
            with hub_if_reachable():
                found = self._transformers.utils.cached_file(
                    self._name, name, local_files_only=not self._network
                )
        except OSError:  # there is no such file, or no network
            return None
        return None if found is None else Path(found)

    def _fetch(self, read: Callable[[str, bool], T], what: str) -> T:
        """Reads from the directory or the cache first, and only then from the network."""
        where = str(self._directory) if self._local else self._name
        try:
            try:
                # A directory's configuration may name a backbone that lies elsewhere.
                with hub_offline() if self._local else nullcontext():
                    return read(where, True)
            except OSError as error:
                if self._local or not self._network:
                    raise
                with hub_if_reachable() as unreachable:
                    if unreachable:
                        raise OSError(unreachable) from error
                    return read(where, False)
        except SourceError:
            raise
        except Exception as error:  # the library wraps its errors in many types
            if self._local:
                raise SourceError(
                    f"The {what} in {self._name} can't be read ({first_line(error)})",
                    hint="Give a directory that save_pretrained wrote, or --weights FILE",
                    code="model-unreadable",
                ) from error
            if what == "weights" and is_download_error(error):
                raise not_downloaded(self._spec, error) from error
            raise SourceError(
                f"The {what} of {self._spec} could not be loaded ({first_line(error)})",
                hint="Check the name and the network, or give the path of a local copy",
                code="model-not-loaded",
            ) from error


def _refuse_gaps(model: nn.Module, info: Mapping[str, Any], what: str) -> None:
    shapes = {key: (tuple(there), tuple(here)) for key, there, here in info["mismatched_keys"]}
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    # A published file may hold a head that the class does not use, but must not lack a tensor.
    if shapes or missing:
        raise describe_mismatch(model, what, shapes, missing, unexpected)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Within it, transformers prints neither progress nor reports of what it loaded."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _import_transformers() -> Any:
    import_torchvision()
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra.of("transformers", "hf", "A model of the kind hf:NAME") from error
    module: ModuleType = transformers
    return module

"""Tiny models, one for each family and more, on which every law of the package is tried.

`all_micros()` lists them by name; `all_detectors()` has more, on which only what depends on their
architecture is tried. Their weights are random but seeded, and everything that a
fresh model has at zero or one (biases, norms, BatchNorm statistics) is drawn too: a move that
forgets to take a bias or a running mean along would otherwise go unnoticed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from detectors import DETECTORS, SIDE
from torch import Tensor, nn

from tiedconv.schemes import all_schemes
from tiedconv.sources.torchvision_compat import import_torchvision

import_torchvision()


# Schemes for one kind of layer only: the tiny model that has such layers, and what they have to be
# told of it. No other model holds anything for them.
MEANT_FOR: dict[str, tuple[str, dict[str, Any]]] = {
    "lors-adaptive": ("generators", {"shape": [8, 8], "include": ["*channel*"]}),
}


def schemes() -> list[str]:
    """The schemes that find something in most models, with no option needed."""
    return [name for name in all_schemes() if name not in MEANT_FOR]


@dataclass(frozen=True)
class Micro:
    """A tiny model.

    Args:
        name: under which tests show it.
        build: makes the model, whatever its weights.
        example: an input from a generator.
        forward: model and input to logits.
        library: that its class comes from.
    """

    name: str
    build: Callable[[], nn.Module]
    example: Callable[[torch.Generator], Tensor]
    forward: Callable[[nn.Module, Tensor], Tensor]
    library: str = "torch"

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A copy of one's own of the seeded model, in evaluation mode."""
        return copy.deepcopy(_built(self.name)).to(dtype)

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The seeded example."""
        x = self.example(torch.Generator().manual_seed(1))
        return x.to(dtype) if x.is_floating_point() else x

    def logits(self, model: nn.Module) -> Tensor:
        """What a model answers to the example, in its own precision, no gradients."""
        dtype = next(p.dtype for p in model.parameters())
        with torch.no_grad():
            return self.forward(model, self.input(dtype))


@functools.cache
def _built(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = every_micro()[name].build()
    return settle(model).eval()


@functools.cache
def original_logits(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The untouched model's answer."""
    micro = every_micro()[name]
    return micro.logits(micro.model(dtype))


def settle(model: nn.Module) -> nn.Module:
    """Draw everything anew, so that nothing is zero, one, or a copy of another layer.

    Biases lie around 0, scales around 1, variances above 0; matrices keep the size of signals.
    """
    generator = torch.Generator().manual_seed(2)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.dim() == 0:
                continue
            if tensor.dim() > 1:
                fan_in = tensor[0].numel()
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * fan_in**-0.5)
            elif name.endswith("running_var"):
                tensor.copy_(draw(tensor, 0.5, 2.0))
            elif name.endswith(("bias", "running_mean")):
                tensor.copy_(draw(tensor, -0.2, 0.2))
            elif name.endswith("weight"):
                tensor.copy_(draw(tensor, 0.6, 1.4))
    return model


def _image(side: int = 16) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(2, 3, side, side, generator=generator)


def _plain(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x)
    assert isinstance(logits, Tensor)
    return logits


def _hf(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(pixel_values=x).logits
    assert isinstance(logits, Tensor)
    return logits


def _hf_ids(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(input_ids=x).logits
    assert isinstance(logits, Tensor)
    return logits


def _boxes(model: nn.Module, x: Tensor) -> Tensor:
    """Classes and boxes of a detector, side by side."""
    answer = model(pixel_values=x)
    return torch.cat([answer.logits, answer.pred_boxes], -1)


def _thawed(build: Callable[[], nn.Module]) -> nn.Module:
    """A detector whose backbone trains too: some of transformers' do not, as they come."""
    return build().requires_grad_(True)


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 8, 3, 2, 32, 64, num_classes=7)


def _torchvision_resnet(groups: int = 1, width: int = 16) -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    model = ResNet(Bottleneck, [2, 3, 1, 1], 7, groups=groups, width_per_group=width)
    # The last two stages hold most of the numbers and show nothing that the first two don't.
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(512, 7)
    return model


def _timm_vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(16, 8, num_classes=7, embed_dim=32, depth=3, num_heads=2, **options)


def _timm_deit() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(
        img_size=16, patch_size=8, num_classes=7, embed_dim=32, depth=3, num_heads=2
    )


def _timm_resnet() -> nn.Module:
    from timm.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, (2, 3, 1, 1), num_classes=7, channels=(8, 16, 16, 16), stem_width=8)


def _hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**_HF))


def _hf_deit() -> nn.Module:
    from transformers import DeiTConfig, DeiTForImageClassification

    return DeiTForImageClassification(DeiTConfig(**_HF))


def _hf_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=8, hidden_sizes=[32, 64], depths=[2, 3], layer_type="bottleneck",
            num_labels=7,
        )
    )  # fmt: skip


def _hf_imagegpt() -> nn.Module:
    from transformers import ImageGPTConfig, ImageGPTForImageClassification

    return ImageGPTForImageClassification(
        ImageGPTConfig(
            vocab_size=16, n_positions=12, n_embd=32, n_layer=3, n_head=2, num_labels=7,
            use_cache=False,
        )
    )  # fmt: skip


_HF: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_labels": 7,
}


class Encoder(nn.Module):
    """A classifier around `nn.TransformerEncoder`, with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.head = nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, tokens, 32)` to `(n, 7)`."""
        return self.head(self.encoder(x).mean(1))


class EncoderDecoder(nn.Module):
    """A classifier around `nn.Transformer`: self-attention and cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(32, 2, 2, 2, 64, batch_first=True, activation="gelu")
        self.query = nn.Parameter(torch.randn(1, 3, 32))
        self.head = nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, tokens, 32)` to `(n, 7)`."""
        query = self.query.expand(len(x), -1, -1)
        return self.head(self.transformer(x, query).mean(1))


class ConditionalDecoder(nn.Module):
    """Conditional DETR's decoder in its authors' names: content and position apart."""

    class Layer(nn.Module):
        """Self-attention and cross-attention of two heads, and a feed-forward."""

        def __init__(self) -> None:
            super().__init__()
            for name in (
                "sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v",
                "ca_qcontent", "ca_qpos", "ca_kcontent", "ca_kpos", "ca_v", "ca_qpos_sine",
            ):  # fmt: skip
                setattr(self, f"{name}_proj", nn.Linear(32, 32))
            self.self_attn = nn.ModuleDict({"out_proj": nn.Linear(32, 32)})
            self.cross_attn = nn.ModuleDict({"out_proj": nn.Linear(32, 32)})
            self.linear1, self.linear2 = nn.Linear(32, 64), nn.Linear(64, 32)
            self.activation = nn.functional.relu

        def forward(self, x: Tensor, pos: Tensor, memory: Tensor, place: Tensor) -> Tensor:
            """All `(n, tokens, 32)`."""
            q = self.sa_qcontent_proj(x) + self.sa_qpos_proj(pos)
            k = self.sa_kcontent_proj(x) + self.sa_kpos_proj(pos)
            x = x + self.self_attn["out_proj"](_attend(q, k, self.sa_v_proj(x)))
            here = self.ca_kpos_proj(place)
            q = self.ca_qcontent_proj(x) + self.ca_qpos_proj(pos)
            q = _beside(q, self.ca_qpos_sine_proj(pos.sin()))
            k = _beside(self.ca_kcontent_proj(memory) + here, here)
            x = x + self.cross_attn["out_proj"](_attend(q, k, self.ca_v_proj(memory)))
            return x + self.linear2(self.activation(self.linear1(x)))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))
        self.query, self.place = (nn.Parameter(torch.randn(1, n, 32)) for n in (3, 5))
        self.class_embed = nn.ModuleList(nn.Linear(32, 7) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 5, 32)` to `(n, 7)`."""
        query, place = (p.expand(len(x), -1, -1) for p in (self.query, self.place))
        answer, y = x.new_zeros(len(x), 7), x[:, :3]
        for layer, head in zip(self.layers, self.class_embed, strict=True):
            y = layer(y, query, x, place)
            answer = answer + head(y.mean(1))
        return answer


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of two heads."""
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _beside(a: Tensor, b: Tensor) -> Tensor:
    """Two parts of each of two heads."""
    return torch.cat([t.unflatten(-1, (2, -1)) for t in (a, b)], -1).flatten(2)


class ConvMixer(nn.Module):
    """A model that no family knows by name: numbered layers with inverted bottlenecks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.trunk = nn.ModuleList(
            nn.ModuleDict(
                {
                    "depthwise": nn.Conv2d(16, 16, 3, padding=1, groups=16),
                    "norm": nn.BatchNorm2d(16),
                    "expand": nn.Conv2d(16, 48, 1),
                    "project": nn.Conv2d(48, 16, 1),
                    "mix": nn.Conv2d(16, 16, 3, padding=1),
                }
            )
            for _ in range(3)
        )
        self.head = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 3, h, w)` to `(n, 7)`."""
        x = self.stem(x)
        for layer in self.trunk:
            y = layer["norm"](layer["depthwise"](x))
            x = x + layer["project"](torch.nn.functional.gelu(layer["expand"](y)))
            x = x + torch.tanh(layer["mix"](x))
        return self.head(x.mean((2, 3)))


class Aliased(nn.Module):
    """A model that shares by itself: one layer twice, and one matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(32, 32)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 2, 64) for _ in range(3))
        self.layers.append(self.layers[1])
        self.decode = nn.Linear(32, 32, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        """`(n, tokens, 32)` to `(n, 32)`."""
        x = self.encode(x)
        for layer in self.layers:
            x = layer(x)
        return self.decode(x).mean(1)


class AdaptiveMixing(nn.Module):
    """One layer of `Generators`: features are mixed by matrices that are made from a query."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Linear(32, 2 * 4 * 8)
        self.channel_generator = nn.Linear(32, 2 * 8 * 8)
        self.spatial_generator = nn.Linear(32, 2 * 6 * 4)
        self.out = nn.Linear(2 * 6 * 8, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)

    def forward(self, q: Tensor) -> Tensor:
        """`(n, tokens, 32)` to the same."""
        act = torch.nn.functional.gelu
        lead = q.shape[:2]
        x = self.points(q).reshape(*lead, 2, 4, 8)
        channels = self.channel_generator(q).reshape(*lead, 2, 8, 8)
        spatial = self.spatial_generator(q).reshape(*lead, 2, 6, 4)
        x = act(torch.nn.functional.layer_norm(x @ channels, (8,)))
        x = act(torch.nn.functional.layer_norm(spatial @ x, (8,)))
        q = self.norm1(q + self.out(x.flatten(2)))
        return self.norm2(q + self.down(act(self.up(q))))


class Generators(nn.Module):
    """Layers whose mixing weights are made from the query, as AdaMixer's decoder has them."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(AdaptiveMixing() for _ in range(3))
        self.head = nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, tokens, 32)` to `(n, 7)`."""
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean(1))


class Hybrid(nn.Module):
    """One or two layers of each kind that named families know beside plain transformers."""

    class Inverted(nn.Module):
        """An inverted bottleneck with squeeze-and-excitation, in timm's names."""

        def __init__(self) -> None:
            super().__init__()
            self.conv_pw, self.conv_pwl = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1)
            self.conv_dw = nn.Conv2d(32, 32, 3, padding=1, groups=32)
            self.se = nn.ModuleDict(
                {"conv_reduce": nn.Conv2d(32, 8, 1), "conv_expand": nn.Conv2d(8, 32, 1)}
            )

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.conv_dw(torch.relu(self.conv_pw(x))))
            squeezed = torch.relu(self.se["conv_reduce"](y.mean((2, 3), keepdim=True)))
            return x + self.conv_pwl(y * self.se["conv_expand"](squeezed).sigmoid())

    class Preactivated(nn.Module):
        """A bottleneck whose norms come first, with squeeze-and-excitation."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(16)
            self.conv1, self.conv3 = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
            self.se = nn.ModuleDict({"fc1": nn.Conv2d(8, 4, 1), "fc2": nn.Conv2d(4, 8, 1)})

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.conv1(torch.relu(self.norm(x))))
            y = torch.relu(self.conv2(y))
            squeezed = torch.relu(self.se["fc1"](y.mean((2, 3), keepdim=True)))
            return x + self.conv3(y * self.se["fc2"](squeezed).sigmoid())

    class Attending(nn.Module):
        """An attention of two heads under names of its own.

        Args:
            q, k, v, o: names of its layers; of q or k all parts that one layer gives.
            grouped: whether both heads have the same keys and values.
        """

        def __init__(self, q: str, k: str, v: str, o: str, *, grouped: bool = False) -> None:
            super().__init__()
            names = [q, k, v]
            widths = {name: 16 * names.count(name) for name in dict.fromkeys(names)}
            if grouped:
                widths |= {k: 8, v: 8}
            for name, width in [*widths.items(), (o, 16)]:
                self._put(name, nn.Linear(16, width))
            self.names, self.o, self.num_heads = list(widths), o, 2

        def _put(self, name: str, layer: nn.Module) -> None:
            where: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in where._modules:
                    where.add_module(part, nn.Module())
                where = where.get_submodule(part)
            where.add_module(last, layer)

        def forward(self, x: Tensor) -> Tensor:
            """`(n, tokens, 16)` to the same."""
            read = nn.functional.layer_norm(x, (16,))
            found = torch.cat([self.get_submodule(name)(read) for name in self.names], -1)
            if found.shape[-1] == 48:
                q, k, v = found.chunk(3, -1)
            else:
                q, k, v = found.split([16, 8, 8], -1)
                k, v = k.repeat(1, 1, 2), v.repeat(1, 1, 2)
            return x + self.get_submodule(self.o)(_attend(q, k, v))

    class Decoder(nn.Module):
        """A layer with grouped queries and a gated feed-forward."""

        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Hybrid.Attending(
                "q_proj", "k_proj", "v_proj", "o_proj", grouped=True
            )  # fmt: skip
            self.mlp = nn.ModuleDict(
                {
                    "gate_proj": nn.Linear(16, 24),
                    "up_proj": nn.Linear(16, 24),
                    "down_proj": nn.Linear(24, 16),
                }
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.self_attn(x)
            y = nn.functional.layer_norm(x, (16,))
            gate = nn.functional.silu(self.mlp["gate_proj"](y))
            return x + self.mlp["down_proj"](gate * self.mlp["up_proj"](y))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.ModuleList(self.Inverted() for _ in range(2))
        self.bottlenecks = nn.ModuleList(self.Preactivated() for _ in range(2))
        words = ("self.query", "self.key", "self.value", "output.dense")
        self.layer = nn.ModuleList(
            nn.ModuleDict({"attention": self.Attending(*words)}) for _ in range(2)
        )
        self.windows = nn.ModuleList(
            nn.ModuleDict({"attn": self.Attending("qkv", "qkv", "qkv", "proj")}) for _ in range(2)
        )
        self.reduced = nn.ModuleList(
            nn.ModuleDict({"attn": self.Attending("q", "kv", "kv", "proj")}) for _ in range(2)
        )
        self.decoders = nn.ModuleList(self.Decoder() for _ in range(2))
        self.head = nn.Linear(16, 9)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 3, h, w)` to `(n, 9)`."""
        x = self.stem(x)
        for block in (*self.blocks, *self.bottlenecks):
            x = block(x)
        x = x.flatten(2).mT
        for layer in (*self.layer, *self.windows, *self.reduced):
            x = next(iter(layer.values()))(x)
        for decoder in self.decoders:
            x = decoder(x)
        return self.head(x.mean(1))


def _perceptron() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(48, 24)]
    for _ in range(3):
        layers += [nn.GELU(), nn.Linear(24, 24)]
    return nn.Sequential(*layers, nn.Linear(24, 7))


def _tokens(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 5, 32, generator=generator)


def _ids(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 15, (2, 8), generator=generator)


@functools.cache
def all_micros() -> dict[str, Micro]:
    """Every tiny model, by name."""
    micros = (
        Micro("torchvision-vit", _torchvision_vit, _image(), _plain, "torchvision"),
        Micro("torchvision-resnet", _torchvision_resnet, _image(32), _plain, "torchvision"),
        Micro(
            "torchvision-resnext",
            functools.partial(_torchvision_resnet, groups=4, width=4),
            _image(32),
            _plain,
            "torchvision",
        ),
        Micro("timm-vit", _timm_vit, _image(), _plain, "timm"),
        Micro(
            "timm-vit-qknorm",
            functools.partial(_timm_vit, qk_norm=True, init_values=0.5, class_token=False,
                              global_pool="avg"),
            _image(),
            _plain,
            "timm",
        ),
        Micro("timm-deit", _timm_deit, _image(), _plain, "timm"),
        Micro("timm-resnet", _timm_resnet, _image(32), _plain, "timm"),
        Micro("hf-vit", _hf_vit, _image(), _hf, "transformers"),
        Micro("hf-deit", _hf_deit, _image(), _hf, "transformers"),
        Micro("hf-resnet", _hf_resnet, _image(32), _hf, "transformers"),
        Micro("hf-imagegpt", _hf_imagegpt, _ids, _hf_ids, "transformers"),
        Micro("torch-encoder", Encoder, _tokens, _plain),
        Micro("torch-transformer", EncoderDecoder, _tokens, _plain),
        Micro("conditional-decoder", ConditionalDecoder, _tokens, _plain),
        all_detectors()["hf-deformable-detr-refined"],
        Micro("aliased", Aliased, _tokens, _plain),
        Micro("convmixer", ConvMixer, _image(), _plain),
        Micro("hybrid", Hybrid, _image(), _plain),
        Micro("perceptron", _perceptron, _image(4), _plain),
        Micro("generators", Generators, _tokens, _plain),
    )  # fmt: skip
    return {m.name: m for m in micros}


@functools.cache
def all_detectors() -> dict[str, Micro]:
    """A tiny model of each query-based detector of transformers, by name."""
    return {
        name: Micro(name, functools.partial(_thawed, build), _image(SIDE), _boxes, "transformers")
        for name, build in DETECTORS.items()
    }


def every_micro() -> dict[str, Micro]:
    """All of them."""
    return {**all_micros(), **all_detectors()}

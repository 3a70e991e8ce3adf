"""The detector: a ResNet, 1x1 convolutions to one width, queries, the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from adamixer.decoder import Decoder, Queries
from adamixer.settings import Setting, setting_of
from tiedconv.sources.torchvision_compat import import_torchvision


class Backbone(nn.Module):
    """The four stages C2 to C5 of a ResNet of torchvision, at strides 4, 8, 16 and 32."""

    def __init__(self, name: str, weights: str | None) -> None:
        super().__init__()
        self.body = import_torchvision().models.get_model(name, weights=weights)
        self.channels: list[int] = [
            _outputs(getattr(self.body, f"layer{i}")) for i in (1, 2, 3, 4)
        ]  # fmt: skip
        del self.body.fc  # the classifier takes no part

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (batch, 3, height, width) to four maps."""
        body = self.body
        x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        maps = []
        for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class Head(nn.Module):
    """All behind the backbone: channel mapping, queries, decoder.

    There is no feature pyramid network: the adaptive sampling itself chooses among the maps.
    """

    def __init__(self, channels: Sequence[int], setting: Setting) -> None:
        super().__init__()
        self.mappings = nn.ModuleList(nn.Conv2d(c, setting.width, 1) for c in channels)
        self.queries = Queries(setting)
        self.decoder = Decoder(setting)
        self.setting = setting

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps of the backbone to the answers of each stage, see `Decoder.forward`."""
        batch, _, height, width = maps[0].shape
        stride = self.setting.strides[0]
        mapped = [layer(x) for layer, x in zip(self.mappings, maps, strict=True)]
        content, xyzr = self.queries(batch, height * stride, width * stride)
        found: tuple[Tensor, Tensor] = self.decoder(mapped, content, xyzr)
        return found


class Detector(nn.Module):
    """Images to class logits and boxes of each stage."""

    def __init__(self, backbone: str, weights: str | None, setting: Setting) -> None:
        super().__init__()
        self.backbone = Backbone(backbone, weights)
        self.head = Head(self.backbone.channels, setting)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (batch, 3, height, width), sides multiples of 32, to the answers.

        Returns:
            class logits (stages, batch, queries, classes), and boxes as corners in pixels
            (stages, batch, queries, 4). The last stage's are the detections: there is no
            non-maximum suppression.
        """
        found: tuple[Tensor, Tensor] = self.head(self.backbone(images))
        return found


def _outputs(stage: nn.Module) -> int:
    """Channels that a stage of a ResNet makes: conv3 ends a bottleneck, conv2 a basic block."""
    block = list(stage.children())[-1]
    last = getattr(block, "conv3", None) or block.conv2
    return int(last.out_channels)  # type: ignore[arg-type, union-attr]


def detector(
    setting: str = "stock", backbone: str = "resnet50", weights: str | None = None, **changes: Any
) -> Detector:  # fmt: skip
    """An AdaMixer.

    Args:
        setting: `stock` or `lors`, see `settings`.
        backbone: a ResNet of torchvision.
        weights: of the backbone, as torchvision names them; None for random ones.
        changes: of the setting.
    """
    return Detector(backbone, weights, setting_of(setting, **changes))

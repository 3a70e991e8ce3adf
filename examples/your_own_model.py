"""Tie a model of your own in memory, and train it: python examples/your_own_model.py [FILE]"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import tiedconv


def block(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Mixer(nn.Module):
    """Any model will do whose layers stand in a numbered stack."""

    def __init__(self, width: int = 64, depth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(48, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.blocks:
            x = x + layer(x)
        return self.head(x)


def main(arguments: list[str]) -> None:
    file = Path((arguments or ["mixer.safetensors"])[0])
    model = tiedconv.convert(Mixer(), "lors", rank=4)  # a tied copy; inplace=True changes it
    report = tiedconv.report(model)
    print(f"{report.original:,} parameters became {report.stored:,} ({report.ratio:.0%})")

    # Stored tensors are ordinary parameters: optimisers, EMA, compile and autocast just work.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = torch.randn(32, 48), torch.randint(10, (32,))
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()

    # A file can't build a class that it does not know: give it an instance to load into.
    tiedconv.save(model, file, force=True)
    again = tiedconv.load(file, model=Mixer())
    expected = model.eval()(images)
    assert torch.equal(again(images), expected)

    # Frozen, it computes each weight once, for inference; untied, it is plain and dense again.
    for other in (tiedconv.freeze(again), tiedconv.untie(model)):
        torch.testing.assert_close(other(images), expected, atol=1e-5, rtol=1e-4)
    print("loaded, frozen and untied: the same outputs")


if __name__ == "__main__":
    main(sys.argv[1:])

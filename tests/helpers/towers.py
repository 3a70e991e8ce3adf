"""A tiny model of two towers, and samples of images and text for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiedconv.sources.torchvision_compat import import_torchvision

TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TOKENS, LAST = 99, 98


def clip() -> nn.Module:
    """A CLIP of two layers a tower, for images of 32 x 32 pixels; its weights are random."""
    import_torchvision()
    from transformers import CLIPConfig, CLIPModel

    text = {
        **TOWER, "vocab_size": TOKENS, "max_position_embeddings": 20, "bos_token_id": 0,
        "eos_token_id": LAST, "pad_token_id": 1,
    }  # fmt: skip
    vision = {**TOWER, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model: nn.Module = CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    )
    return model.eval()


def bert() -> nn.Module:
    """A BERT of two layers for the same vocabulary."""
    import_torchvision()
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model: nn.Module = BertModel(BertConfig(**TOWER, vocab_size=TOKENS, max_position_embeddings=20))
    return model.eval()


def pairs(count: int, tokens: int = 8) -> list[dict[str, Any]]:
    """Samples as a data set of transformers gives them, with a label that nobody may read."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    texts = torch.randint(2, LAST, (count, tokens), generator=generator).tolist()
    return [
        {
            "pixel_values": image, "input_ids": [0, *words, LAST],
            "attention_mask": [1] * (tokens + 2), "labels": "unreadable", "text": "a photo",
        }
        for image, words in zip(images, texts, strict=True)
    ]  # fmt: skip

"""LORS for a decoder: the recipe, and the paper's initial values for training from scratch."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import nn

from adamixer.settings import LORS, Setting
from tiedconv.planning.recipe import Recipe, Rule

RECIPE = Path(__file__).with_name("lors.toml")


def recipe_for(setting: Setting = LORS, *, scratch: bool = False) -> Recipe:
    """The recipe of `lors.toml`, for a narrower decoder with its shapes and ranks to scale.

    Args:
        setting: of the decoder.
        scratch: spare the adaptive rules their fit, which a training from scratch has no use for.
    """
    recipe = Recipe.from_toml(RECIPE)
    shapes = {
        "channel": [setting.channels, setting.channels],
        "spatial": [setting.out_points, setting.in_points],
    }

    def scaled(rule: Rule) -> Rule:
        options = dict(rule.options)
        options["rank"] = max(1, options["rank"] * setting.width // LORS.width)
        options["k"] = options["k"][: setting.stages]
        for name, shape in shapes.items():
            if name in rule.include[0]:
                options |= {"shape": shape, "scratch": scratch}
        return dataclasses.replace(rule, options=options)

    return dataclasses.replace(recipe, rules=tuple(map(scaled, recipe.rules)))


def reset_lors(model: nn.Module) -> None:
    """The paper's initial values, for a decoder that is trained from scratch.

    A is Kaiming-uniform, B zero, so that at first all stages have the shared weight. Neither the
    shared generator nor E depends on the query at first; their last columns, the biases, are
    random, since a product of two zeros would never learn.
    """
    for name, parameter in model.named_parameters():
        factor = name.rpartition("/")[2]
        if not name.startswith("tied/"):
            continue
        with torch.no_grad():
            if factor.startswith("B"):
                parameter.zero_()
            elif factor.startswith("A"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            elif "projection" in name:
                nn.init.xavier_uniform_(parameter)
            else:
                bound = 1 / math.sqrt(parameter.shape[1] - 1)
                parameter[:, :-1].zero_()
                parameter[:, -1].uniform_(-bound, bound)

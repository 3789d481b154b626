"""Chips that nobody made, one after the other: what surrogates are trained on so that they suit any."""

from __future__ import annotations

from torch import nn

from ..backbone import backbone_layers
from ..surrogate import core_model
from .chip import generator_for
from .hook import OnChip
from .moments import ChipMoments, chip_moments


class SampledChips:
    """
    Give the layers of a model the weights of other chips of their kind.

    Weights and offsets are normal over chips, with the moments that cells and columns give them; that takes a
    hundredth of the time that making a chip takes. The seeds have nothing in common with those of chips.

    Args:
        model (`nn.Module`): on a chip.
        seed (`int`): of the chips.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self.seed = seed
        self.layers: list[tuple[OnChip, ChipMoments]] = []
        for _, layer in backbone_layers(core_model(model)):
            if layer.chip is not None:
                chip: OnChip = layer.chip
                self.layers.append((chip, chip_moments(layer, chip.config)))

    def take(self, *names: object) -> None:
        """Take the chip of these names; the same names are the same chip."""
        for chip, moments in self.layers:
            chip.vary(moments, generator_for(self.seed, "sampled", *names, chip.name))

    def restore(self) -> None:
        """Take the chip that is attached again."""
        for chip, _ in self.layers:
            chip.restore()

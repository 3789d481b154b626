"""Chips that nobody made: what a layer is over all of a kind, and samples of them to train on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import logging

from ..backbone import backbone_layers
from ..formats import BackboneLayer
from ..surrogate import core_model
from .array import Converter
from .chip import cut_moments, generator_for, nominal_factor
from .configuration import CIMConfig
from .fast import typical_readings
from .hook import OnChip
from .planes import grouped_weights, weight_code

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ChipMoments:
    """
    What a layer is over all chips of a kind, by the fast model.

    Attributes:
        mean, variance (`torch.Tensor` of shape `(out, in)`): of each weight over chips, float32. What the gain of a
            column does to its weights alike is counted for each by itself, right for uncorrelated inputs of mean 0.
        reading (`torch.Tensor` of shape `(out,)`): variance of an output for typical integer inputs from reading to
            reading: noise, and what the ADC rounds off.
        offset (`torch.Tensor` of shape `(out,)`): variance of an output over chips that the offsets of columns make,
            the sum over planes and groups of `(scale_g significance)^2 Var(bias)`, with the bias of
            [`~hf_polarize.cim.fast.TypicalReadings`] over normal offsets.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    reading: torch.Tensor
    offset: torch.Tensor


def chip_moments(layer: BackboneLayer, config: CIMConfig) -> ChipMoments:
    """
    Compute the moments from what is written.

    Args:
        layer ([`~hf_polarize.formats.BackboneLayer`]): the backbone's.
        config ([`CIMConfig`]): of the chips; an ADC counts with its full range, whatever `adc_range` says.
    """
    levels = layer.levels()
    indices, scale = grouped_weights(layer.units(), layer.block_scales(), layer.block_size, config, levels)
    code, indices = weight_code(config, levels), indices.int()
    often = torch.bincount(indices.flatten(), minlength=len(code.cells)).cpu().double() / indices.numel()
    works, one = 1 - config.stuck_at_zero - config.stuck_at_one, config.stuck_at_one
    typical = typical_readings(
        [round(density, 2) for density in (works * (often @ (code.cells != 0).double()) + one).tolist()],
        code.significance, layer.in_features, Converter.of(config, float(config.rows)),
        config.unseeded,
    )  # fmt: skip
    cells = code.cells.double()
    held, square = works * cells + (0 if config.signed else one), works * cells.square() + one  # stuck at 1, or +-1
    drifted = config.log_drift_spread**2  # of a log-normal factor; once is its mean, twice its mean square
    once, twice = cut_moments(config.cell_mismatch)
    once, twice = math.exp(drifted / 2) * once, math.exp(2 * drifted) * twice * (1 + config.column_gain**2)
    kappa, squared = typical.kappa, code.significance.square()
    # a cell reads as held * ((1 - kappa) * mean + kappa * factor * wire): stuck cells count in full, spread by kappa
    wire = nominal_factor(config, scale.device) / config.drift
    average, free = float(wire.mean()), square - held.square()
    parts = (
        (held * (1 - kappa) * average) @ code.significance, (held * kappa * once) @ code.significance,
        (free * ((1 - kappa) * average).square()) @ squared,
        (free * 2 * (1 - kappa) * kappa * average * once) @ squared,
        (kappa.square() * (square * twice - (held * once).square())) @ squared,
    )  # fmt: skip
    fixed, following, *spread = (part.float().to(scale.device)[indices] for part in parts)
    mean = (fixed + following * wire) * scale[..., None]
    variance = (spread[0] + spread[1] * wire + spread[2] * wire.square()) * scale[..., None].square()
    counts = (scale / config.drift).square().sum(1)
    around = typical.biases - (typical.biases @ typical.often)[:, None]
    offset = float(squared @ around.square() @ typical.often)
    return ChipMoments(
        mean.flatten(1)[:, : layer.in_features], variance.flatten(1)[:, : layer.in_features],
        counts * typical.variance, counts * offset,
    )  # fmt: skip


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
                self.layers.append((layer.chip, chip_moments(layer, layer.chip.config)))
        exact = [chip for chip, _ in self.layers if chip.exact]
        if exact:
            logger.warning(
                f"cim: sampled chips run by the fast model, while {len(exact)} layers of the one that is attached run "
                f"exactly, among them {exact[0].name} ({exact[0].reason or 'model=' + repr(exact[0].config.model)}): "
                "training does not see the difference. sample_chips=False trains on the chip that is attached"
            )

    def take(self, *names: object) -> None:
        """Take the chip of these names; the same names are the same chip."""
        for chip, moments in self.layers:
            chip.vary(moments, generator_for(self.seed, "sampled", *names, chip.name))

    def restore(self) -> None:
        """Take the chip that is attached again."""
        for chip, _ in self.layers:
            chip.restore()

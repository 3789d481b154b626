"""Ranges of ADCs, measured on data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..formats import BackboneLayer
from ..models import Batch, to_model
from .array import Converter
from .chip import nominal_factor
from .configuration import CIMConfig
from .planes import grouped_weights, integer_planes, quantized_inputs, weight_code

SAMPLED_TOKENS = 128
"""Tokens of each layer whose counts are looked at; that makes millions of counts."""
CANDIDATES = 64
"""Ranges that are tried for the least mean squared error."""


@torch.no_grad()
def measured_ranges(
    model: PreTrainedModel, layers: Mapping[str, BackboneLayer], config: CIMConfig, data: Iterable[Batch]
) -> dict[str, float]:
    """
    Measure the largest count that the ADC of each layer should reach.

    The model runs, digital, on the data; counts are those of an array without mismatch and noise, for the inputs that
    it gets: less what a surrogate takes out of them, where layers run deflated.

    Args:
        model (`PreTrainedModel`): off any chip.
        layers (`Mapping[str, BackboneLayer]`): to measure.
        config ([`CIMConfig`]): of the chip; its `adc_range` says how.
        data (`Iterable[dict[str, torch.Tensor]]`): batches; tokens are taken from their beginning.

    Returns:
        `dict[str, float]`: in counts, by layer.
    """
    found = {name: torch.zeros(config.rows + 1, dtype=torch.float64) for name in layers}
    seen = dict.fromkeys(layers, 0)

    def watch(name: str) -> object:
        def hook(layer: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1])[: SAMPLED_TOKENS - seen[name]]
            if len(x):
                seen[name] += len(x)
                deflation = layers[name].deflation
                seen_by_array = deflation.rest(x)[0] if deflation is not None and deflation.active else x
                found[name] += count_histogram(layers[name], seen_by_array, config)

        return layers[name].register_forward_pre_hook(hook)

    handles = [watch(name) for name in layers]
    try:
        for batch in data:
            model(**to_model(batch, model))
            if min(seen.values()) >= SAMPLED_TOKENS:
                break
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
    unseen = [name for name, tokens in seen.items() if not tokens]
    if unseen:
        raise ValueError(f"cim: no input of the data reached {unseen[0]}; its ADC can't be given a range")
    wear = float(nominal_factor(config, torch.device("cpu")).mean())
    return {name: wear * best_range(histogram, config) for name, histogram in found.items()}


def count_histogram(layer: BackboneLayer, x: torch.Tensor, config: CIMConfig) -> torch.Tensor:
    """Return how often each magnitude of a count occurs, `(rows + 1,)`, float64, over all pairs of planes."""
    levels = layer.levels()
    indices, _ = grouped_weights(layer.units(), layer.block_scales(), layer.block_size, config, levels)
    code = weight_code(config, levels)
    q, _ = quantized_inputs(x, config.input_bits)
    q = torch.nn.functional.pad(q, (0, indices.shape[1] * config.rows - q.shape[1]))
    planes, _ = integer_planes(q, config.input_bits, config.encoding)
    driven = planes.view(len(planes), len(q), -1, config.rows).permute(2, 0, 1, 3).flatten(1, 2).float()
    histogram = torch.zeros(config.rows + 1, dtype=torch.float64)
    for p in range(code.cells.shape[1]):
        cells = code.cells[:, p].to(indices.device)[indices.int()].float()
        for group, inputs in enumerate(driven):  # one at a time: all counts of a wide layer are gigabytes
            counts = inputs @ cells[:, group].T
            histogram += torch.bincount(counts.abs().flatten().int(), minlength=config.rows + 1).double().cpu()
    return histogram


def best_range(histogram: torch.Tensor, config: CIMConfig) -> float:
    """
    Return the largest count of an ADC by the way that `config.adc_range` says.

    Args:
        histogram (`torch.Tensor` of shape `(rows + 1,)`): of the magnitudes of counts.
        config ([`CIMConfig`]): `"max"`, `"percentile"` or `"mse"`.
    """
    counts = torch.arange(len(histogram), dtype=torch.float64)
    largest = max(1.0, float(counts[histogram > 0].max()))
    if config.adc_range == "max":
        return largest
    if config.adc_range == "percentile":
        share = histogram.cumsum(0) / histogram.sum()
        return max(1.0, float(counts[share >= config.percentile / 100 - 1e-12][0]))
    best, least = largest, float("inf")
    for candidate in (largest * (i + 1) / CANDIDATES for i in range(CANDIDATES)):
        converter = Converter.of(config, candidate)
        assert converter is not None
        error = float((histogram * (converter(counts) - counts).square()).sum())
        if error < least:
            best, least = candidate, error
    return best

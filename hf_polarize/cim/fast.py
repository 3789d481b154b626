"""The fast model: the weights that a chip amounts to, and noise with the moments of its readings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numba
import numpy as np
import torch

from ..models import bfloat16_is_fast
from .array import TABLE, Converter, integer_products, normal_table
from .chip import Plane, byte_digits, nominal_factor
from .configuration import CIMConfig
from .fitting import fit_to_readings
from .moments import ReadMoments, column_offsets, read_moments
from .planes import integer_planes, quantized_inputs
from .token_noise import TokenNoise, driven_rows

SAMPLED_TOKENS = 64
"""Normal inputs that say what a layer usually reads."""
PAIRS = 16384
"""Random pairs of readings that say how far copies of a plane err together."""
LARGEST_WHOLE = 127 * 256 + 127
"""Weights are integers up to this one where they are multiplied as such."""
PIECE = 2**18
"""The longest stretch of the table of normal numbers that noise is cut from."""


def _some_numbers(rows: int) -> list[int]:
    """Return the numbers of rows for which moments are computed; for others they are interpolated."""
    return sorted({0, rows, *(round(2 ** (i / 2)) for i in range(2 * int(math.log2(rows)) + 1))})


@lru_cache(maxsize=256)  # the planes of a chip, and of all of its kind, are much alike
def _moments_by_rows(converter: Converter | None, cells: float, config: CIMConfig) -> ReadMoments:
    """Return the moments of a plane for 0, 1, ... driven rows, between some numbers of them by straight lines."""
    some = _some_numbers(config.rows)
    known = read_moments(converter, torch.tensor(some), torch.tensor([cells], dtype=torch.float64), config)
    wanted = np.arange(config.rows + 1)

    def between(values: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.interp(wanted, some, values[:, 0].numpy()))

    biases = torch.stack([between(biases) for biases in known.biases])
    return ReadMoments(biases, *map(between, (known.kappa, known.variance, known.static)))


@lru_cache(maxsize=64)
def agreement(converter: Converter, cells: float, config: CIMConfig) -> torch.Tensor:
    """
    Return how far two readings of one column err together if their input planes differ in 0, 1, ... rows.

    Small numbers in two's complement have a sign in many planes: these are copies of each other, a reading of a copy
    errs as the first does, and their significances all but cancel. The correlation is that of [`PAIRS`] random pairs
    of readings, with half of the rows driven.

    Args:
        converter ([`Converter`]): the ADC.
        cells (`float`): how often a cell is not zero.
        config ([`CIMConfig`]): of the chip, in two's complement.

    Returns:
        `torch.Tensor` of shape `(rows + 1,)`, float64.
    """
    rows, random = config.rows, np.random.RandomState(0)  # the one whose numbers NumPy never changes (NEP 19)
    factor, mismatch = float(nominal_factor(config, torch.device("cpu")).mean()), config.static_variance**0.5

    def normal(deviation: float | np.ndarray) -> np.ndarray:
        return deviation * random.normal(size=PAIRS)

    some, found = _some_numbers(rows), []
    gains, offsets = normal(config.column_gain), normal(config.column_offset)
    for differing in some:
        kept = random.binomial(max(0, rows // 2 - differing // 2), cells, PAIRS)
        shared = normal(mismatch * np.sqrt(kept))
        errors = []
        for others in (differing // 2, differing - differing // 2):
            own = random.binomial(others, cells, PAIRS)
            count = factor * (kept + own)
            static = factor * (shared + normal(mismatch * np.sqrt(own))) + gains * count + offsets
            error = converter(torch.from_numpy(count + static + normal(config.reading_noise))).numpy() - count
            errors.append(error - np.polyval(np.polyfit(static, error, 1), static) if static.any() else error)
        a, b = (error - error.mean() for error in errors)
        found.append(np.mean(a * b) / max(np.sqrt(np.mean(a * a) * np.mean(b * b)), 1e-30))
    return torch.from_numpy(np.interp(np.arange(rows + 1), some, found))


@dataclass
class FastArray:
    """
    What a layer amounts to on one chip: `y = q W^T + offset + loudness(q) * std * n`, with n normal.

    W is rounded to 16 bits of the largest weight of a row on CPUs with instructions for products of int8, and to
    bfloat16 on devices that are fast in it.

    Attributes:
        weight (`torch.Tensor` of shape `(out, in)`): of this chip, for integer inputs.
        offset (`torch.Tensor` of shape `(out,)`): float32.
        bias (`torch.Tensor` of shape `(out,)`): the mean of `offset` over chips, float32.
        std (`torch.Tensor` of shape `(out,)`): of the noise of a typical token, float32.
        loudness ([`TokenNoise`]): of each token against that.
    """

    weight: torch.Tensor
    offset: torch.Tensor
    bias: torch.Tensor
    std: torch.Tensor
    loudness: TokenNoise

    @cached_property
    def digits(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weight as `step * (256 * high + low)`: two int8 `(out, in)`, and the step `(out,)`, float32."""
        step = (self.weight.abs().amax(1) / LARGEST_WHOLE).clamp(min=torch.finfo(torch.float32).tiny)
        high, low = byte_digits((self.weight / step[:, None]).round().to(torch.int16))
        return high, low, step

    def __call__(self, q: torch.Tensor, scale: torch.Tensor, noise: torch.Generator | None = None) -> torch.Tensor:
        """
        Multiply integer inputs.

        Args:
            q (`torch.Tensor` of shape `(tokens, in)`): of [`~hf_polarize.cim.planes.quantized_inputs`].
            scale (`torch.Tensor` of shape `(tokens, 1)`): what the integers are to be multiplied by.
            noise (`torch.Generator`, *optional*): of the noise of readings.

        Returns:
            `torch.Tensor` of shape `(tokens, out)`, float32.
        """
        return (self._on_cpu if q.device.type == "cpu" else self._anywhere)(q, scale, noise)

    def _anywhere(self, q: torch.Tensor, scale: torch.Tensor, noise: torch.Generator | None) -> torch.Tensor:
        y = torch.nn.functional.linear(q.to(self.weight.dtype), self.weight).float().add_(self.offset)
        if noise is not None:
            y.addcmul_(normal_like(y, noise) * self.loudness(q), self.std)
        return y.mul_(scale)

    def _on_cpu(self, q: torch.Tensor, scale: torch.Tensor, noise: torch.Generator | None) -> torch.Tensor:
        """Do what [`_anywhere`] does in one pass over the outputs; by two products of integers where they are fast."""
        low = step = starts = loudness = table = None
        if integer_products(q.shape[1]):
            whole, (first, second, steps) = q.to(torch.int8), self.digits
            high, low = torch._int_mm(whole, first.T).numpy(), torch._int_mm(whole, second.T).numpy()
            step = steps.numpy()
        else:
            high = torch.nn.functional.linear(q, self.weight).numpy()
        y = q.new_empty(len(q), len(self.weight))
        if noise is not None:
            starts, loudness = _stretches(y.numel(), noise).numpy(), self.loudness(q).numpy()
            table = normal_table(q.device).numpy()
        _finish(
            high, low, step, self.offset.numpy(), self.std.numpy(), loudness, table, starts, scale.numpy(), y.numpy()
        )  # fmt: skip
        return y

    def to(self, device: torch.device) -> FastArray:
        offset, bias, std = (t.to(device) for t in (self.offset, self.bias, self.std))
        halved = device.type != "cpu" and bfloat16_is_fast(device)  # integers of 8 bits are exact there
        weight = self.weight.to(device, torch.bfloat16 if halved else torch.float32)
        return FastArray(weight, offset, bias, std, self.loudness.to(device))


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _finish(high, low, step, offset, std, loudness, table, starts, scale, y):  # type: ignore[no-untyped-def]
    """
    Fill `y` (tokens, out) in with `scale * (product + offset + loudness * std * n)`.

    The product is `high`, float32, or where there is a `low` `step * (256 * high + low)` of int32. The numbers n are
    those of [`normal_like`]; none where there is no `starts`.
    """
    columns = y.shape[1]
    for t in range(y.shape[0]):
        factor = scale[t, 0]
        begin = 0
        while begin < columns:
            place = t * columns + begin
            end = columns if starts is None else min(columns, begin + PIECE - place % PIECE)
            row, first, bias = y[t, begin:end], high[t, begin:end], offset[begin:end]
            if low is not None:
                second, unit = low[t, begin:end], step[begin:end]
            if starts is not None:
                at = starts[place // PIECE] + place % PIECE
                numbers, deviation, loud = table[at : at + len(row)], std[begin:end], loudness[t, 0]
            for j in range(len(row)):
                if low is not None:
                    value = unit[j] * (np.float32(256) * np.float32(first[j]) + np.float32(second[j]))
                else:
                    value = first[j]
                value += bias[j]
                if starts is not None:
                    value += numbers[j] * loud * deviation[j]
                row[j] = factor * value
            begin = end


def _stretches(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return where in the table each stretch of [`PIECE`] of so many normal numbers begins."""
    return torch.randint(TABLE - PIECE, (-(-count // PIECE),), generator=generator, device=generator.device)


def normal_like(y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    Return normal numbers of the shape of `y`, stretches of a table from places that the generator draws.

    A hundred times cheaper than new ones.
    """
    table, left = normal_table(y.device), y.numel()
    pieces = []
    for start in _stretches(left, generator).tolist():
        pieces.append(table[start : start + min(left, PIECE)])
        left -= PIECE
    return torch.cat([table[:0], *pieces]).view(y.shape)


@dataclass(frozen=True)
class TypicalReadings:
    """
    What the readings of a layer are for normal inputs.

    Attributes:
        inputs (`torch.Tensor` of shape `(tokens, in)`): integers, those of normal numbers.
        coefficients (`torch.Tensor` of shape `(planes of inputs,)`): their significances, float64.
        kappa (`torch.Tensor` of shape `(planes,)`): how far readings of each plane of the weight follow its cells.
        offsets, often (`torch.Tensor` of shape `(offsets,)`): those of [`~hf_polarize.cim.moments.column_offsets`].
        biases (`torch.Tensor` of shape `(planes, offsets)`): what a column of each plane with such an offset adds to
            an output, for a scale and a significance of 1, float64. An ADC swallows what is small beside its steps.
        each (`torch.Tensor` of shape `(rows + 1,)`): variance of all readings of one plane of inputs that drives so
            many rows, for a scale of 1, float64.
        variance (`float`): of an output, for one group with a scale of 1.
    """

    inputs: torch.Tensor
    coefficients: torch.Tensor
    kappa: torch.Tensor
    offsets: torch.Tensor
    often: torch.Tensor
    biases: torch.Tensor
    each: torch.Tensor
    variance: float


def typical_readings(
    cells: Sequence[float],
    significance: torch.Tensor,
    in_features: int,
    converter: Converter | None,
    config: CIMConfig,
) -> TypicalReadings:
    """
    Average [`read_moments`] over the rows that normal inputs drive.

    Args:
        cells (`Sequence[float]`): how often those of each plane of the weight are not zero.
        significance (`torch.Tensor` of shape `(planes,)`): of the planes of the weight, float64.
        in_features (`int`): of the layer.
        converter ([`Converter`], *optional*): the ADC.
        config ([`CIMConfig`]): of the chips; `unseeded`, so that all share what was computed before.
    """
    numbers = torch.randn(SAMPLED_TOKENS, in_features, generator=torch.Generator().manual_seed(0))
    q, _ = quantized_inputs(numbers, config.input_bits)
    bits, coefficients = integer_planes(q, config.input_bits, config.encoding)
    kind = "magnitude" if config.signed else "bits"
    driven = driven_rows(q, -(-in_features // config.rows), config.rows, len(coefficients), kind)
    often = torch.nn.functional.one_hot(driven, config.rows + 1).double().mean((0, 1))  # (planes, rows + 1)
    of_planes = [_moments_by_rows(converter, density, config) for density in cells]
    kappas, variances, static = (
        torch.stack([getattr(moments, part) for moments in of_planes], 1) for part in ("kappa", "variance", "static")
    )
    # planes of inputs drive rows in common and err together there: weights by the covariance of what they drive
    shared = bits.flatten(1).double() @ bits.flatten(1).double().T
    weights = coefficients * (shared @ coefficients)
    followed = (often @ (kappas * (static + 1e-30))) / (often @ (static + 1e-30))
    kappa = weights @ followed / weights.sum()
    each = (variances + (kappas - kappa).square() * static) @ significance.square()
    biases = torch.stack([moments.biases @ often.T @ coefficients for moments in of_planes])
    return TypicalReadings(
        q, coefficients, kappa, *column_offsets(converter, config), biases, each,
        float(coefficients.square() @ often @ each),
    )  # fmt: skip


@torch.no_grad()
def fast_array(
    planes: Sequence[Plane], scale: torch.Tensor, converter: Converter | None, config: CIMConfig, in_features: int
) -> tuple[FastArray, str | None]:
    """
    Fold the planes of a layer into one weight, and fit the noise to the exact model.

    Weights follow from [`read_moments`]; so does the noise of each token, by the rows that its planes drive, up to a
    factor: readings of planes that are nearly copies of each other (the signs of small numbers in two's complement)
    err together. The factor is the one that a sample of the layer's own columns has in the exact model, on normal
    inputs; [`~hf_polarize.cim.fitting.other_tokens`] are judged beside them.

    Args:
        planes (`Sequence[Plane]`): of [`~hf_polarize.cim.chip.fabricate`].
        scale (`torch.Tensor` of shape `(out, groups)`): of a count.
        converter ([`Converter`], *optional*): the ADC.
        config ([`CIMConfig`]): of the chip.
        in_features (`int`): of the layer, without the rows that fill the last group.

    Returns:
        The fast model, and why it is not valid here, or `None`.
    """
    significance = torch.tensor([plane.significance for plane in planes], dtype=torch.float64)
    cells = [round(float((plane.cells != 0).double().mean()), 2) for plane in planes]
    any_chip = config.unseeded
    typical = typical_readings(cells, significance, in_features, converter, any_chip)
    q, coefficients = typical.inputs, typical.coefficients
    kappa, each, variance = typical.kappa, typical.each, typical.variance
    bias = float(significance @ typical.biases @ typical.often)

    factor = float(nominal_factor(config, scale.device).mean())
    total, offset = torch.zeros(planes[0].cells.shape, device=scale.device), torch.zeros_like(scale)
    for plane, k, biases in zip(planes, kappa.tolist(), typical.biases.numpy(), strict=True):
        made = plane.cells.float() * plane.unit
        if plane.gain is not None:
            made *= plane.gain.T[..., None]
        total += plane.significance * (k * made + (1 - k) * factor * plane.held)
        of_columns = np.zeros(1) if plane.offset is None else plane.offset.T.cpu().numpy()
        own = torch.from_numpy(np.interp(of_columns, typical.offsets.numpy(), biases).astype(np.float32))
        offset += plane.significance * own.to(scale.device)
    weight = (total * scale[..., None]).flatten(1)[:, :in_features].contiguous()
    std = scale.double().square().sum(1).sqrt() * math.sqrt(variance)
    weights = scale.double().square().mean(0).cpu()
    relative = coefficients.square()[:, None] * (each / variance if variance else torch.zeros_like(each))
    share = (weights / weights.sum().clamp(min=1e-30))[:, None, None] * relative
    copies = None
    if not config.signed and converter is not None:  # all planes above i count -2^(i+1) together
        usual = torch.tensor(cells, dtype=torch.float64) @ significance.square() / significance.square().sum()
        together = agreement(converter, round(float(usual), 2), any_chip)
        copies = (4 * coefficients[:-1].square() / coefficients[-1].square())[:, None] * together
        copies = copies.float().to(scale.device)
    loudness = TokenNoise(share.float().to(scale.device), copies)
    fast = FastArray(weight, (offset * scale).sum(1), bias * scale.sum(1), std.float(), loudness)
    noise = torch.Generator().manual_seed(1)
    return fast, fit_to_readings(fast, q.to(scale.device), planes, scale, converter, config, noise)

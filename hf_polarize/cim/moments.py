"""The fast model: the weights that a chip amounts to, and noise with the moments of its readings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..formats import BackboneLayer
from .array import Converter, exact_product
from .chip import Plane, nominal_factor
from .configuration import CIMConfig
from .planes import grouped_weights, integer_planes, quantized_inputs, weight_code

SAMPLED_TOKENS, SAMPLED_COLUMNS = 64, 64
"""What of a layer is run by the exact model to fit and to judge the fast one."""
LARGEST_SLOPE = 0.05
"""Share of the error that may follow the output (clipping, a dead zone) before the fast model is refused."""
LARGEST_KURTOSIS = 0.6
"""Excess kurtosis of the error above which a normal one differs: by Edgeworth, 0.023 of it is the distance of KS."""
TABLE = 2**22
"""Normal numbers that the noise is cut from."""
POINTS = 6.0
"""Standard deviations to either side that are counted."""


@dataclass(frozen=True)
class ReadMoments:
    """
    What a reading R of a count c is on average: `R = c + bias + kappa * m + e`, with the static error m of its cells.

    kappa is `Cov(R, m) / Var(m)`. With normal m it is the mean slope of the converter (Stein's lemma): 1 where noise
    or the spread of counts smooths the steps, and less where an ADC of whole counts rounds small errors away.

    Attributes:
        bias, kappa, variance (`torch.Tensor` of shape `(input planes, weight planes)`): float64, in counts; the
            variance is that of e.
        static (`torch.Tensor` of the same shape): variance of m.
    """

    bias: torch.Tensor
    kappa: torch.Tensor
    variance: torch.Tensor
    static: torch.Tensor


def count_distribution(
    density: torch.Tensor, rows: int, signed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Return how often a column counts what, if its rows are active independently of one another.

    Args:
        density (`torch.Tensor` of shape `(n,)`): of active rows, float64.
        rows (`int`): of a column.
        signed (`bool`): active rows count 1 or -1, equally often.

    Returns:
        Counts, their probabilities, and the mean number of active rows at each count, `(n, counts)`, float64, within
        [`POINTS`] standard deviations. By the discrete Fourier transform of the characteristic function,
        `(1 - a + a cos t)^rows` or `(1 - a + a e^it)^rows`.
    """
    size = 2 * rows + 1
    t = 2 * math.pi * torch.arange(size, dtype=torch.float64, device=density.device) / size
    wave = torch.cos(t).to(torch.complex128) if signed else torch.exp(1j * t)
    a = density[:, None].to(torch.complex128)
    base = 1 - a + a * wave
    probability = torch.fft.fft(base**rows).real / size
    active = torch.fft.fft(rows * a * wave * base ** (rows - 1)).real / size  # the mean number, times the probability
    mean = torch.zeros_like(density) if signed else rows * density
    reach = min(rows, math.ceil(POINTS * math.sqrt(float((rows * density).max())) + 1))
    counts = mean.round()[:, None].long() + torch.arange(-reach, reach + 1, device=density.device)
    inside = (counts.abs() <= rows) & ((counts >= 0) | signed)
    at = counts.clamp(-rows, rows) % size
    p = torch.where(inside, probability.gather(1, at).clamp(min=0), 0.0)
    k = active.gather(1, at) / probability.gather(1, at).clamp(min=1e-300)
    k = torch.where(p > 1e-12, k, 0.0).clamp(0, rows)
    return counts.double(), p / p.sum(1, keepdim=True), k


def read_moments(
    converter: Converter | None,
    inputs: torch.Tensor,
    weights: torch.Tensor,
    config: CIMConfig,
) -> ReadMoments:
    """
    Return the moments of the readings of all pairs of planes.

    Args:
        converter ([`Converter`], *optional*): the ADC.
        inputs (`torch.Tensor` of shape `(input planes,)`): how often each plane is not zero, float64.
        weights (`torch.Tensor` of shape `(weight planes,)`): the same of the cells.
        config ([`CIMConfig`]): of the chip.
    """
    shape = (len(inputs), len(weights))
    counts, p, active = count_distribution(
        (inputs[:, None] * weights[None]).flatten().clamp(0, 1), config.rows, config.signed
    )
    factor = float(nominal_factor(config, counts.device).mean())
    counts = counts * factor
    static = config.static_variance * factor**2 * active
    static = static + (config.column_gain * counts).square() + config.column_offset**2
    random = config.reading_noise**2

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (p * values).sum(-1)

    m = mean(static)
    std = (static + random).clamp(min=1e-18).sqrt()
    if converter is None:
        first, second, kappa = torch.zeros_like(counts), std.square(), torch.ones_like(m)
    else:
        codes, chance, slopes = _conversion(counts, std, converter)
        error = codes - counts[..., None]
        first, second = (chance * error).sum(-1), (chance * error.square()).sum(-1)
        kappa = torch.where(m > 0, mean(slopes * static) / m.clamp(min=1e-300), 1.0)
    bias = mean(first)
    total = (mean(second) - bias.square()).clamp(min=0)
    variance = (total - kappa.square() * m).clamp(min=0)
    return ReadMoments(bias.view(shape), kappa.view(shape), variance.view(shape), m.view(shape))


def _conversion(
    counts: torch.Tensor, std: torch.Tensor, converter: Converter
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Return what a count with normal noise is read as, how often, and the mean slope of the converter there.

    Args:
        counts (`torch.Tensor` of shape `(pairs, counts)`): float64.
        std (`torch.Tensor` of the same shape): of the noise.
        converter ([`Converter`]): the ADC.

    Returns:
        Readings and their probabilities, `(pairs, counts, codes)`: the codes near each count, and the two ends.
    """
    step, shift = converter.step, 0.5 if converter.mid_rise else 0.0
    reach = math.ceil(POINTS * float(std.max()) / step) + 1
    near = (counts / step - shift).round()[..., None] + torch.arange(-reach, reach + 1, dtype=torch.float64)

    def below(codes: torch.Tensor | int) -> torch.Tensor:
        """Return the distance of the upper threshold of a code, in standard deviations."""
        return ((codes + 0.5 + shift) * step - counts[..., None]) / std[..., None]

    upper, lower = below(near), below(near - 1)
    between = (near > converter.low) & (near < converter.high)
    chance = torch.where(between, torch.special.ndtr(upper) - torch.special.ndtr(lower), 0.0)
    ends = below(converter.low), below(converter.high - 1)
    chance = torch.cat([chance, torch.special.ndtr(ends[0]), torch.special.ndtr(-ends[1])], -1)
    last = torch.full_like(ends[0], 1.0)
    codes = torch.cat([near, converter.low * last, converter.high * last], -1)
    thresholds = torch.where((near >= converter.low) & (near < converter.high), torch.exp(-0.5 * upper.square()), 0.0)
    slopes = step * thresholds.sum(-1) / (math.sqrt(2 * math.pi) * std)
    return (codes + shift) * step, chance, slopes


@dataclass
class FastArray:
    """
    What a layer amounts to on one chip: `y = q W^T + offset + std * n`, with n normal.

    Attributes:
        weight (`torch.Tensor` of shape `(out, in)`): of this chip, for integer inputs.
        offset (`torch.Tensor` of shape `(out,)`): float32.
        std (`torch.Tensor` of shape `(out,)`): of the noise of a token, float32.
    """

    weight: torch.Tensor
    offset: torch.Tensor
    std: torch.Tensor

    def __call__(self, q: torch.Tensor, noise: torch.Generator | None = None) -> torch.Tensor:
        """
        Multiply integer inputs.

        Args:
            q (`torch.Tensor` of shape `(tokens, in)`): of [`~hf_polarize.cim.planes.quantized_inputs`].
            noise (`torch.Generator`, *optional*): of the noise of readings.

        Returns:
            `torch.Tensor` of shape `(tokens, out)`, float32.
        """
        y = torch.nn.functional.linear(q.to(self.weight.dtype), self.weight).float().add_(self.offset)
        return y if noise is None else y.addcmul_(normal_like(y, noise), self.std)

    def to(self, device: torch.device) -> FastArray:
        return FastArray(self.weight.to(device), self.offset.to(device), self.std.to(device))


@lru_cache(maxsize=2)
def _normal_table(device: torch.device) -> torch.Tensor:
    return torch.randn(TABLE, generator=torch.Generator().manual_seed(0)).to(device)


def normal_like(y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    Return normal numbers of the shape of `y`, cut from a table at a place that the generator draws.

    A hundred times cheaper than new ones. No number occurs twice in one call.
    """
    if y.numel() > TABLE:
        return torch.randn(y.shape, generator=generator).to(y.device)
    start = int(torch.randint(TABLE - y.numel() + 1, (), generator=generator))
    return _normal_table(y.device)[start : start + y.numel()].view(y.shape)


@torch.no_grad()
def fast_array(
    planes: Sequence[Plane], scale: torch.Tensor, converter: Converter | None, config: CIMConfig, in_features: int
) -> tuple[FastArray, str | None]:
    """
    Fold the planes of a layer into one weight, and fit the noise to the exact model.

    Weights follow from [`read_moments`]; so does the noise, up to a factor: readings of planes that are nearly copies
    of each other (the signs of small numbers in two's complement) err together. The factor is the one that a sample
    of the layer's own columns has in the exact model, on normal inputs. Tokens with few large values have
    emptier planes, which err less than that.

    Args:
        planes (`Sequence[Plane]`): of [`~hf_polarize.cim.chip.fabricate`].
        scale (`torch.Tensor` of shape `(out, groups)`): of a count.
        converter ([`Converter`], *optional*): the ADC.
        config ([`CIMConfig`]): of the chip.
        in_features (`int`): of the layer, without the rows that fill the last group.

    Returns:
        The fast model, and why it is not valid here, or `None`.
    """
    generator = torch.Generator().manual_seed(0)
    q, _ = quantized_inputs(torch.randn(SAMPLED_TOKENS, in_features, generator=generator), config.input_bits)
    bits, coefficients = integer_planes(q, config.input_bits, config.encoding)
    inputs = (bits != 0).double().mean((1, 2))
    cells = torch.stack([(plane.written != 0).double().mean() for plane in planes]).cpu()
    moments = read_moments(converter, inputs, cells, config)

    share = coefficients.square() * inputs
    kappa = (share[:, None] * moments.kappa).sum(0) / share.sum()
    significance = torch.tensor([plane.significance for plane in planes], dtype=torch.float64)
    bias = float((coefficients[:, None] * significance * moments.bias).sum())
    each = moments.variance + (moments.kappa - kappa).square() * moments.static
    variance = float(((coefficients[:, None] * significance).square() * each).sum())

    factor = nominal_factor(config, scale.device)
    total, offset = torch.zeros(planes[0].cells.shape, device=scale.device), torch.full_like(scale, bias)
    for plane, k in zip(planes, kappa.tolist(), strict=True):
        made = plane.cells.float() * plane.unit
        if plane.gain is not None:
            made *= plane.gain.T[..., None]
        total += plane.significance * (k * made + (1 - k) * factor * plane.written)
        if plane.offset is not None:
            offset += plane.significance * k * float(coefficients.sum()) * plane.offset.T
    weight = (total * scale[..., None]).flatten(1)[:, :in_features].contiguous()
    std = scale.double().square().sum(1).sqrt() * math.sqrt(variance)
    fast = FastArray(weight, (offset * scale).sum(1), std.float())
    return fast, _fit(fast, q.to(scale.device), planes, scale, converter, config, generator)


def _fit(
    fast: FastArray, q: torch.Tensor, planes: Sequence[Plane], scale: torch.Tensor, converter: Converter | None,
    config: CIMConfig, noise: torch.Generator,
) -> str | None:  # fmt: skip
    """Run some columns exactly, scale the noise of the fast model to their errors, and say where it can't be right."""
    if converter is None or not bool((fast.std > 0).any()):
        return None  # the noise of readings alone, or none at all
    columns = torch.arange(0, len(scale), max(1, len(scale) // SAMPLED_COLUMNS), device=scale.device)
    few = [plane.of_columns(columns) for plane in planes]
    exact = exact_product(q, few, scale[columns], config, converter, noise)
    expected = q.double() @ fast.weight[columns].double().T + fast.offset[columns]
    error = (exact - expected) / fast.std[columns].clamp(min=1e-30)
    spread = float(error.square().mean().sqrt())
    fast.std *= spread
    if spread == 0:
        return None
    expected = expected / expected.std(0).clamp(min=1e-30)
    slope = float(torch.corrcoef(torch.stack([error.flatten(), expected.flatten()]))[0, 1].square())
    if slope > LARGEST_SLOPE:
        return f"{100 * slope:.0f} % of the error follows the output (clipping, or a dead zone around 0)"
    kurtosis = float((error / spread).square().square().mean()) - 3
    if kurtosis > LARGEST_KURTOSIS:
        return f"readings err too seldom for normal noise (excess kurtosis {kurtosis:.1f})"
    return None


def chip_moments(layer: BackboneLayer, config: CIMConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Return the mean and the variance of each weight over chips, `(out, in)`, and the variance of readings, `(out,)`.

    The latter is that of an output for integer inputs, `sum_g scale_g^2 S_w S_x (noise^2 + step^2 / 12)`, with S the
    sums of the squared significances of the planes. An ADC that tells whole counts apart adds nothing as long as
    counts are whole.

    Args:
        layer ([`~hf_polarize.formats.BackboneLayer`]): the backbone's.
        config ([`CIMConfig`]): of the chips.
    """
    levels = layer.levels()
    indices, scale = grouped_weights(layer.units(), layer.block_scales(), layer.block_size, config, levels)
    code, indices = weight_code(config, levels), indices.int()
    squared = code.significance.square()
    active = ((code.cells != 0).double() @ squared).float().to(scale.device)
    values = (code.cells.double() @ code.significance).float().to(scale.device)
    wires = nominal_factor(config, scale.device) / config.drift
    mean = values[indices] * scale[..., None] * wires
    variance = config.static_variance * active[indices] * (scale[..., None] * wires).square()
    inputs = integer_planes(torch.zeros(1), config.input_bits, config.encoding)[1].square().sum()
    reading = (config.reading_noise / config.drift) ** 2
    if config.adc_bits is not None:
        step = config.span / 2**config.adc_bits / config.drift
        whole = config.static_variance == 0 and config.column_gain == 0 and bool((wires == 1).all())
        reading += 0.0 if whole and step <= 1 else step**2 / 12
    random = scale.square().sum(1) * float(inputs * squared.sum()) * reading
    return mean.flatten(1)[:, : layer.in_features], variance.flatten(1)[:, : layer.in_features], random

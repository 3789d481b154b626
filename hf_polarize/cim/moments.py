"""What readings are on average over columns and chips."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .array import Converter
from .chip import nominal_factor
from .configuration import CIMConfig

POINTS = 6.0
"""Standard deviations to either side that are counted."""
FEW = 16
"""Driven rows up to which numbers of active ones are told apart at each count."""
REACH, PHASES = 5.0, 16
"""Standard deviations up to which offsets of columns are told apart, and into how many a step of an ADC is divided."""


@dataclass(frozen=True)
class ReadMoments:
    """
    What a reading R of a count c is on average: `R = c + bias(o) + kappa * m + e`.

    m is the static error of the cells and o the offset of the column. kappa is `Cov(R, m) / Var(m)`. With normal m it
    is the mean slope of the converter (Stein's lemma): 1 where noise or the spread of counts smooths the steps, and
    less where an ADC of whole counts rounds small errors away. So does bias(o) fall short of o.

    Attributes:
        biases (`torch.Tensor` of shape `(offsets, numbers of rows, weight planes)`): at those of [`column_offsets`];
            float64, in counts.
        kappa, variance (`torch.Tensor` of shape `(numbers of rows, weight planes)`): the variance is that of e.
        static (`torch.Tensor` of the same shape): variance of m.
    """

    biases: torch.Tensor
    kappa: torch.Tensor
    variance: torch.Tensor
    static: torch.Tensor


def column_offsets(converter: Converter | None, config: CIMConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return offsets of columns, and how often each occurs.

    Between neighbours readings are taken as linear: they are as near as the steps of the converter, smoothed by noise,
    ask for. Beside offsets of more than a step the steps themselves are nothing that a column has of its own.

    Returns:
        Two of shape `(offsets,)`, float64; 0 alone if all columns are alike.
    """
    sigma = config.column_offset
    if not sigma:
        return torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    step = sigma / 4
    if converter is not None and sigma < converter.step:
        step = min(step, max(converter.step / PHASES, config.reading_noise / 4))
    each_side = math.ceil(REACH * sigma / step)
    offsets = torch.linspace(-REACH * sigma, REACH * sigma, 2 * each_side + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / sigma).square())
    return offsets, weights / weights.sum()


def count_distribution(
    density: torch.Tensor, driven: torch.Tensor, signed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Return how often a column counts what, if its driven rows are active independently of one another.

    Args:
        density (`torch.Tensor` of shape `(n,)`): of active rows among the driven ones, float64.
        driven (`torch.Tensor` of shape `(n,)`): numbers of driven rows, int64.
        signed (`bool`): active rows count 1 or -1, equally often.

    Returns:
        Counts, their probabilities, and the mean number of active rows at each count, `(n, counts)`, float64, within
        [`POINTS`] standard deviations. By the discrete Fourier transform of the characteristic function,
        `(1 - a + a cos t)^driven` or `(1 - a + a e^it)^driven`. For signed counts of up to [`FEW`] rows each number of
        active rows comes by itself: steps of an ADC follow the spread of many and swallow that of few.
    """
    rows = int(driven.max())
    size = 2 * rows + 1
    t = 2 * math.pi * torch.arange(size, dtype=torch.float64, device=density.device) / size
    wave = torch.cos(t).to(torch.complex128) if signed else torch.exp(1j * t)
    a = density[:, None].to(torch.complex128)
    base = 1 - a + a * wave
    n = driven[:, None]
    probability = torch.fft.fft(base**n).real / size
    active = torch.fft.fft(n * a * wave * base ** (n - 1).clamp(min=0)).real / size  # mean number times probability
    mean = torch.zeros_like(density) if signed else driven * density
    reach = min(rows, math.ceil(POINTS * math.sqrt(float((driven * density).max())) + 1))
    counts = mean.round()[:, None].long() + torch.arange(-reach, reach + 1, device=density.device)
    inside = (counts.abs() <= rows) & ((counts >= 0) | signed)
    at = counts.clamp(-rows, rows) % size
    p = torch.where(inside, probability.gather(1, at).clamp(min=0), 0.0)
    k = active.gather(1, at) / probability.gather(1, at).clamp(min=1e-300)
    k = torch.where(p > 1e-12, k, 0.0).clamp(0, rows)
    counts, p = counts.double(), p / p.sum(1, keepdim=True)
    if not signed or int(driven.min()) > FEW:
        return counts, p, k
    pairs = [(a, c, math.comb(a, (a + c) // 2) / 2**a) for a in range(FEW + 1) for c in range(-a, a + 1, 2)]
    some, own, share = (torch.tensor(part, dtype=torch.float64, device=p.device) for part in zip(*pairs, strict=True))
    ways = torch.lgamma(n + 1.0) - torch.lgamma(some + 1) - torch.lgamma((n - some).clamp(min=0) + 1.0)
    chance = torch.exp(ways) * density[:, None] ** some * (1 - density[:, None]) ** (n - some).clamp(min=0)
    chance = torch.where((n <= FEW) & (some <= n), chance * share, 0.0)
    return (
        torch.cat([counts, own.expand(chance.shape)], 1), torch.cat([torch.where(n <= FEW, 0.0, p), chance], 1),
        torch.cat([k, some.expand(chance.shape)], 1),
    )  # fmt: skip


def read_moments(
    converter: Converter | None,
    driven: torch.Tensor,
    weights: torch.Tensor,
    config: CIMConfig,
) -> ReadMoments:
    """
    Return the moments of the readings of all weight planes, for some numbers of driven rows.

    Args:
        converter ([`Converter`], *optional*): the ADC.
        driven (`torch.Tensor` of shape `(numbers of rows,)`): rows of a group that an input plane drives, int64.
        weights (`torch.Tensor` of shape `(weight planes,)`): how often the cells of each plane are not zero, float64.
        config ([`CIMConfig`]): of the chip.
    """
    shape = (len(driven), len(weights))
    counts, p, active = count_distribution(
        weights.expand(shape).flatten(), driven.repeat_interleave(len(weights)), config.signed
    )
    factor = float(nominal_factor(config, counts.device).mean())
    counts = counts * factor
    static = config.static_variance * factor**2 * active
    static = static + (config.column_gain * counts).square()
    random = config.reading_noise**2

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (p * values).sum(-1)

    m = mean(static)
    std = (static + random).clamp(min=1e-18).sqrt()
    offsets, often = column_offsets(converter, config)
    if converter is None:
        biases = offsets[:, None, None].expand(-1, *shape)
        return ReadMoments(biases, torch.ones(shape).double(), torch.full(shape, random).double(), m.view(shape))
    wide = config.column_offset >= converter.step
    if wide:  # all phases of a step occur alike
        points = converter.step * (torch.arange(PHASES, dtype=torch.float64) / PHASES - 0.5)
        often = torch.full_like(points, 1 / PHASES)
    else:
        points = offsets
    means, followed, total = [], torch.zeros_like(m), torch.zeros_like(m)
    for offset, weight in zip(points.tolist(), often.tolist(), strict=True):
        codes, chance, slopes = _conversion(counts + offset, std, converter)
        error = codes - counts[..., None]
        bias, second = mean((chance * error).sum(-1)), mean((chance * error.square()).sum(-1))
        means.append(bias.view(shape))
        followed += weight * mean(slopes * static)
        total += weight * (second - bias.square()).clamp(min=0)
    kappa = torch.where(m > 0, followed / m.clamp(min=1e-300), 1.0)
    variance = (total - kappa.square() * m).clamp(min=0)
    biases = torch.stack(means)
    if wide:
        biases = offsets[:, None, None] + (biases - points[:, None, None]).mean(0)
    return ReadMoments(biases, kappa.view(shape), variance.view(shape), m.view(shape))


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
    reach = min(math.ceil(POINTS * float(std.max()) / step) + 1, converter.high - converter.low)
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

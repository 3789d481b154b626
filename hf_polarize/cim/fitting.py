"""The fast model fitted to exact readings of some columns, and where it can't be right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .array import Converter, exact_product
from .chip import Plane
from .configuration import CIMConfig
from .planes import quantized_inputs

if TYPE_CHECKING:
    from .fast import FastArray

SAMPLED_COLUMNS = 64
"""What of a layer is run by the exact model to fit and to judge the fast one."""
LARGEST_SLOPE = 0.05
"""Share of the error that may follow the output (clipping, a dead zone) before the fast model is refused."""
LARGEST_LASTING = 0.1
"""Share of the error that may be the same for all inputs."""
LARGEST_KURTOSIS = 0.4
"""Excess kurtosis of the error above which a normal one differs: by Edgeworth, 0.023 of it is the distance of KS."""
LARGEST_MISFIT = 0.025
"""How far the standard deviation of all errors, those of cells included, may be off."""
LARGEST_DISTANCE = 0.015
"""Distance of all errors from those of the fast model (Kolmogorov-Smirnov)."""
LARGEST_DEVIATION = 0.17
"""How far the error of tokens of another kind may be off. Chance is allowed as well, 1 / sqrt(sample)."""
OTHERS = 16
"""Tokens of each other kind."""


def other_tokens(typical: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """
    Return tokens that are not normal, as layers have them too: what most planes of those drive is little.

    Args:
        typical (`torch.Tensor` of shape `(tokens, in)`): integers, those of normal numbers.
        bits (`int`): of an input.
    """
    some = typical[:OTHERS]
    kinds = {
        "few large values": some**3,
        "few large values and no negative ones": some.relu() ** 3,
        "few values but 0": some * (typical[OTHERS : 2 * OTHERS].abs() > 0.55 * typical.abs().max()),
    }
    return {kind: quantized_inputs(tokens, bits)[0] for kind, tokens in kinds.items()}


def fit_to_readings(
    fast: FastArray, typical: torch.Tensor, planes: Sequence[Plane], scale: torch.Tensor, converter: Converter | None,
    config: CIMConfig, noise: torch.Generator,
) -> str | None:  # fmt: skip
    """
    Run some columns exactly, fit the fast model to them, and say where it can't be right.

    What is fitted: the gain of the output, how far readings follow the errors of cells, and the noise.
    """
    if converter is None or not bool((fast.std > 0).any()):
        return None  # the noise of readings alone, or none at all
    # noise of half a step smooths the steps: exp(-pi^2 / 2) of their mean error is left
    if config.signed and not converter.mid_rise and converter.step >= max(2, 2 * config.reading_noise):
        return f"a dead zone: counts up to {converter.step / 2:g} read as 0"
    others = other_tokens(typical, config.input_bits)
    q = torch.cat([typical, *others.values()]).to(scale.device)
    columns = torch.arange(0, len(scale), max(1, len(scale) // SAMPLED_COLUMNS), device=scale.device)
    few = [plane.of_columns(columns) for plane in planes]
    exact = exact_product(q, few, scale[columns], config, converter, noise)
    nominal = sum(plane.significance * config.drift * plane.written for plane in planes)
    own = fast.weight - (nominal * scale[..., None]).flatten(1)[:, : q.shape[1]]  # type: ignore[union-attr]
    product, static = (q.double() @ weight[columns].double().T for weight in (fast.weight, own))
    error, normal = exact - product - fast.offset[columns], slice(len(typical))
    fitted, judged = (slice(0, None, 2), slice(1, None, 2)) if len(columns) > 1 else (slice(None), slice(None))
    both = torch.stack([product[normal, fitted].flatten(), static[normal, fitted].flatten()])
    weighed = both @ error[normal, fitted].flatten()
    gain, more = (torch.linalg.pinv(both @ both.T, rtol=1e-9, hermitian=True) @ weighed).tolist()
    fast.weight.mul_(1 + gain).add_(own, alpha=more)
    error -= gain * product + more * static
    usual = (fast.loudness(q) * fast.std[columns]).clamp(min=1e-30)
    error, follows = error / usual, (gain * product / usual)[normal]
    static = static[normal] * (1 + more) + gain * product[normal]
    spread = float(error[normal].square().mean().sqrt())
    fast.std *= spread
    if spread == 0:
        return None
    noise_of, *noise_of_others = (error / spread).split([len(typical), *[OTHERS] * len(others)])
    rare = dict(zip(others, noise_of_others, strict=True))
    return _objection(noise_of, rare, static / fast.std[columns], follows / spread, judged)


def _objection(
    noise: torch.Tensor, rare: dict[str, torch.Tensor], static: torch.Tensor, follows: torch.Tensor, judged: slice
) -> str | None:
    """
    Say why a sample of errors is not what the fast model says of it, if it isn't.

    Args:
        noise (`torch.Tensor` of shape `(tokens, columns)`): what readings add, in standard deviations, float64.
        rare (`dict[str, torch.Tensor]`): the same of tokens of other kinds, by what they have.
        static (`torch.Tensor` of the shape of `noise`): the errors of the chip's weights.
        follows (`torch.Tensor` of the shape of `noise`): what was put down to the gain of the output.
        judged (`slice`): columns that nothing but the noise was fitted to.
    """
    slope = float(follows.square().mean())
    slope /= slope + 1
    if slope > LARGEST_SLOPE:
        return f"{100 * slope:.0f} % of the error follows the output (clipping, or a dead zone around 0)"
    lasting = float(noise.mean(0).var() / noise.var()) - 1 / len(noise) if noise.shape[1] > 1 else 0.0
    if lasting > LARGEST_LASTING:
        return f"{100 * lasting:.0f} % of the error is one of columns, for all inputs (offsets that an ADC swallows)"
    chance = noise.numel() ** -0.5
    off = (noise + static)[:, judged].square().mean() / (1 + static[:, judged].square().mean())
    off = float(off) ** 0.5 - 1
    if abs(off) > LARGEST_MISFIT + chance:
        return f"readings do not follow the errors of cells as usual: errors are {1 + off:.2g} times as large"
    share = 1 / (1 + float(static.square().mean()))
    kurtosis = share**2 * (float(noise.square().square().mean()) - 3)
    if kurtosis > LARGEST_KURTOSIS + 15 * chance:  # three standard deviations of sqrt(24 / n)
        return f"readings err too seldom for normal noise (excess kurtosis {kurtosis:.1f})"
    distance = _distance(noise, static)
    if distance > LARGEST_DISTANCE + chance:
        return f"errors are not normal (a distance of {distance:.3f} by Kolmogorov and Smirnov)"
    for kind, errors in rare.items():
        deviation = ((share * float(errors.square().mean()) + 1 - share) ** 0.5) - 1
        if abs(deviation) > LARGEST_DEVIATION + errors.numel() ** -0.5:
            return f"errors of tokens with {kind} are {1 + deviation:.2g} times as large as the fast model's"
    return None


def _distance(noise: torch.Tensor, static: torch.Tensor) -> float:
    """Return the Kolmogorov-Smirnov distance of the errors `static + noise` from those with normal noise."""
    errors = (static + noise).flatten()
    points = torch.quantile(errors, torch.linspace(0.03, 0.97, 33, dtype=errors.dtype, device=errors.device))
    expected = torch.special.ndtr(points - static.flatten()[:, None]).mean(0)
    return float(((errors[:, None] <= points).double().mean(0) - expected).abs().max())

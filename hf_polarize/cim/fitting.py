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
        "no negative values": some.relu(),
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

    Least squares over normal tokens t and every other column j of the sample, with W the weights of the fast model and
    D what the cells of this chip make of them beyond what is written:

        exact_tj = (1 + gain) q_t W_j + follow q_t D_j + offset_j + noise_tj

    The weights become (1 + gain) W + follow D, and `std` what the noise asks for.
    """
    if converter is None or not bool((fast.std > 0).any()):
        return None  # the noise of readings alone, or none at all
    # noise of half a step smooths the steps: exp(-pi^2 / 2) of their mean error is left
    if config.signed and not converter.mid_rise and converter.step >= max(2, 2 * config.reading_noise):
        return f"a dead zone: counts up to {converter.step / 2:g} read as 0"
    others = other_tokens(typical, config.input_bits)
    q, normal = torch.cat([typical, *others.values()]).to(scale.device), slice(len(typical))
    columns = torch.arange(0, len(scale), max(1, len(scale) // SAMPLED_COLUMNS), device=scale.device)
    fitted, judged = (slice(0, None, 2), slice(1, None, 2)) if len(columns) > 1 else (slice(None), slice(None))
    exact = exact_product(q, [plane.of_columns(columns) for plane in planes], scale[columns], config, converter, noise)

    written = sum(plane.significance * config.drift * plane.written for plane in planes)
    beyond = fast.weight - (written * scale[..., None]).flatten(1)[:, : q.shape[1]]  # type: ignore[union-attr]
    product, of_cells = (q.double() @ weight[columns].double().T for weight in (fast.weight, beyond))
    error = exact - product - fast.offset[columns]
    both = torch.stack([product[normal, fitted].flatten(), of_cells[normal, fitted].flatten()])
    solved = torch.linalg.pinv(both @ both.T, rtol=1e-9, hermitian=True) @ (both @ error[normal, fitted].flatten())
    gain, follow = solved.tolist()
    fast.weight.mul_(1 + gain).add_(beyond, alpha=follow)

    of_gain = gain * product
    noise_of = (error - of_gain - follow * of_cells) / (fast.loudness(q) * fast.std[columns]).clamp(min=1e-30)
    spread = float(noise_of[normal].square().mean().sqrt())
    fast.std *= spread
    if spread == 0:
        return None
    of_normal, *of_others = (noise_of / spread).split([len(typical), *[OTHERS] * len(others)])
    std = fast.std[columns].clamp(min=1e-30)  # a column of zeros has none
    return _objection(
        of_normal, dict(zip(others, of_others, strict=True)),
        ((1 + follow) * of_cells + of_gain)[normal] / std,
        of_gain[normal] / (fast.loudness(q[normal]) * std).clamp(min=1e-30), judged,
    )  # fmt: skip


def _objection(
    noise: torch.Tensor,
    of_others: dict[str, torch.Tensor],
    of_chip: torch.Tensor,
    of_gain: torch.Tensor,
    judged: slice,
) -> str | None:
    """
    Say why a sample of errors is not what the fast model says of it, if it isn't.

    Args:
        noise (`torch.Tensor` of shape `(tokens, columns)`): what readings add, in standard deviations, float64.
        of_others (`dict[str, torch.Tensor]`): the same of tokens of other kinds, by what they have.
        of_chip (`torch.Tensor` of the shape of `noise`): the errors of the chip's weights.
        of_gain (`torch.Tensor` of the shape of `noise`): of these, what was put down to the gain of the output.
        judged (`slice`): columns that nothing but the noise was fitted to.
    """
    slope = float(of_gain.square().mean())
    slope /= slope + 1
    if slope > LARGEST_SLOPE:
        return f"{100 * slope:.0f} % of the error follows the output (clipping, or a dead zone around 0)"
    lasting = float(noise.mean(0).var() / noise.var()) - 1 / len(noise) if noise.shape[1] > 1 else 0.0
    if lasting > LARGEST_LASTING:
        return f"{100 * lasting:.0f} % of the error is one of columns, for all inputs (offsets that an ADC swallows)"
    chance = noise.numel() ** -0.5
    misfit = (noise + of_chip)[:, judged].square().mean() / (1 + of_chip[:, judged].square().mean())
    misfit = float(misfit) ** 0.5
    if abs(misfit - 1) > LARGEST_MISFIT + chance:
        return f"readings do not follow the errors of cells as usual: errors are {misfit:.3g} times as large"
    share = 1 / (1 + float(of_chip.square().mean()))  # of the noise in the variance of all errors
    kurtosis = share**2 * (float(noise.square().square().mean()) - 3)
    if kurtosis > LARGEST_KURTOSIS + 15 * chance:  # three standard deviations of sqrt(24 / n)
        return f"readings err too seldom for normal noise (excess kurtosis {kurtosis:.1f})"
    distance = _distance(noise, of_chip)
    if distance > LARGEST_DISTANCE + chance:
        return f"errors are not normal (a distance of {distance:.3f} by Kolmogorov and Smirnov)"
    for kind, errors in of_others.items():
        times = (share * float(errors.square().mean()) + 1 - share) ** 0.5
        if abs(times - 1) > LARGEST_DEVIATION + errors.numel() ** -0.5:
            return f"errors of tokens with {kind} are {times:.2g} times as large as the fast model's"
    return None


def _distance(noise: torch.Tensor, of_chip: torch.Tensor) -> float:
    """Return the Kolmogorov-Smirnov distance of the errors `of_chip + noise` from those with normal noise."""
    errors = (of_chip + noise).flatten()
    points = torch.quantile(errors, torch.linspace(0.03, 0.97, 33, dtype=errors.dtype, device=errors.device))
    expected = torch.special.ndtr(points - of_chip.flatten()[:, None]).mean(0)
    return float(((errors[:, None] <= points).double().mean(0) - expected).abs().max())

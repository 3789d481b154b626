"""The exact model: bit plane by bit plane, row group by row group, every reading through its ADC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import torch

from .chip import Plane
from .configuration import CIMConfig
from .planes import integer_planes

CHUNK = 2**19
"""Readings at a time: they stay in the cache of a core."""
INTEGERS_ARE_FAST = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
"""Products of int8 are up to 20 times slower than those of float32 where a CPU has no instructions for them."""


@dataclass(frozen=True)
class Converter:
    """
    An ADC: counts in, the counts that its codes stand for out.

    Codes lie `step` apart. Mid-tread: `step * clamp(round(c / step), low, high)`. Mid-rise:
    `step * (clamp(floor(c / step), low, high) + 1/2)`. Halves round to even.

    Attributes:
        step (`float`): in counts.
        low, high (`int`): first and last code.
        mid_rise (`bool`): whether 0 lies between two codes.
    """

    step: float
    low: int
    high: int
    mid_rise: bool

    @classmethod
    def of(cls, config: CIMConfig, largest: float) -> Converter | None:
        """
        Return the ADC of a layer, or `None` without one.

        Args:
            config ([`CIMConfig`]): of the chip.
            largest (`float`): the count at the end of its range; a signed one begins at minus that.
        """
        if config.adc_bits is None:
            return None
        codes = 2**config.adc_bits
        low = -codes // 2 if config.signed else 0
        step = (2 if config.signed else 1) * largest / codes
        return cls(step, low, low + codes - 1, not config.zero_code)

    def __call__(self, counts: torch.Tensor) -> torch.Tensor:
        """Return what is read for these counts."""
        scaled = counts * (1 / self.step)
        codes = scaled.floor_() if self.mid_rise else scaled.round_()
        return codes.clamp_(self.low, self.high).add_(0.5 if self.mid_rise else 0.0).mul_(self.step)


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _read_and_add(high, low, unit, gain, offset, noise, weights, inverse, first, last, shift, total):  # type: ignore[no-untyped-def]
    """
    Add up the readings of one plane of the weight, each with the weight of its plane of the input.

    `high`, `low` (planes, tokens, out), int32 or float32: the two digits of the counts in `unit`s, `low` maybe empty.
    `gain`, `offset` (out,). `noise` like `high`, or empty. `weights` (planes,), `total` (tokens, out) of one dtype.
    `inverse` step, 0 without ADC. `first` and `last` code. `shift` of the codes by 0 or 1/2. All else is float32.
    """
    for i in range(len(high)):
        weight = weights[i]
        for t in range(high.shape[1]):
            for j in range(high.shape[2]):
                whole = high[i, t, j]
                if low.size:
                    whole = 256 * whole + low[i, t, j]
                count = np.float32(whole) * unit * gain[j] + offset[j]
                if noise.size:
                    count += noise[i, t, j]
                if inverse:
                    count = np.floor(inverse * count) if shift else np.rint(inverse * count)
                    count = first if count < first else count
                    count = (last if count > last else count) + shift
                total[t, j] += weight * count


def exact_product(
    q: torch.Tensor,
    planes: Sequence[Plane],
    scale: torch.Tensor,
    config: CIMConfig,
    converter: Converter | None,
    noise: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Multiply integer inputs with the cells of a layer, as the array does it.

    `y_tj = sum_g scale_jg sum_p s_p sum_i c_i ADC(gain * sum_k x_itk cells_pjk + offset + noise)`, with the planes i
    of the inputs, p of the weights, and the groups g of rows k.

    Args:
        q (`torch.Tensor` of shape `(tokens, in)`): integers of [`~hf_polarize.cim.planes.quantized_inputs`].
        planes (`Sequence[Plane]`): of [`~hf_polarize.cim.chip.fabricate`].
        scale (`torch.Tensor` of shape `(out, groups)`): of a count.
        config ([`CIMConfig`]): of the chip.
        converter ([`Converter`], *optional*): the ADC; without one counts pass as they are.
        noise (`torch.Generator`, *optional*): of the noise of readings.

    Returns:
        `torch.Tensor` of shape `(tokens, out)`, float64. Without mismatch, noise and ADC it is the exact product.
    """
    out_features, groups = scale.shape
    padded = torch.nn.functional.pad(q, (0, groups * config.rows - q.shape[1]))
    bits, coefficients = integer_planes(padded, config.input_bits, config.encoding)
    bits = bits.view(len(bits), len(q), groups, config.rows)
    read = _read_on_cpu if q.device.type == "cpu" else _read
    # whole readings of whole significance add up exactly in float32 as long as the sums stay below 2^24
    small = config.rows * 2 ** (config.input_bits + config.weight_bits) <= 2**24
    whole = all(plane.significance.is_integer() for plane in planes)
    dtype = torch.float32 if small and whole else torch.float64
    result = torch.zeros(len(q), out_features, dtype=torch.float64, device=q.device)
    length = max(1, CHUNK // (len(bits) * out_features))
    for start in range(0, len(q), length):
        for g in range(groups):
            driven = bits[:, start : start + length, g].contiguous()
            total = torch.zeros(driven.shape[1], out_features, dtype=dtype, device=q.device)
            for plane in planes:
                disturbed = None
                if noise is not None and config.reading_noise:
                    shape = (*driven.shape[:2], out_features)
                    disturbed = torch.randn(shape, generator=noise, device=noise.device).to(q.device)
                    disturbed *= config.reading_noise
                read(driven, plane, g, coefficients * plane.significance, converter, disturbed, total)
            result[start : start + length] += total * scale[:, g].double()
    return result


def _read(
    driven: torch.Tensor,
    plane: Plane,
    group: int,
    weights: torch.Tensor,
    converter: Converter | None,
    noise: torch.Tensor | None,
    total: torch.Tensor,
) -> None:
    """
    Read one plane of the weight for all planes of the input, and add the readings to the total.

    Args:
        driven (`torch.Tensor` of shape `(planes, tokens, rows)`): int8, of the input.
        plane ([`~hf_polarize.cim.chip.Plane`]): of the weight.
        group (`int`): of rows.
        weights (`torch.Tensor` of shape `(planes,)`): of the readings.
        converter ([`Converter`], *optional*): the ADC.
        noise (`torch.Tensor` of shape `(planes, tokens, out)`, *optional*): of the readings, in counts.
        total (`torch.Tensor` of shape `(tokens, out)`): float32 or float64; changed in place.
    """
    # in digits of eight bits, which are exact in TF32 and bfloat16 as well
    high, *low = (driven.float() @ digit[:, group].float().T for digit in plane.digits)
    counts = (256 * high + low[0] if low else high) * plane.unit
    if plane.gain is not None:
        counts = counts * plane.gain[group]
    if plane.offset is not None:
        counts = counts + plane.offset[group]
    if noise is not None:
        counts = counts + noise
    if converter is not None:
        counts = converter(counts)
    for weight, one in zip(weights.to(total.dtype), counts.to(total.dtype), strict=True):
        total += weight * one


def _read_on_cpu(
    driven: torch.Tensor,
    plane: Plane,
    group: int,
    weights: torch.Tensor,
    converter: Converter | None,
    noise: torch.Tensor | None,
    total: torch.Tensor,
) -> None:
    """Do what [`_read`] does, with exact sums in whole units of a cell and one pass over the counts."""
    planes, tokens, rows = driven.shape
    lines = driven.reshape(-1, rows)
    if INTEGERS_ARE_FAST:
        sums = [torch._int_mm(lines, digit[:, group].T) for digit in plane.digits]
    else:
        sums = [lines.float() @ plane.cells[:, group].float().T]
    digits = [one.view(planes, tokens, -1).numpy() for one in sums]
    out_features = len(plane.cells)
    none = np.empty((0, 0, 0))
    gain = torch.ones(out_features) if plane.gain is None else plane.gain[group]
    offset = torch.zeros(out_features) if plane.offset is None else plane.offset[group]
    ends = (0.0, 0.0, 0.0, 0.0)
    step = 1.0
    if converter is not None:
        step = converter.step
        ends = (1 / step, converter.low, converter.high, 0.5 if converter.mid_rise else 0.0)
    _read_and_add(
        digits[0], digits[1] if len(digits) > 1 else none.astype(np.int32), np.float32(plane.unit), gain.numpy(),
        offset.numpy(), none.astype(np.float32) if noise is None else noise.numpy(),
        (weights * step).to(total.dtype).numpy(), *map(np.float32, ends), total.numpy(),
    )  # fmt: skip

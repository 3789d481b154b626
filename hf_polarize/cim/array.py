"""The exact model: bit plane by bit plane, row group by row group, every reading through its ADC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numba
import numpy as np
import torch

from .chip import Plane
from .configuration import CIMConfig
from .planes import integer_planes

CHUNK = 2**19
"""Readings at a time: they stay in the cache of a core."""
INTEGERS_ARE_FAST: bool = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()  # private in torch 2.13
"""
Whether a CPU has instructions for products of int8. Without them these are 20 times slower than those of float32, or
wrong: oneDNN then adds pairs of products in 16 bits.
"""
TABLE = 2**22
"""Normal numbers that the noise of readings is cut from."""


def integer_products(inputs: int) -> bool:
    """Tell whether products of int8 matrices are to be used; for one input `torch._int_mm` of torch 2.13 is wrong."""
    return INTEGERS_ARE_FAST and inputs > 1


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


@cache
def normal_table(device: torch.device) -> torch.Tensor:
    """Return [`TABLE`] normal numbers, float32, the same on every device."""
    return torch.randn(TABLE, generator=torch.Generator().manual_seed(0)).to(device)


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _read_and_add(  # type: ignore[no-untyped-def]
    high, low, width, unit, gain, offset, table, places, noise, weights, inverse, first, last, shift, total
):
    """
    Add up the readings of one plane of the weight, each with the weight of its plane of the input.

    What is `None` costs nothing: numba compiles without it. All numbers without a dtype here are float32.

    Args:
        high (array of shape `(planes, tokens, out)`): int32 or float32, counts in `unit`s.
        low (array like `high`, *optional*): int32; the counts are `256 * high + low`.
        width (`int`, *optional*): bits of a count, where `high` has those of `24 // width` planes in each number.
        unit (number): of a cell.
        gain, offset (arrays of shape `(out,)`): of the columns.
        table, places (arrays of shapes `(TABLE,)` and `(planes, tokens)`, *optional*): normal numbers, and where those
            of a row of readings begin, int64.
        noise (number): standard deviation of a reading.
        weights (array of shape `(planes,)`): of the readings; of the dtype of `total`.
        inverse (number, *optional*): of a step of the ADC.
        first, last, shift (numbers): of its codes, of which each stands for `shift` more.
        total (array of shape `(tokens, out)`): changed in place.
    """
    packed = 1 if width is None else 24 // width
    if width is not None:
        half, mask = np.int32(1 << width >> 1), np.int32((1 << width) - 1)
        centre = np.int32(sum([half << (width * k) for k in range(packed)]))
    for i in range(len(weights)):
        weight = weights[i]
        for t in range(high.shape[1]):
            row, result = high[i // packed, t], total[t]
            if low is not None:
                low_row = low[i, t]
            if places is not None:
                numbers = table[places[i, t] : places[i, t] + len(row)]
            if width is not None:
                digit = np.int32(width * (i % packed))
            for j in range(len(row)):
                if width is not None:
                    count = np.float32((((np.int32(row[j]) + centre) >> digit) & mask) - half)
                elif low is not None:
                    count = np.float32(256) * np.float32(row[j]) + np.float32(low_row[j])
                else:
                    count = np.float32(row[j])
                count = count * unit * gain[j] + offset[j]
                if places is not None:
                    count += noise * numbers[j]
                if inverse is not None:
                    count = np.floor(inverse * count) if shift else np.rint(inverse * count)
                    count = first if count < first else count
                    count = (last if count > last else count) + shift
                result[j] += weight * count


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
    of the inputs, p of the weights, and the groups g of rows k. The noise of the readings of all columns at once is a
    stretch of a table of normal numbers, from a place of its own for each i, p, g and t.

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
    dtype = torch.float32 if _adds_up_in_float32(planes, coefficients, config, converter) else torch.float64
    result = torch.zeros(len(q), out_features, dtype=torch.float64, device=q.device)
    length = max(1, CHUNK // (len(bits) * out_features))
    for start in range(0, len(q), length):
        for g in range(groups):
            driven = bits[:, start : start + length, g].contiguous()
            places = None
            if noise is not None and config.reading_noise:
                shape = (len(planes), *driven.shape[:2])
                places = torch.randint(TABLE - out_features, shape, generator=noise, device=noise.device).to(q.device)
            total = torch.zeros(driven.shape[1], out_features, dtype=dtype, device=q.device)
            read(driven, planes, g, coefficients, converter, places, config.reading_noise, total)
            result[start : start + length] += total * scale[:, g].double()
    return result


def _adds_up_in_float32(
    planes: Sequence[Plane], coefficients: torch.Tensor, config: CIMConfig, converter: Converter | None
) -> bool:
    """Tell whether sums of all readings are whole multiples, below 2^24, of one power of two."""
    if converter is not None:
        unit = converter.step / (2 if converter.mid_rise else 1)
        if not math.log2(unit).is_integer():
            return False
    elif config.reading_noise or any(p.gain is not None or p.offset is not None or p.unit != 1 for p in planes):
        return False
    else:
        unit = 1.0
    if not all(plane.significance.is_integer() for plane in planes):
        return False
    weights = float(coefficients.abs().sum()) * sum(abs(plane.significance) for plane in planes)
    largest = config.rows if converter is None else max(abs(converter.low), converter.high + 1) * converter.step
    return largest / unit * weights <= 2**24


def _read(
    driven: torch.Tensor,
    planes: Sequence[Plane],
    group: int,
    coefficients: torch.Tensor,
    converter: Converter | None,
    places: torch.Tensor | None,
    noise: float,
    total: torch.Tensor,
) -> None:
    """
    Read the planes of the weight for all planes of the input, and add the readings to the total.

    Args:
        driven (`torch.Tensor` of shape `(planes of inputs, tokens, rows)`): int8.
        planes (`Sequence[Plane]`): of the weight.
        group (`int`): of rows.
        coefficients (`torch.Tensor` of shape `(planes of inputs,)`): their significances, float64.
        converter ([`Converter`], *optional*): the ADC.
        places (`torch.Tensor` of shape `(planes, planes of inputs, tokens)`, *optional*): int64, where in
            [`normal_table`] the noise of a row of readings begins.
        noise (`float`): standard deviation of a reading, in counts.
        total (`torch.Tensor` of shape `(tokens, out)`): float32 or float64; changed in place.
    """
    columns = torch.arange(total.shape[1], device=total.device)
    for p, plane in enumerate(planes):
        # in digits of eight bits, which are exact in TF32 and bfloat16 as well
        high, *low = (driven.float() @ digit[:, group].float().T for digit in plane.digits)
        counts = (256 * high + low[0] if low else high) * plane.unit
        if plane.gain is not None:
            counts = counts * plane.gain[group]
        if plane.offset is not None:
            counts = counts + plane.offset[group]
        if places is not None:
            counts = counts + noise * normal_table(total.device)[places[p, ..., None] + columns]
        if converter is not None:
            counts = converter(counts)
        weights = (coefficients * plane.significance).to(total.dtype)
        for weight, one in zip(weights, counts.to(total.dtype), strict=True):
            total += weight * one


def _read_on_cpu(
    driven: torch.Tensor,
    planes: Sequence[Plane],
    group: int,
    coefficients: torch.Tensor,
    converter: Converter | None,
    places: torch.Tensor | None,
    noise: float,
    total: torch.Tensor,
) -> None:
    """Do what [`_read`] does, with exact sums in whole units of a cell and one pass over the counts."""
    tokens, out_features = total.shape
    lines, width = driven.flatten(0, 1), None
    in_integers = integer_products(driven.shape[-1])
    if not in_integers:
        if all(plane.unit == 1 for plane in planes):
            driven, width = _packed(driven)
        lines = driven.flatten(0, 1).float()
    inverse, ends = None, (0.0, 0.0, 0.0)
    step = 1.0
    if converter is not None:
        step = converter.step
        inverse, ends = np.float32(1 / step), (converter.low, converter.high, 0.5 if converter.mid_rise else 0.0)
    ones, zeros = np.ones(out_features, np.float32), np.zeros(out_features, np.float32)
    table = None if places is None else normal_table(total.device).numpy()
    kind = torch.int32 if in_integers else torch.float32
    high, low = (torch.empty(len(lines), out_features, dtype=kind) for _ in range(2))
    for p, plane in enumerate(planes):
        if in_integers:
            for digit, counts in zip(plane.digits, (high, low), strict=False):
                torch._int_mm(lines, digit[:, group].T, out=counts)
        else:
            torch.mm(lines, plane.cells[:, group].float().T, out=high)
        two, shape = in_integers and len(plane.digits) == 2, (-1, tokens, out_features)
        _read_and_add(
            high.view(shape).numpy(), low.view(shape).numpy() if two else None, width, np.float32(plane.unit),
            ones if plane.gain is None else plane.gain[group].numpy(),
            zeros if plane.offset is None else plane.offset[group].numpy(),
            table, None if places is None else places[p].numpy(), np.float32(noise),
            (coefficients * (plane.significance * step)).to(total.dtype).numpy(), inverse, *map(np.float32, ends),
            total.numpy(),
        )  # fmt: skip


def _packed(driven: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    Put several planes of inputs `(planes, tokens, rows)` into each number: one product with whole cells for all.

    A count is within `±rows` and takes a digit of so many bits; float32 has 24.

    Returns:
        The numbers, `(-(-planes // (24 // width)), tokens, rows)`, float32, and the width of a digit in bits.
    """
    width = (2 * driven.shape[-1]).bit_length()
    several = 24 // width
    parts = driven.float().split(several)
    return torch.stack([sum(part[k] * 2.0 ** (width * k) for k in range(len(part))) for part in parts]), width  # type: ignore[misc]

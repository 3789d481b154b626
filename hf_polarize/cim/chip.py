"""Making a chip: the cells of a layer as they came out, from a seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import torch

from .configuration import CIMConfig
from .planes import WeightCode

LARGEST_CELL = 3.0
"""Cells are cut here: what is above is no cell any more."""


def generator_for(seed: int, *names: object) -> torch.Generator:
    """
    Return a generator of its own for every seed and name.

    It draws on the CPU whatever the device, and depends on nothing else: a chip is the same in every process, on every
    device, in every order of layers.
    """
    text = "/".join(map(str, (seed, *names))).encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") & (2**63 - 1)
    return torch.Generator("cpu").manual_seed(number)


def cut_moments(mismatch: float) -> tuple[float, float]:
    """
    Return the mean of a normal cell around 1 that is cut at 0 and [`LARGEST_CELL`], and that of its square.

    Wires and drift, by which cells are smaller when they are cut, are left out: under 1 % of the mean.
    """
    if mismatch < 1e-6:
        return 1.0, 1.0
    normal = NormalDist(1.0, mismatch)
    within, above = normal.cdf(LARGEST_CELL) - normal.cdf(0.0), 1 - normal.cdf(LARGEST_CELL)
    low, high = (mismatch**2 * normal.pdf(end) for end in (0.0, LARGEST_CELL))
    mean = within + low - high + LARGEST_CELL * above
    square = (1 + mismatch**2) * within + low - (1 + LARGEST_CELL) * high + LARGEST_CELL**2 * above
    return mean, square


def cell_resolution(rows: int) -> float:
    """
    Return the step of the grid on which cells lie, at most `2^-13` of a nominal cell.

    It is so coarse that every sum of `rows` cells is a float32 without rounding: counts do not depend on the order of
    summation, hence neither on the device nor on the number of tokens.
    """
    return 2.0 ** -min(13, 22 - math.ceil(math.log2(rows)))


def byte_digits(whole: torch.Tensor) -> list[torch.Tensor]:
    """Return int16 numbers up to 32639 as two of int8, the high one first: `256 * high + low`."""
    low = whole.to(torch.int8)  # the low byte, as a signed number
    return [((whole - low) >> 8).to(torch.int8), low]


@dataclass
class Plane:
    """
    One weight plane of a layer on one chip.

    Attributes:
        written (`torch.Tensor` of shape `(out, groups, rows)`): int8, what the cells should hold.
        cells (`torch.Tensor` of shape `(out, groups, rows)`): int16, what they hold, in units.
        unit (`float`): 1, or [`cell_resolution`].
        gain (`torch.Tensor` of shape `(groups, out)`, *optional*): of each column.
        offset (`torch.Tensor` of shape `(groups, out)`, *optional*): of each column, in counts.
        significance (`float`): of a count.
    """

    written: torch.Tensor
    cells: torch.Tensor
    unit: float
    gain: torch.Tensor | None
    offset: torch.Tensor | None
    significance: float

    def to(self, device: torch.device) -> Plane:
        moved = (None if t is None else t.to(device) for t in (self.written, self.cells, self.gain, self.offset))
        written, cells, gain, offset = moved
        return Plane(written, cells, self.unit, gain, offset, self.significance)  # type: ignore[arg-type]

    def of_columns(self, columns: torch.Tensor) -> Plane:
        """Return a plane with some of the columns."""
        gain, offset = (None if t is None else t[:, columns] for t in (self.gain, self.offset))
        return Plane(self.written[columns], self.cells[columns], self.unit, gain, offset, self.significance)

    @property
    def held(self) -> torch.Tensor:
        """What cells hold but for their spread, `(out, groups, rows)`: as written, but where one is stuck or dead."""
        return self.cells.sign()

    @cached_property
    def digits(self) -> list[torch.Tensor]:
        """The cells as int8 digits, the high one first: `256 * high + low`, or one digit where cells are whole."""
        return [self.cells.to(torch.int8)] if self.unit == 1 else byte_digits(self.cells)


def fabricate(indices: torch.Tensor, code: WeightCode, config: CIMConfig, layer: str) -> Iterator[Plane]:
    """
    Make the planes of a layer, one after the other.

    A written cell c is multiplied by `(1 + mismatch * n)`, by its share of the IR drop, and by its drift; stuck cells
    ignore what was written. n is normal.

    Args:
        indices (`torch.Tensor` of shape `(out, groups, rows)`): of [`~hf_polarize.cim.planes.grouped_weights`].
        code ([`WeightCode`]): of the values.
        config ([`CIMConfig`]): of the chip.
        layer (`str`): name of the layer; the cells depend on it and on `chip_seed`.
    """
    for p, significance in enumerate(code.significance.tolist()):
        yield fabricate_plane(code.cells[:, p].to(indices.device)[indices.int()], config, layer, p, significance)


def fabricate_plane(written: torch.Tensor, config: CIMConfig, layer: str, p: int, significance: float) -> Plane:
    """
    Make one plane of a layer. What is wrong with a cell does not depend on what is written into it.

    Args:
        written (`torch.Tensor` of shape `(out, groups, rows)`): -1, 0 or 1.
        config ([`CIMConfig`]): of the chip.
        layer (`str`): name of the layer.
        p (`int`): number of the plane.
        significance (`float`): of a count.
    """
    out_features, groups, _ = written.shape
    cells, unit = _made(written.float(), config, generator_for(config.chip_seed, "cells", layer, p))
    columns = generator_for(config.chip_seed, "columns", layer, p)
    gain = offset = None
    if config.column_gain:
        gain = (1 + config.column_gain * torch.randn(groups, out_features, generator=columns)).to(written.device)
    if config.column_offset:
        offset = (config.column_offset * torch.randn(groups, out_features, generator=columns)).to(written.device)
    return Plane(written, cells, unit, gain, offset, significance)


def nominal_factor(config: CIMConfig, device: torch.device) -> torch.Tensor:
    """Return what the array makes of a cell on average by its place in the column, `(rows,)`: drift and IR drop."""
    places = torch.arange(config.rows, device=device) / max(1, config.rows - 1)
    return config.drift * (1 - config.ir_drop * places)


def _made(written: torch.Tensor, config: CIMConfig, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    """Return cells `(out, groups, rows)` as they came out, int16, and their unit."""

    def draw(of: Any = torch.randn) -> torch.Tensor:
        return of(written.shape, generator=generator).to(written.device)  # type: ignore[no-any-return]

    cells = written
    if config.stuck_at_zero or config.stuck_at_one:
        lot = draw(torch.rand)
        cells = torch.where(lot < config.stuck_at_zero, 0.0, cells)
        cells = torch.where(lot > 1 - config.stuck_at_one, 1.0, cells)
        if config.signed:  # half of these
            cells = torch.where(lot > 1 - config.stuck_at_one / 2, -1.0, cells)
    factor = nominal_factor(config, written.device)
    if config.cell_mismatch:
        factor = factor * draw().mul_(config.cell_mismatch).add_(1)
    if config.log_drift_spread:
        factor = factor * torch.exp(draw() * -config.log_drift_spread)
    if bool((factor == 1).all()):
        return cells.to(torch.int16), 1.0
    step = cell_resolution(config.rows)
    return (cells * (factor.clamp(0, LARGEST_CELL) / step).round()).to(torch.int16), step

"""What a user can choose about the chip: each knob, its default, where that comes from, its check."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..models import full_name
from .presets import PRESETS

logger = logging.get_logger(__name__)

ENCODINGS = ("twos_complement", "sign_magnitude")
RANGES = ("full", "max", "percentile", "mse")
MAPPINGS = ("grid", "quiet", "learned", "one_hot")
MODELS = ("auto", "exact", "fast")
LEARNED_PLANES = (4, 5, 6, 7)
BOLTZMANN = 1.380649e-23
"""J/K."""
MISMATCH_1FF = 2.1 * 10**-2.5
"""
Relative standard deviation of a metal capacitor of 1 fF; it falls with the square root of its area, hence of its
capacitance (Pelgrom et al., JSSC 24, 1433, 1989). The value is assumed: below the some 1 % of good fringe capacitors.
"""
MAX_ROWS = 4096
LARGEST = 1e4
"""Of offsets and noise, in counts or mV: more than twice what any column counts."""
DRIFT_START = 20.0
"""Seconds after programming at which the drift of a non-volatile cell is counted from."""


MEASURED_FOR = {
    "input_bits", "weight_bits", "encoding", "mapping", "rows", "adc_bits", "adc_range", "percentile", "zero_code",
    "ir_drop", "drift_exponent", "drift_time",
}  # fmt: skip
"""Arguments that the measured range of an ADC depends on."""
ACTS_THROUGH = {
    "v_dd": ("read_noise",), "temperature": ("read_noise",), "adc_noise": ("read_noise",),
    "cell_capacitance": ("mismatch", "read_noise"),
}  # fmt: skip
"""Arguments that act on outputs by others alone, as long as those are left out."""


@dataclass(frozen=True)
class CIMConfig:
    """
    Describe the simulated analog chip that a backbone runs on.

    Inputs are quantized per token to signed integers and enter bit by bit; weights lie bit by bit in `rows` cells a
    column. A column adds up cell times bit, a *count*; an ADC reads it; shift-and-add weighs the codes of all pairs of
    input and weight planes, and groups of rows are added digitally with their scales. All defaults are those of a
    charge-domain SRAM array with 1 fF a cell at 0.8 V.

    Args:
        input_bits (`int`, defaults to 8): bits of an input with its sign, 2..8: integers within
            `±(2^(input_bits-1) - 1)`, one scale per token.
        weight_bits (`int`, defaults to 8):
            Bits of a weight with its sign, 2..8, for an INT8 backbone and for the mappings `"grid"` and `"quiet"`;
            number of planes, 4..7, for `"learned"`; unused for `"one_hot"`.
        encoding (`str`, defaults to `"twos_complement"`):
            `"twos_complement"`: cells and inputs are 0 or 1, the plane of the sign counts negative.
            `"sign_magnitude"`: differential cells and inputs of -1, 0 or 1, one plane less, counts of both signs;
            small values switch few cells, so errors follow the magnitude, but an ADC with a step above 1 has a dead
            zone.
        mapping (`str`, *optional*):
            How the values of the format become cells. `"grid"`: rounded to integers of `weight_bits`; with NF4 that
            adds 0.6 / 1.1 / 2.6 / 4.8 % of the weights' RMS at 8 / 7 / 6 / 5 bits, beside NF4's own 9.2 %. `"quiet"`:
            to the integer of least expected squared error over chips, its distance included: 63 = 0111111b is
            written for 67 = 1000011b where mismatch is large, since six middling cells err less than a large one.
            `"learned"`: binary planes with real significances fitted to the 16 values. `"one_hot"`: 15 planes, one
            for each value but 0; exact. Left out: `"quiet"` for a deflated model, else `"grid"`.
        rows (`int`, defaults to 64):
            Cells of a column that are read together. A group of rows has one digital scale per output: with NF4 and
            more rows than 64, or blocks that do not line up, values are rounded to the grid of the group's largest
            scale.
        adc_bits (`int`, *optional*, defaults to 6): 1..16; `None` reads counts without rounding.
        adc_range (`str`, defaults to `"full"`):
            `"full"`: all counts that can be. `"max"`, `"percentile"`, `"mse"`: the largest count, the percentile, or
            the range of least mean squared rounding error, layer by layer, of counts seen on data: give data to
            [`attach_cim`]. Without an ADC there is nothing to measure.
        percentile (`float`, defaults to 99.9): of the magnitudes of counts, for `adc_range="percentile"`.
        zero_code (`bool`, defaults to `True`): whether a code stands for a count of exactly 0 (mid-tread); otherwise 0
            lies between two codes (mid-rise).
        cell_capacitance (`float`, defaults to 1.0): fF.
        mismatch (`float`, *optional*):
            Relative standard deviation of a cell, fixed when the chip is made. Left out: `2.1 * 10^-2.5 / sqrt(fF)`,
            0.66 % at 1 fF.
        column_gain (`float`, defaults to 0.0): relative standard deviation of a column's gain, fixed per chip.
        column_offset (`float`, defaults to 0.0): standard deviation of a column's offset, in counts, fixed per chip.
        stuck_at_zero, stuck_at_one (`float`, default 0.0): share of cells that hold this value whatever is written; a
            differential cell stuck at one is stuck at 1 or at -1.
        ir_drop (`float`, defaults to 0.0): relative loss of the cell at the far end of a column; it grows linearly.
        drift_exponent, drift_spread (`float`, default 0.0): mean and standard deviation over cells of nu in the drift
            of a non-volatile cell, `(drift_time / 20 s)^-nu`. The digital side makes up for the mean. SRAM has none.
        drift_time (`float`, defaults to 20.0): seconds since programming.
        adc_noise (`float`, defaults to 0.5): RMS noise of an ADC referred to its input, mV; 0.5 to 1 in silicon.
        read_noise (`float`, *optional*):
            Standard deviation of each reading, in counts, new at every reading. Left out: `adc_noise` and the thermal
            noise kT/C of a column of `rows` cells, with a count of `v_dd / rows`.
        v_dd (`float`, defaults to 0.8): V.
        temperature (`float`, defaults to 300.0): K.
        chip_seed (`int`, defaults to 0): which chip; the same seed is the same chip on every device.
        read_seed (`int`, defaults to 0): of the noise of readings.
        model (`str`, defaults to `"auto"`):
            `"exact"`: plane by plane. `"fast"`: one product with the weights of this chip (in 16 bits, or bfloat16 on
            a GPU) and noise of the right moments; raises where it is not valid. `"auto"`: fast where it is valid, else
            exact.
        layers (`list[str]`, *optional*): regular expressions; only layers whose name one of them finds are on the
            chip, be it the name with a head or without one. Left out: the whole backbone.
        ranges (`dict[str, float]`): largest count of the ADC by layer, where `adc_range` was measured; filled in by
            [`attach_cim`]. [`replace`] drops them if it changes what they were measured for.

    Raises:
        ValueError: If a value is not among those accepted; the message names them.
    """

    input_bits: int = 8
    weight_bits: int = 8
    encoding: str = "twos_complement"
    mapping: str | None = None
    rows: int = 64
    adc_bits: int | None = 6
    adc_range: str = "full"
    percentile: float = 99.9
    zero_code: bool = True
    cell_capacitance: float = 1.0
    mismatch: float | None = None
    column_gain: float = 0.0
    column_offset: float = 0.0
    stuck_at_zero: float = 0.0
    stuck_at_one: float = 0.0
    ir_drop: float = 0.0
    drift_exponent: float = 0.0
    drift_spread: float = 0.0
    drift_time: float = 20.0
    adc_noise: float = 0.5
    read_noise: float | None = None
    v_dd: float = 0.8
    temperature: float = 300.0
    chip_seed: int = 0
    read_seed: int = 0
    model: str = "auto"
    layers: list[str] | None = field(default=None, hash=False)
    ranges: dict[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_choices()
        self._check_layers()
        self._check_ranges()
        if self.adc_bits is not None and self.adc_range == "full" and 2**self.adc_bits < self.span:
            logger.warning_once(
                f"cim: adc_bits={self.adc_bits} gives {2**self.adc_bits} codes for a span of {self.span} counts "
                f"(rows={self.rows}, {self.encoding}): each reading is rounded. It takes "
                f"adc_bits={math.ceil(math.log2(self.span))}, fewer rows or a measured adc_range to lose less."
            )

    def _check_choices(self) -> None:
        for name, accepted in {
            "encoding": ENCODINGS,
            "mapping": (None, *MAPPINGS),
            "adc_range": RANGES,
            "model": MODELS,
            "zero_code": (True, False),
        }.items():
            if getattr(self, name) not in accepted:
                shown = ", ".join(map(repr, accepted))
                raise ValueError(f"cim: {name} must be one of {shown}; got {getattr(self, name)!r}")
        object.__setattr__(self, "zero_code", bool(self.zero_code))
        if self.mapping == "learned" and self.weight_bits not in LEARNED_PLANES:
            raise ValueError(
                f'cim: mapping="learned" has weight_bits of {LEARNED_PLANES[0]} to {LEARNED_PLANES[-1]} planes; got '
                f"{self.weight_bits!r}"
            )
        if not self.on_grid and 64 % self.rows:
            raise ValueError(
                f'cim: mapping="{self.mapping}" needs rows that divide the 64 weights of an NF4 block; got {self.rows}'
            )

    def _check_layers(self) -> None:
        if self.layers is None:
            return
        if not isinstance(self.layers, (list, tuple)) or not all(isinstance(pattern, str) for pattern in self.layers):
            raise ValueError(f"cim: layers must be a list of regular expressions; got {self.layers!r}")
        for pattern in self.layers:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"cim: layers: {pattern!r} is no regular expression, {error}") from error
        object.__setattr__(self, "layers", list(self.layers))

    def _check_ranges(self) -> None:
        if not isinstance(self.ranges, dict):
            raise ValueError(f"cim: ranges must be a dict of a largest count by layer; got {self.ranges!r}")
        for layer, count in self.ranges.items():
            if isinstance(count, bool) or not isinstance(count, Real) or not 0 < count <= MAX_ROWS:  # type: ignore[operator]
                raise ValueError(f"cim: ranges: the largest count of {layer} must be in 0..{MAX_ROWS}; got {count!r}")
        object.__setattr__(self, "ranges", {layer: float(count) for layer, count in self.ranges.items()})

    def _check_numbers(self) -> None:
        whole: tuple[tuple[str, int, int], ...] = (
            ("input_bits", 2, 8),
            ("weight_bits", 2, 8),
            ("rows", 1, MAX_ROWS),
            ("adc_bits", 1, 16),
            ("chip_seed", 0, 2**63 - 1),
            ("read_seed", 0, 2**63 - 1),
        )
        for name, first, last in whole:
            value = getattr(self, name)
            if name == "adc_bits" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or not first <= value <= last:  # type: ignore[operator]
                raise ValueError(f"cim: {name} must be an integer in {first}..{last}; got {value!r}")
            object.__setattr__(self, name, int(value))  # those of NumPy are no JSON
        for name, low, high in (
            ("percentile", 50.0, 100.0),
            ("cell_capacitance", 1e-3, 1e6),
            ("mismatch", 0.0, 1.0),
            ("column_gain", 0.0, 1.0),
            ("column_offset", 0.0, LARGEST),
            ("stuck_at_zero", 0.0, 1.0),
            ("stuck_at_one", 0.0, 1.0),
            ("ir_drop", 0.0, 1.0),
            ("drift_exponent", 0.0, 1.0),
            ("drift_spread", 0.0, 1.0),
            ("drift_time", DRIFT_START, 1e12),
            ("adc_noise", 0.0, LARGEST),
            ("read_noise", 0.0, LARGEST),
            ("v_dd", 0.1, 10.0),
            ("temperature", 1.0, 1000.0),
        ):
            value = getattr(self, name)
            if value is None and name in ("mismatch", "read_noise"):
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:  # type: ignore[operator]
                raise ValueError(f"cim: {name} must be a number in {low:g}..{high:g}; got {value!r}")
            object.__setattr__(self, name, float(value))
        if self.stuck_at_zero + self.stuck_at_one > 1:
            raise ValueError("cim: stuck_at_zero and stuck_at_one are shares of all cells; their sum is above 1")

    @property
    def unseeded(self) -> CIMConfig:
        """What all chips of this kind share: a copy without seeds, `layers` and `ranges`."""
        return self.replace(chip_seed=0, read_seed=0, layers=None, ranges={})

    @property
    def on_grid(self) -> bool:
        """Whether cells hold integers, whatever the values of the format."""
        return self.mapping in (None, "grid", "quiet")

    @property
    def signed(self) -> bool:
        """Whether counts have both signs."""
        return self.encoding == "sign_magnitude"

    @property
    def span(self) -> int:
        """Largest less smallest count of a column without defects."""
        return (2 if self.signed else 1) * self.rows

    @property
    def cell_mismatch(self) -> float:
        """Relative standard deviation of a cell."""
        return MISMATCH_1FF / math.sqrt(self.cell_capacitance) if self.mismatch is None else self.mismatch

    @property
    def reading_noise(self) -> float:
        """Standard deviation of a reading in counts: `rows / v_dd * sqrt(adc_noise^2 + k T / (rows C))`."""
        if self.read_noise is not None:
            return self.read_noise
        thermal = BOLTZMANN * self.temperature / (self.rows * self.cell_capacitance * 1e-15)
        return self.rows / self.v_dd * math.sqrt((self.adc_noise * 1e-3) ** 2 + thermal)

    @property
    def drift(self) -> float:
        """What drift leaves of a cell on average; the digital side divides by it."""
        return math.exp(-self.drift_exponent * math.log(self.drift_time / DRIFT_START))

    @property
    def log_drift_spread(self) -> float:
        """Standard deviation over cells of the logarithm of what drift leaves of them."""
        return self.drift_spread * math.log(self.drift_time / DRIFT_START)

    @property
    def cell_variance(self) -> float:
        """Variance of an active cell from cell to cell, in units of the average one: mismatch, and spread of drift."""
        return self.cell_mismatch**2 + self.log_drift_spread**2

    @property
    def static_variance(self) -> float:
        """
        Variance of an active cell in units of the average one, its place on the wire included.

        Stuck cells are off by whole counts; they are not in it.
        """
        wire = self.ir_drop / (1 - self.ir_drop / 2)  # by which cells differ along it, evenly
        return self.cell_variance + wire**2 / 12

    @property
    def measured(self) -> bool:
        """Whether the range of the ADC is that of counts seen on data."""
        return self.adc_bits is not None and self.adc_range != "full"

    def largest_count(self, layer: str) -> float:
        """Return the count at the end of the ADC's range."""
        return self.ranges.get(layer, float(self.rows)) if self.measured else float(self.rows)

    def covers(self, layer: str, model: PreTrainedModel) -> bool:
        """Whether a layer of a model is on the chip, by its name there, with a head or without one."""
        full = full_name(model, layer)
        names = {layer, full, full.removeprefix(f"{model.base_model_prefix}.")}
        return self.layers is None or any(re.search(pattern, name) for pattern in self.layers for name in names)

    def quietly(self) -> CIMConfig:
        """
        Return a copy with the mapping `"quiet"`, if this one leaves it open.

        It keeps the `ranges`: counts are much the same, and a checkpoint that is loaded has no data to measure on.
        """
        return self if self.mapping is not None else self.replace(mapping="quiet", ranges=self.ranges)

    def replace(self, **changes: Any) -> CIMConfig:
        """Return a copy with other values, without the `ranges` if they were measured for something else."""
        if any(getattr(self, name) != changes[name] for name in MEASURED_FOR & changes.keys()):
            changes = {"ranges": {}, **changes}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults, as JSON can hold it."""
        return {
            item.name: value
            for item in dataclasses.fields(self)
            if (value := getattr(self, item.name)) != (item.default if item.default is not dataclasses.MISSING else {})
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CIMConfig:
        """Read what `to_dict` wrote."""
        if not isinstance(values, dict):
            raise TypeError(f"cim must be a CIMConfig, a dict of its arguments, or None; got {values!r}")
        known = [item.name for item in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise ValueError(f"cim: there is no {key!r}; the nearest is {near!r}")
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> CIMConfig:
        """
        Return a named chip.

        Args:
            name (`str`): `"ideal"`, `"sram-28nm"`, `"sram-16nm"`, `"noisy"` or `"nvm"`; see `PRESETS`.
            **changes: values that differ.

        Raises:
            ValueError: If there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"cim: there is no preset {name!r}; known are {', '.join(map(repr, PRESETS))}")
        chip = cls.from_dict({**PRESETS[name], **changes})
        for message in chip.idle(changes):
            logger.warning_once(f"cim: {message}")
        return chip

    def idle(self, changes: Collection[str]) -> list[str]:
        """Say of which of these arguments no output depends, since what they act through is set."""
        messages = []
        for name in changes:
            fixed = [d for d in ACTS_THROUGH.get(name, ()) if d not in changes and getattr(self, d) is not None]
            if fixed and len(fixed) == len(ACTS_THROUGH[name]):
                values = " and ".join(
                    f"{derived}, which this chip sets to {getattr(self, derived)}" for derived in fixed
                )
                messages.append(
                    f"{name} acts on outputs through {values}: give it as null to let it follow, "
                    f"cim={{preset: ..., {fixed[0]}: null}}"
                )
        return messages

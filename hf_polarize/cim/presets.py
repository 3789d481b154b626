"""Chips that have a name: what of them differs from the defaults of [`~hf_polarize.cim.configuration.CIMConfig`]."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # nothing is lost but what 8-bit inputs and the grid of the weights lose
    "ideal": {"mismatch": 0.0, "read_noise": 0.0, "adc_bits": None},
    # charge-domain SRAM: 64 rows and a 6-bit ADC lose no count but the largest; supply and cell of the node, gain and
    # offset of columns as they are left after trimming: assumptions, not one chip's figures
    "sram-28nm": {"v_dd": 0.9, "cell_capacitance": 1.2, "column_gain": 0.005, "column_offset": 0.1},
    "sram-16nm": {"v_dd": 0.8, "cell_capacitance": 0.8, "adc_noise": 0.7, "column_gain": 0.005, "column_offset": 0.1},
    # cells far worse than good silicon under a good ADC, so that there is something to repair
    "noisy": {"encoding": "sign_magnitude", "adc_bits": 10, "mismatch": 0.15, "read_noise": 0.02},
    # phase-change memory after a day: nu = 0.049 +- 0.008 for cells programmed to their largest conductance (the
    # statistical model of Joshi et al., Nature Communications 11, 2473, 2020, from 20 s on); the rest is assumed
    "nvm": {
        "encoding": "sign_magnitude", "adc_bits": 7, "mismatch": 0.03, "read_noise": 0.3,
        "drift_exponent": 0.049, "drift_spread": 0.008, "drift_time": 86400.0,
    },
}  # fmt: skip
"""Named chips."""

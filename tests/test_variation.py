"""Chips that nobody made, against those that are made."""

import pytest
import torch
from conftest import output, tiny_inputs, tiny_model

from hf_polarize import CIMConfig, ClosedForm, PolarizeConfig, SurrogateConfig, attach_cim, polarize
from hf_polarize.backbone import quantize_linear
from hf_polarize.cim import fast as fast_module
from hf_polarize.cim.array import Converter
from hf_polarize.cim.chip import generator_for
from hf_polarize.cim.hook import OnChip, reset_reads
from hf_polarize.cim.moments import column_offsets, read_moments
from hf_polarize.cim.variation import SampledChips, chip_moments


@pytest.mark.parametrize("encoding", ["sign_magnitude", "twos_complement"])
@pytest.mark.parametrize(
    "defects",
    [
        {"mismatch": 0.1, "ir_drop": 0.2},
        {"mismatch": 1.0},  # cells are cut at 0 and 3
        {"mismatch": 0.05, "ir_drop": 0.1, "adc_bits": 8},
        {"mismatch": 0.05, "stuck_at_zero": 0.05, "stuck_at_one": 0.1},
        {"mismatch": 0.05, "column_gain": 0.02, "column_offset": 0.5},
        {"mismatch": 0.05, "stuck_at_zero": 0.02, "stuck_at_one": 0.02, "column_offset": 0.2, "adc_bits": 8},
        {"mismatch": 0.0, "drift_exponent": 0.05, "drift_spread": 0.02, "drift_time": 1e5},
    ],
)
def test_weights_over_chips_have_the_moments_that_are_computed(encoding, defects, monkeypatch):
    """What the closed form goes by, against 300 chips that are made, and 300 that are sampled for training."""
    monkeypatch.setattr(fast_module, "fit_to_readings", lambda *_: None)  # which is of a single chip
    linear = torch.nn.Linear(64, 32, bias=False)
    linear.weight = torch.nn.Parameter(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))
    config = CIMConfig(**{"encoding": encoding, "read_noise": 0.0, "adc_bits": None, **defects})
    layer = quantize_linear(linear, PolarizeConfig(cim=config))
    moments = chip_moments(layer, config)
    made, sampled = [], []
    for seed in range(300):
        chip = OnChip(layer, "layer", config.replace(chip_seed=seed))
        made.append(chip.fast)
        chip.vary(moments, generator_for(seed, "sampled"))
        sampled.append(chip.varied)
    for chips in (made, sampled):
        found, offset = (torch.stack([getattr(c, part).float() for c in chips]) for part in ("weight", "offset"))
        varies = moments.variance > 0  # a differential cell that holds 0 has no mismatch
        off = ((found.mean(0) - moments.mean) / (moments.variance / 300).sqrt())[varies]
        assert float(off.square().mean()) == pytest.approx(1, abs=5 * (2 / len(off)) ** 0.5)  # chi-squared
        assert float(found.var(0).sum() / moments.variance.sum()) == pytest.approx(1, abs=0.05)
        assert float(offset.var(0).sum()) == pytest.approx(float(moments.offset.sum()), rel=0.1)


@pytest.mark.parametrize(
    "defects", [{"adc_bits": 8}, {"adc_bits": 7, "mismatch": 0.1}, {"ir_drop": 0.05, "adc_bits": 9}]
)
def test_the_moments_are_those_of_chips_that_are_fitted_to_their_readings(defects):
    linear = torch.nn.Linear(256, 64, bias=False)
    linear.weight = torch.nn.Parameter(torch.randn(64, 256, generator=torch.Generator().manual_seed(1)))
    config = CIMConfig.preset("noisy").replace(**defects)
    layer = quantize_linear(linear, PolarizeConfig(cim=config))
    moments = chip_moments(layer, config)
    made = torch.stack([OnChip(layer, "layer", config.replace(chip_seed=seed)).fast.weight for seed in range(20)])
    assert float((made.mean(0) * moments.mean).sum() / moments.mean.square().sum()) == pytest.approx(1, abs=0.02)
    assert float(made.var(0).sum() / moments.variance.sum()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 17, 64])
def test_readings_of_signed_counts_follow_their_cells_as_computed(rows):
    """kappa and variance against half a million readings, under an ADC of whole counts."""
    config = CIMConfig.preset("noisy", adc_bits=7)
    converter = Converter.of(config, 64.0)
    found = read_moments(converter, torch.tensor([rows]), torch.tensor([0.45], dtype=torch.float64), config)
    generator = torch.Generator().manual_seed(0)
    cells = torch.rand(2**19, rows, generator=generator)
    cells = torch.where(cells < 0.225, -1.0, torch.where(cells < 0.45, 1.0, 0.0)).double()
    noise = torch.randn(2, len(cells), generator=generator, dtype=torch.float64)
    count, own = cells.sum(1), 0.15 * cells.abs().sum(1).sqrt() * noise[0]
    error = converter(count + own + 0.02 * noise[1]) - count
    kappa = float((error * own).mean() / own.square().mean())
    assert float(found.kappa) == pytest.approx(kappa, abs=0.015)
    assert float(found.static) == pytest.approx(float(own.square().mean()), rel=0.02)
    assert float(found.variance) == pytest.approx(float((error - kappa * own).var()), rel=0.04, abs=1e-4)


@pytest.mark.parametrize("sigma", [0.2, 0.9, 1.1, 3.2, 6.4])
def test_offsets_of_any_width_are_those_of_drawn_columns(sigma):
    """kappa and the variance of readings, against a million readings; the least offsets are below a step of 1."""
    config = CIMConfig(column_offset=sigma, mismatch=0.05, read_noise=0.1, adc_bits=9, rows=64)
    converter = Converter(1.0, -500, 500, mid_rise=False)
    driven, density = torch.tensor([40]), torch.tensor([0.5], dtype=torch.float64)
    found = read_moments(converter, driven, density, config)
    generator = torch.Generator().manual_seed(0)

    def normal(n):
        return torch.randn(n, generator=generator, dtype=torch.float64)

    n = 2**20
    count = torch.distributions.Binomial(40, 0.5).sample((n,)).double()
    own = normal(n) * 0.05 * count.sqrt()
    reading = converter(count + own + sigma * normal(n) + 0.1 * normal(n)) - count
    kappa = float((reading * own).mean() / own.square().mean())
    assert float(found.kappa) == pytest.approx(kappa, abs=0.05)
    assert found.biases.shape[0] == len(column_offsets(converter, config)[0])
    spread = float(found.variance + found.kappa.square() * found.static)
    of_columns = float(found.biases[:, 0, 0].square() @ column_offsets(converter, config)[1])
    assert spread + of_columns == pytest.approx(float(reading.var()), rel=0.03)


@pytest.mark.parametrize("preset", ["noisy", "nvm", "sram-28nm", "sram-16nm"])
def test_the_noise_of_readings_is_that_of_the_exact_model(preset):
    """Good cells under an ADC that tells counts apart are hardly ever misread: no rounding is counted for them."""
    config = CIMConfig.preset(preset)
    linear = torch.nn.Linear(512, 64, bias=False)
    linear.weight = torch.nn.Parameter(torch.randn(64, 512, generator=torch.Generator().manual_seed(0)))
    layer = quantize_linear(linear, PolarizeConfig(cim=config))
    fitted = OnChip(layer, "layer", config).fast.std.square().mean()
    assert 0.4 < float(chip_moments(layer, config).reading.mean() / fitted) < 2.5  # of SRAM a few misread counts
    coarse = config.replace(adc_bits=5)
    assert chip_moments(layer, coarse).reading.mean() > 4 * chip_moments(layer, config).reading.mean()


def test_a_sampled_chip_is_the_same_under_the_same_names():
    model = tiny_model("llama-untied")
    polarize(model, [tiny_inputs(model)], PolarizeConfig("nf4"), SurrogateConfig(r=4), ClosedForm(alternations=0))
    attach_cim(model, CIMConfig.preset("noisy"))
    sampled = SampledChips(model)

    def on(*names):
        reset_reads(model)
        sampled.take(*names)
        found = output(model, tiny_inputs(model))
        sampled.restore()
        return found

    reset_reads(model)
    own = output(model, tiny_inputs(model))
    first = on("training", 1)
    assert torch.equal(first, on("training", 1))
    assert not any(torch.equal(first, other) for other in (own, on("training", 2), on("evaluation", 1)))
    reset_reads(model)
    assert torch.equal(own, output(model, tiny_inputs(model)))

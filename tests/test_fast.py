"""The fast model of the simulated array against the exact one."""

import pytest
import torch
from conftest import array_of, random_integers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torch.testing import assert_close

from hf_polarize import CIMConfig
from hf_polarize.cim import array as array_module
from hf_polarize.cim.array import Converter, exact_product
from hf_polarize.cim.fast import fast_array, normal_like
from hf_polarize.cim.planes import integer_planes, quantized_inputs
from hf_polarize.cim.token_noise import TokenNoise, driven_rows

FAST = {
    "no ADC": {"adc_bits": None, "read_noise": 0.5},
    "rounded twice": {"adc_bits": 5, "read_noise": 0.3},
    "rounded by four": {"adc_bits": 4, "read_noise": 1.0},
    "noisy readings": {"read_noise": 0.4},
    "mismatch": {"mismatch": 0.1, "read_noise": 0.3},
    "small mismatch": {"mismatch": 0.03, "read_noise": 0.3},
    "columns": {"mismatch": 0.05, "column_gain": 0.02, "column_offset": 0.2, "read_noise": 0.3},
    "mid-rise": {"adc_bits": 5, "zero_code": False, "read_noise": 2.0},
    "many rows": {"rows": 256, "adc_bits": 7, "read_noise": 0.5},
    "signed": {"encoding": "sign_magnitude", "adc_bits": 7, "read_noise": 0.4, "mismatch": 0.1},
    "signed, noisy": {"encoding": "sign_magnitude", "adc_bits": 7, "read_noise": 0.3, "mismatch": 0.2},
    "stuck": {"stuck_at_zero": 0.02, "stuck_at_one": 0.02, "mismatch": 0.03, "read_noise": 0.4},
    "signed, stuck": {"encoding": "sign_magnitude", "adc_bits": 8, "stuck_at_one": 0.02, "mismatch": 0.1},
    "wires": {"encoding": "sign_magnitude", "adc_bits": 8, "ir_drop": 0.05, "mismatch": 0.1, "read_noise": 0.2},
    "offsets below a step": {"encoding": "sign_magnitude", "rows": 32, "adc_bits": 8, "mismatch": 0.03,
                             "column_offset": 0.2, "read_noise": 0.1},
    "few bits": {"input_bits": 6, "weight_bits": 6, "read_noise": 0.4},
    "drifted": {"encoding": "sign_magnitude", "adc_bits": 7, "read_noise": 0.3, "mismatch": 0.03,
                "drift_time": 86400.0, "drift_exponent": 0.049, "drift_spread": 0.008},
}  # fmt: skip


@pytest.fixture(scope="module", params=FAST)
def both_models(request):
    """The ideal product of a layer with `(384, 512)` inputs, and those of the exact and of the fast model."""
    errors, reason = errors_of(CIMConfig(**{"mismatch": 0.0, "read_noise": 0.0, **FAST[request.param]}))
    assert reason is None
    return errors


def errors_of(config):
    """Return a function of the inputs that gives the errors of both models, and why the fast one is not valid."""
    generator = torch.Generator().manual_seed(10)
    largest = 2 ** (config.weight_bits - 1) - 1
    weight = (torch.randn(96, 512, generator=generator) * largest / 3.5).round().clamp(-largest, largest)
    planes, scale = array_of(weight, config)
    scale = scale / config.drift
    converter = Converter.of(config, float(config.rows))
    fast, reason = fast_array(planes, scale, converter, config, 512)

    def errors(x):
        q, _ = quantized_inputs(x, config.input_bits)
        ideal = q.double() @ weight.double().T
        exact = exact_product(q, planes, scale, config, converter, torch.Generator().manual_seed(1))
        return exact - ideal, fast(q, torch.ones(len(q), 1), torch.Generator().manual_seed(1)).double() - ideal

    return errors, reason


def test_the_fast_model_has_the_moments_of_the_exact_one(both_models):
    exact, quick = both_models(torch.randn(384, 512, generator=torch.Generator().manual_seed(2)))
    assert float(quick.std() / exact.std()) == pytest.approx(1, abs=0.05)
    assert ks_2samp((exact / exact.std()).flatten(), (quick / exact.std()).flatten()).statistic < 0.02


@pytest.mark.parametrize("encoding", ["sign_magnitude", "twos_complement"])
def test_without_an_adc_columns_of_another_gain_are_another_weight(encoding):
    """Nothing is random then: both models are one product, but for weights in 16 bits."""
    config = CIMConfig(encoding=encoding, adc_bits=None, mismatch=0.0, read_noise=0.0, column_gain=0.01)
    errors, reason = errors_of(config)
    assert reason is None
    exact, quick = errors(torch.randn(64, 512, generator=torch.Generator().manual_seed(2)))
    assert exact.std() > 0.01
    assert_close(quick, exact, rtol=0, atol=float(0.02 * exact.std()))


OTHERS = {
    "few large values": lambda x: x**3,
    "no negative values": torch.relu,
    "both": lambda x: x.relu() ** 3,
    "few values but 0": lambda x: x * (x.abs() > 2),
    "small negative values": torch.nn.functional.gelu,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_fast_model_follows_other_tokens(kind, both_models):
    """
    Most of the planes of those drive few rows, and in two's complement most are copies of the sign.

    Nothing is fitted to them. Where no value is negative, what noise makes of a count of 0 is cut on one side.
    """
    exact, quick = both_models(OTHERS[kind](torch.randn(384, 512, generator=torch.Generator().manual_seed(3))))
    assert float(quick.std() / exact.std()) == pytest.approx(1, abs=0.08)
    distance = ks_2samp((exact / exact.std()).flatten(), (quick / exact.std()).flatten()).statistic
    assert distance < (0.025 if kind == "few large values" else 0.05)


@pytest.mark.parametrize("arguments", [{"adc_bits": 5}, {"adc_bits": 4}, {"rows": 256, "adc_bits": 7}])
def test_it_is_known_that_steps_without_noise_depend_on_the_kind_of_token(arguments):
    """They swallow what few rows count, and copies of planes of the weight are rounded alike."""
    _, reason = errors_of(CIMConfig(mismatch=0.0, read_noise=0.0, **arguments))
    assert reason and reason.startswith("errors of tokens with ")


ANY_CHIP = (
    st.fixed_dictionaries({
        "encoding": st.sampled_from(["sign_magnitude", "twos_complement"]),
        "rows": st.sampled_from([32, 64, 128]),
        "adc_bits": st.sampled_from([None, 5, 6, 7, 8, 10]),
        "zero_code": st.booleans(),
        "mismatch": st.sampled_from([0.0, 0.01, 0.03, 0.1, 0.2]),
        "read_noise": st.sampled_from([0.0, 0.02, 0.2, 0.5, 1.0]),
        "column_gain": st.sampled_from([0.0, 0.01]),
        "column_offset": st.sampled_from([0.0, 0.2]),
        "stuck_at_zero": st.sampled_from([0.0, 0.01]),
        "stuck_at_one": st.sampled_from([0.0, 0.01]),
        "ir_drop": st.sampled_from([0.0, 0.05]),
        "input_bits": st.sampled_from([6, 8]),
        "weight_bits": st.sampled_from([5, 8]),
        "chip_seed": st.integers(0, 1000),
    })
)  # fmt: skip


def test_where_the_fast_model_calls_itself_valid_it_is():
    valid = []

    @settings(derandomize=True, deadline=None, max_examples=80)
    @given(ANY_CHIP)
    def check(arguments):
        errors, reason = errors_of(CIMConfig(**arguments))
        valid.append(reason is None)
        if reason is not None:
            return
        exact, quick = errors(torch.randn(192, 512, generator=torch.Generator().manual_seed(2)))
        if float(exact.std()) > 1e-6:  # else there is nothing but rounding in float32
            assert float(quick.std() / exact.std()) == pytest.approx(1, abs=0.05)
            assert ks_2samp((exact / exact.std()).flatten(), (quick / exact.std()).flatten()).statistic < 0.04

    check()
    assert sum(valid) > 0.5 * len(valid)


@pytest.mark.parametrize("rows, features", [(64, 100), (300, 700)])
@pytest.mark.parametrize("encoding", ["sign_magnitude", "twos_complement"])
def test_driven_rows_are_those_of_the_planes(rows, features, encoding):
    q = torch.randint(-127, 128, (5, features), generator=torch.Generator().manual_seed(0)).float()
    bits, _ = integer_planes(q, 8, encoding)
    groups = -(-features // rows)
    padded = torch.nn.functional.pad(bits, (0, groups * rows - features)).view(len(bits), 5, groups, rows)
    kind = "magnitude" if encoding == "sign_magnitude" else "bits"
    assert torch.equal(driven_rows(q, groups, rows, len(bits), kind), (padded != 0).sum(-1).permute(1, 2, 0))
    overflowed = torch.full((1, features), torch.nan)
    assert not driven_rows(overflowed, groups, rows, len(bits), kind).any()
    if kind == "bits":
        flips = (padded[:-1] != padded[-1]).sum(-1).permute(1, 2, 0)
        assert torch.equal(driven_rows(q, groups, rows, len(bits) - 1, "flips"), flips)


@pytest.mark.parametrize("rows, features", [(64, 576), (7, 100), (500, 1100), (2039, 2100), (2040, 2100)])
@pytest.mark.parametrize("planes, copies", [(8, 0.2), (8, 2.0), (8, None), (7, None)])
def test_the_noise_of_a_token_is_that_of_the_rows_it_drives(rows, features, planes, copies):
    """In one pass, as on other devices, against loops."""
    groups = -(-features // rows)
    share = torch.rand(groups, planes, rows + 1, generator=torch.Generator().manual_seed(0))
    noise = TokenNoise(share, None if copies is None else copies * share[0, 1:])
    q = random_integers(5, features).float()
    padded = torch.nn.functional.pad(q, (0, groups * rows - features)).view(5, groups, rows)
    bits, _ = integer_planes(padded.abs() if copies is None else padded, 8, "twos_complement")
    expected = torch.zeros(5, 1)
    for t in range(5):
        for g in range(groups):
            own = [share[g, i, int(bits[i, t, g].sum())] for i in range(planes)]
            total = sum(own)
            if copies is not None:
                differing = [int((bits[i, t, g] != bits[-1, t, g]).sum()) for i in range(planes - 1)]
                gone = own[-1] * sum(noise.copies[i, n] for i, n in enumerate(differing))
                total = max(total - gone, own[-1] / 4 ** (planes - 1))
            expected[t] += total
    assert torch.allclose(noise(q), expected.sqrt(), rtol=1e-5)
    assert torch.allclose(noise._variance(q), expected[:, 0], rtol=1e-5)


@pytest.mark.parametrize("noisy", [True, False])
def test_the_fast_model_is_the_same_in_integers_in_floats_and_on_any_device(noisy, monkeypatch):
    config = CIMConfig.preset("noisy", column_offset=0.2)
    planes, group_scale = array_of(random_integers(700, 192), config)
    array, reason = fast_array(planes, group_scale, Converter.of(config, 64.0), config, 192)
    assert reason is None
    q, scale = quantized_inputs(torch.randn(900, 192, generator=torch.Generator().manual_seed(0)), 8)

    def noise():
        return torch.Generator().manual_seed(3) if noisy else None

    product = q.double() @ array.weight.double().T + array.offset
    if noisy:  # more than two stretches of the table
        numbers = normal_like(torch.empty(900, 700), noise())
        product += numbers * array.loudness(q) * array.std
    expected = product * scale

    def check(result, at_most):
        assert result.dtype == torch.float32
        assert float((result - expected).norm() / expected.norm()) < at_most

    check(array._anywhere(q, scale, noise()), 1e-6)
    monkeypatch.setattr(array_module, "INTEGERS_ARE_FAST", False)
    check(array(q, scale, noise()), 1e-6)
    monkeypatch.setattr(array_module, "INTEGERS_ARE_FAST", True)
    check(array(q, scale, noise()), 1e-4)
    high, low, step = array.digits
    assert ((256 * high.float() + low) * step[:, None] - array.weight).abs().le(0.51 * step[:, None]).all()
    array.weight = array.weight.bfloat16()  # as on a GPU
    check(array.to(q.device)(q, scale, noise()), 1e-2)

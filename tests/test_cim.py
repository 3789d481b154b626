"""The simulated array against naive loops over integers, and against what the layers hold."""

import math

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from conftest import array_of, random_integers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from hf_polarize import CIMConfig
from hf_polarize.cim.array import Converter, exact_product
from hf_polarize.cim.chip import fabricate
from hf_polarize.cim.planes import grouped_weights, integer_planes, quantized_inputs, weight_code
from hf_polarize.cim.ranges import best_range

NF4 = get_4bit_type("nf4", device="cpu")
IDEAL = CIMConfig.preset("ideal")


def naive_read(count, config, largest):
    """One ADC, in Python."""
    if config.adc_bits is None:
        return count
    step = (2 if config.encoding == "sign_magnitude" else 1) * largest / 2**config.adc_bits
    first = -(2 ** (config.adc_bits - 1)) if config.encoding == "sign_magnitude" else 0
    last = first + 2**config.adc_bits - 1
    if config.zero_code:
        return step * min(max(round(count / step), first), last)
    return step * (min(max(math.floor(count / step), first), last) + 0.5)


def naive_bits(value, bits, encoding):
    """The planes of one integer and what each is worth, in Python."""
    if encoding == "sign_magnitude":
        sign = (value > 0) - (value < 0)
        return [(sign * (abs(value) >> i & 1), 2**i) for i in range(bits - 1)]
    word = value % 2**bits
    return [(word >> i & 1, -(2**i) if i == bits - 1 else 2**i) for i in range(bits)]


def naive_product(q, planes, scale, config, largest):
    """The array, one token, column, row group and pair of planes after the other."""
    result = torch.zeros(len(q), len(scale), dtype=torch.float64)
    for t, token in enumerate(q.int().tolist()):
        for j in range(len(scale)):
            for g in range(scale.shape[1]):
                rows = token[g * config.rows : (g + 1) * config.rows]
                bits = [naive_bits(value, config.input_bits, config.encoding) for value in rows]
                total = 0.0
                for plane in planes:
                    cells = (plane.cells[j, g].double() * plane.unit).tolist()
                    for i in range(len(bits[0])):
                        count = sum(bit[i][0] * cell for bit, cell in zip(bits, cells, strict=False))
                        count *= 1.0 if plane.gain is None else float(plane.gain[g, j])
                        count += 0.0 if plane.offset is None else float(plane.offset[g, j])
                        total += bits[0][i][1] * plane.significance * naive_read(count, config, largest)
                result[t, j] += float(scale[j, g]) * total
    return result


CHIPS = {
    "ideal": {"mismatch": 0.0, "adc_bits": None},
    "lossless": {"mismatch": 0.0},
    "coarse": {"mismatch": 0.0, "adc_bits": 3},
    "mid-rise": {"mismatch": 0.1, "adc_bits": 3, "zero_code": False},
    "mismatch": {"mismatch": 0.2},
    "mismatch, no ADC": {"mismatch": 0.2, "adc_bits": None},
    "many codes": {"mismatch": 0.2, "adc_bits": 14},
    "columns": {"mismatch": 0.1, "column_gain": 0.05, "column_offset": 0.3},
    "stuck": {"mismatch": 0.0, "stuck_at_zero": 0.1, "stuck_at_one": 0.2},
    "wires": {"mismatch": 0.05, "ir_drop": 0.3},
    "drift": {"mismatch": 0.05, "drift_exponent": 0.05, "drift_spread": 0.01, "drift_time": 1e5},
}


@pytest.mark.parametrize("encoding", ["twos_complement", "sign_magnitude"])
@pytest.mark.parametrize("kind", CHIPS)
@pytest.mark.parametrize("rows, bits", [(4, 8), (16, 4)])
def test_the_exact_model_equals_naive_loops(kind, encoding, rows, bits):
    config = CIMConfig(
        encoding=encoding, rows=rows, input_bits=bits, weight_bits=bits, read_noise=0.0,
        **{"adc_bits": round(math.log2(rows)) + 1, **CHIPS[kind]},
    )  # fmt: skip
    largest = 2 ** (bits - 1) - 1
    weight, q = random_integers(5, 22, largest=largest), random_integers(3, 22, largest=largest, seed=1).float()
    planes, scale = array_of(weight, config)
    largest = float(rows) if kind != "mismatch" else 0.7 * rows  # steps that are no powers of two
    result = exact_product(q, planes, scale, config, Converter.of(config, largest))
    reference = naive_product(q, planes, scale, config, largest)
    # offsets and gains of columns are no dyadic numbers: a count is rounded once more in float32
    close = 1e-6 if kind == "columns" else 1e-9
    assert torch.allclose(result, reference, rtol=close, atol=close * float(reference.abs().max()))


@pytest.mark.parametrize("encoding", ["twos_complement", "sign_magnitude"])
@pytest.mark.parametrize("rows", [1, 7, 64, 500])
@pytest.mark.parametrize("adc", [True, False])
def test_without_defects_it_is_the_integer_product(encoding, rows, adc):
    """An ADC that tells all counts apart changes nothing; the largest count alone needs one code more."""
    bits = math.ceil(math.log2((2 if encoding == "sign_magnitude" else 1) * (rows + 1))) if adc else None
    config = IDEAL.replace(encoding=encoding, rows=rows, adc_bits=bits)
    weight, q = random_integers(33, 130), random_integers(17, 130, seed=1)
    planes, scale = array_of(weight, config)
    largest = 2 ** (bits - 1 if config.signed else bits) if adc else 0.0  # a step of one count
    result = exact_product(q.float(), planes, scale, config, Converter.of(config, float(largest)))
    assert torch.equal(result, (q @ weight.T).double())


@settings(deadline=None, max_examples=40)
@example(encoding="twos_complement", rows=1, input_bits=2, weight_bits=2, shape=(1, 2, 1), seed=1)
@given(
    encoding=st.sampled_from(["twos_complement", "sign_magnitude"]),
    rows=st.integers(1, 300),
    input_bits=st.integers(2, 8),
    weight_bits=st.integers(2, 8),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 320)),
    seed=st.integers(0, 100),
)
def test_any_chip_without_defects_is_the_integer_product(encoding, rows, input_bits, weight_bits, shape, seed):
    tokens, out_features, in_features = shape
    config = IDEAL.replace(encoding=encoding, rows=rows, input_bits=input_bits, weight_bits=weight_bits)
    weight = random_integers(out_features, in_features, largest=2 ** (weight_bits - 1) - 1, seed=seed)
    q = random_integers(tokens, in_features, largest=2 ** (input_bits - 1) - 1, seed=seed + 1)
    planes, scale = array_of(weight, config)
    assert torch.equal(exact_product(q.float(), planes, scale.round(), config, None), (q @ weight.T).double())


@pytest.mark.parametrize("encoding", ["twos_complement", "sign_magnitude"])
@pytest.mark.parametrize("rows", [1, 32, 300, 2047, 2048])
@pytest.mark.parametrize("defects", [{}, {"mismatch": 0.1}, {"stuck_at_zero": 0.1, "stuck_at_one": 0.2}])
def test_all_ways_to_read_are_one(encoding, rows, defects, monkeypatch):
    """What runs on a CPU in integers or in float32 and what runs on other devices give the same bits."""
    from hf_polarize.cim import array

    config = CIMConfig(
        encoding=encoding, rows=rows, column_gain=0.02, column_offset=0.2, adc_bits=4, zero_code=False,
        **{"mismatch": 0.0, **defects},
    )  # fmt: skip
    weight, q = random_integers(48, 2100), random_integers(20, 2100, seed=1).float()
    weight[0], q[0] = 127, 127  # the largest counts that can be
    weight[1], q[1] = -127, -127
    planes, scale = array_of(weight, config)
    converter = Converter.of(config, float(rows))

    def run():
        return exact_product(q, planes, scale, config, converter, torch.Generator().manual_seed(3))

    monkeypatch.setattr(array, "INTEGERS_ARE_FAST", True)
    first = run()
    monkeypatch.setattr(array, "INTEGERS_ARE_FAST", False)
    assert torch.equal(first, run())
    monkeypatch.setattr(array, "_read_on_cpu", array._read)
    assert torch.equal(first, run())


def test_tokens_do_not_depend_on_each_other():
    """A chip is bitwise the same however its inputs are batched."""
    config = CIMConfig(mismatch=0.1, read_noise=0.0, column_gain=0.01)
    weight, q = random_integers(100, 192), random_integers(300, 192, seed=1).float()
    planes, scale = array_of(weight, config)
    converter = Converter.of(config, 64.0)
    whole = exact_product(q, planes, scale, config, converter)
    parts = [exact_product(part, planes, scale, config, converter) for part in q.split([1, 99, 200])]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("encoding", ["twos_complement", "sign_magnitude"])
def test_planes_add_up_to_the_integers(bits, encoding):
    largest = 2 ** (bits - 1) - 1
    values = torch.arange(-largest, largest + 1)
    planes, coefficients = integer_planes(values, bits, encoding)
    assert torch.equal((planes.double() * coefficients[:, None]).sum(0), values.double())
    assert set(planes.unique().tolist()) <= ({-1, 0, 1} if encoding == "sign_magnitude" else {0, 1})


def test_inputs_are_rounded_token_by_token():
    x = (
        torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-6, 1.0, 0.0, 7.0, 1e4])[:, None]
    )
    q, scale = quantized_inputs(x, 8)
    assert q.abs().amax(1).tolist() == [127, 127, 0, 127, 127]
    assert ((q * scale - x).abs() <= 0.5001 * scale).all()


# error added to normal weights by each mapping, in per cent of their RMS; NF4's own is 9.2
@pytest.mark.parametrize(
    "mapping, bits, expected",
    [("grid", 8, 0.59), ("grid", 7, 1.04), ("grid", 6, 2.5), ("grid", 5, 4.7), ("learned", 4, 4.1)],
)
def test_the_error_of_each_mapping(mapping, bits, expected):
    assert mapping_error(mapping, bits) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("bits, at_most", [(5, 1.85), (6, 1.09), (7, 0.40)])
def test_learned_planes_are_no_worse_than_those_known(bits, at_most):
    assert mapping_error("learned", bits) < at_most


def mapping_error(mapping, bits):
    weight = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)).double()
    scale = weight.abs().amax(1, keepdim=True)
    codes = torch.bucketize(weight / scale, ((NF4[1:] + NF4[:-1]) / 2).double())
    config = IDEAL.replace(mapping=mapping, weight_bits=bits)
    indices, group = grouped_weights(NF4[codes], scale.flatten(), 64, config, NF4)
    code = weight_code(config, NF4)
    executed = (code.executed * code.unit)[indices.long()].squeeze(1) * group
    return 100 * float((executed - NF4.double()[codes] * scale).square().mean().sqrt())


@pytest.mark.parametrize("rows", [16, 64])
def test_one_hot_nf4_is_exact(rows):
    config = IDEAL.replace(mapping="one_hot", rows=rows)
    codes = torch.randint(0, 16, (20, 192), generator=torch.Generator().manual_seed(0))
    scales = torch.rand(60, generator=torch.Generator().manual_seed(1)) + 0.1
    scales[::3] *= -1  # as requantization may leave them
    indices, scale = grouped_weights(NF4[codes], scales, 64, config, NF4)
    planes = list(fabricate(indices, weight_code(config, NF4), config, "layer"))
    q = random_integers(9, 192).float()
    result = exact_product(q, planes, scale, config, None)
    weight = NF4[codes].double() * scales.double().repeat_interleave(64).view(20, 192)
    assert torch.allclose(result, q.double() @ weight.T, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("rows, features", [(128, 192), (48, 100)])
def test_groups_that_blocks_do_not_line_up_with_share_a_scale(rows, features):
    """The grid of the largest scale of a group: no weight is off by more than half a step of it."""
    config = IDEAL.replace(rows=rows)
    codes = torch.randint(0, 16, (7, features), generator=torch.Generator().manual_seed(0))
    scales = torch.rand(-(-7 * features // 64), generator=torch.Generator().manual_seed(1)) + 0.1
    indices, scale = grouped_weights(NF4[codes], scales, 64, config, NF4)
    code = weight_code(config, NF4)
    executed = (code.executed * code.unit)[indices.long()] * scale[..., None]
    weight = NF4[codes] * scales.repeat_interleave(64)[: codes.numel()].view(codes.shape)
    error = (executed.flatten(1)[:, :features] - weight).abs()
    assert (error <= 0.5001 * scale.abs().repeat_interleave(rows, 1)[:, :features]).all()
    with pytest.raises(ValueError, match='use the mapping "grid"'):
        grouped_weights(NF4[codes[:, :100]], scales, 64, IDEAL.replace(mapping="one_hot"), NF4)


def test_the_range_of_an_adc_is_the_one_asked_for():
    histogram = torch.tensor([100.0, 500.0, 300.0, 90.0, 9.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert best_range(histogram, CIMConfig(rows=8, adc_range="max")) == 5
    assert best_range(histogram, CIMConfig(rows=8, adc_range="percentile", percentile=99.0)) == 3
    assert best_range(histogram, CIMConfig(rows=8, adc_range="percentile", percentile=100.0)) == 5
    config = CIMConfig(rows=8, adc_bits=2, adc_range="mse")
    counts = torch.arange(9).double()

    def error(largest):
        return float((histogram * (Converter.of(config, largest)(counts) - counts).square()).sum())

    best = best_range(histogram, config)
    assert error(best) <= min(error(5.0), error(4.0), error(3.0), error(2.5))


def lightning(weight, inp_res=2**8 - 2, **forward):
    """Return a layer of aihwkit-lightning, an independent simulator, with inputs rounded per token as ours are."""
    from aihwkit_lightning.nn import AnalogLinear
    from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig, WeightNoiseInjectionType

    config = TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = config.pre_post.input_range.dynamic = True
    config.pre_post.input_range.learn_input_range = False
    config.forward.inp_res = inp_res
    config.mapping.max_input_size = -1
    config.forward.out_noise = forward.get("out_noise", 0.0)
    config.forward.out_noise_per_channel = True
    if "weight_noise" in forward:
        config.modifier.noise_type = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL
        config.modifier.std_dev = forward["weight_noise"]
    layer = AnalogLinear(weight.shape[1], weight.shape[0], bias=False, rpu_config=config)
    layer.set_weights(weight)
    return layer.train()  # noise is on


def test_read_noise_is_that_of_aihwkit_lightning():
    """Without ADC, noise of readings is output noise in proportion to the largest weight and the largest input."""
    config = IDEAL.replace(read_noise=0.5)
    weight = random_integers(48, 256)
    weight[:, 0] = 127
    x = torch.randn(400, 256, generator=torch.Generator().manual_seed(1))
    planes, scale = array_of(weight, config)
    q, token_scale = quantized_inputs(x, 8)
    ours = exact_product(q, planes, scale / 127, config, None, torch.Generator().manual_seed(0)) * token_scale
    amplified = 0.5 * math.sqrt(4) * (4**8 - 1) / 3  # sqrt(groups S_w S_x)
    layer = lightning(weight / 127.0, out_noise=amplified / 127**2)
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = layer(x)
    ideal = (q * token_scale).double() @ (weight.double() / 127).T
    errors = [(result.double() - ideal).flatten() for result in (ours, theirs)]
    assert float(errors[0].std() / errors[1].std()) == pytest.approx(1, abs=0.02)
    assert ks_2samp(*errors).statistic < 0.02


def test_mismatch_is_the_weight_noise_of_aihwkit_lightning():
    """Weights of one ternary plane and no zero: a mismatch of 10 % is additive noise of 10 % of the largest weight."""
    config = IDEAL.replace(encoding="sign_magnitude", weight_bits=2, mismatch=0.1)
    weight = random_integers(48, 256, largest=1)
    weight[weight == 0] = 1
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    q, token_scale = quantized_inputs(x, 8)
    ideal = (q * token_scale).double() @ weight.double().T
    layer, errors = lightning(weight.float(), weight_noise=0.1), ([], [])
    torch.manual_seed(0)
    for seed in range(30):
        planes, scale = array_of(weight, config.replace(chip_seed=seed))
        errors[0].append(exact_product(q, planes, scale, config, None) * token_scale - ideal)
        with torch.no_grad():
            errors[1].append(layer(x).double() - ideal)
    ours, theirs = (torch.stack(found).flatten() for found in errors)
    assert float(ours.std() / theirs.std()) == pytest.approx(1, abs=0.02)
    assert ks_2samp(ours, theirs).statistic < 0.02

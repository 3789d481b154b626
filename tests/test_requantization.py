"""Other codes and scales inside the formats: exact storage, never worse, and better than rounding alone."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from hf_polarize import PolarizeConfig
from hf_polarize.backbone import quantize_linear
from hf_polarize.compensation import compensate, damped
from hf_polarize.requantization import FREED, refit_scales, requantize, search_scales
from hf_polarize.rounding import Covariance, descend, nearest, round_with_feedback, spread

CONFIGS = {
    "nf4": PolarizeConfig("nf4"),
    "nf4-double": PolarizeConfig("nf4", double_quant=True),
    "int8": PolarizeConfig("int8"),
}


def problem(config, out_features=96, in_features=128, seed=0, bias=True):
    torch.manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias=bias)
    linear.weight.data.mul_(1 + linear.weight.data.abs() / linear.weight.data.std())
    x = torch.randn(2000, in_features) @ torch.randn(in_features, in_features)
    config = CONFIGS[config]
    config.resolve(torch.float32)
    return linear, quantize_linear(linear, config), damped(x.T @ x / len(x)), x


def left(linear, layer, h, rank):
    error = linear.weight.detach().double() - layer.dequantized().double()
    return compensate(linear.weight.detach(), error, h, rank).errors[-1]


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_stored_is_what_comes_back(config):
    linear, layer, _, _ = problem(config)
    torch.manual_seed(1)
    levels = layer.levels()
    codes = torch.randint(len(levels), linear.weight.shape)
    scales = layer.storable(layer.block_scales() * (0.8 + 0.2 * torch.rand(len(layer.block_scales()))))
    layer.store(codes, scales)
    expected = levels[codes] * spread(scales, linear.weight.shape, layer.block_size)
    torch.testing.assert_close(layer.dequantized(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer.block_scales(), scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_its_own_values_stored_again_change_nothing(config):
    linear, layer, _, _ = problem(config)
    before = layer.dequantized()
    scales = layer.block_scales()
    codes = nearest(before / spread(scales, linear.weight.shape, layer.block_size), layer.levels())
    layer.store(codes, scales)
    torch.testing.assert_close(layer.dequantized(), before, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shape", [(96, 128), (128, 192), (32, 64)])
def test_requantizing_leaves_less_of_the_error(config, shape):
    linear, layer, h, _ = problem(config, *shape)
    before = left(linear, layer, h, rank=4)
    requantize(layer, linear.weight.detach(), Covariance(h), rank=4)
    after = left(linear, layer, h, rank=4)
    assert after < (0.9 if config != "int8" else 0.999) * before


def test_with_gradients_it_leaves_less_predicted_loss():
    linear, one, h, _ = problem("nf4")
    two = quantize_linear(linear, CONFIGS["nf4"])
    weight = linear.weight.detach()
    g = torch.randn(400, 96) @ torch.randn(96, 96)
    g = damped(g.T @ g / len(g), 0.1)
    requantize(one, weight, Covariance(h), rank=4)
    requantize(two, weight, Covariance(h), rank=4, outputs=Covariance(g))
    assert predicted(two, weight, h, g) < predicted(one, weight, h, g)


def predicted(layer, weight, h, g):
    solution = compensate(weight, weight.double() - layer.dequantized().double(), h, 4, g, two_sided=True)
    return solution.loss_before - sum(solution.gains)


@pytest.mark.parametrize("with_outputs", [False, True])
def test_errors_gather_where_the_path_is(with_outputs, monkeypatch):
    linear, _, h, _ = problem("nf4", 160, 192)
    weight = linear.weight.detach()
    g = torch.randn(400, 160) @ torch.randn(160, 160)
    g = damped(g.T @ g / len(g), 0.1) if with_outputs else torch.eye(160, dtype=torch.float64)
    shares, losses, alone = (1.0, FREED), [], []
    for share in shares:
        monkeypatch.setattr("hf_polarize.requantization.FREED", share)
        layer = quantize_linear(linear, CONFIGS["nf4"])
        requantize(layer, weight, Covariance(h), 4, outputs=Covariance(g) if with_outputs else None)
        losses.append(predicted(layer, weight, h, g))
        error = weight.double() - layer.dequantized().double()
        alone.append(0.5 * float((g @ error @ h * error).sum()))
    assert losses[1] < losses[0]
    assert losses[1] / alone[1] < losses[0] / alone[0]  # the path takes a greater share of what there is


def test_a_freed_covariance_counts_a_share_of_some_directions():
    _, _, h, _ = problem("nf4")
    inputs = Covariance(h)
    v = torch.linalg.qr(torch.randn(128, 3, dtype=torch.float64)).Q
    freed = inputs.freed(v, 0.2)
    torch.testing.assert_close(freed.inverse, torch.linalg.inv(freed.matrix))
    errors = torch.randn(5, 128, dtype=torch.float64)
    seen = errors @ torch.linalg.cholesky(h)  # what they do to the output
    along = seen @ v @ v.T
    expected = (seen - along).square().sum() + 0.2 * along.square().sum()
    torch.testing.assert_close((errors @ freed.matrix * errors).sum(), expected)


def test_rows_that_are_no_whole_blocks_stay_as_bitsandbytes_makes_them():
    linear, layer, h, _ = problem("nf4", 128, 96)
    before = layer.dequantized()
    requantize(layer, linear.weight.detach(), Covariance(h), rank=4)
    assert torch.equal(layer.dequantized(), before)


@pytest.mark.parametrize("config", ["nf4", "int8"])
def test_the_layer_multiplies_with_the_new_values(config):
    linear, layer, h, x = problem(config)
    requantize(layer, linear.weight.detach(), Covariance(h), rank=4)
    for training, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.bfloat16)):
        layer.train(training)
        with torch.no_grad():
            y = layer(x[:50].to(dtype)).float()
            expected = x[:50] @ layer.dequantized().T + linear.bias
        # INT8 rounds its inputs to 8 bits per token, NF4 at inference on CPUs to bfloat16
        tolerance = 2e-2 if config == "int8" else 1e-4 if training else 5e-3
        assert float((y - expected).norm() / expected.norm()) < tolerance


def test_a_search_that_finds_nothing_better_keeps_the_scales():
    linear, layer, h, _ = problem("nf4")
    scales = layer.block_scales()
    far = torch.stack([scales * 5, scales * 0.1])
    assert torch.equal(search_scales(linear.weight.data, scales, far, layer.levels(), 64, h.diagonal()), scales)


def test_searched_scales_are_the_best_of_the_candidates():
    linear, layer, h, _ = problem("nf4", 8, 128)
    w, scales, levels = linear.weight.data, layer.block_scales(), layer.levels()
    candidates = torch.stack([scales * factor for factor in (0.7, 0.8, 0.9, 1.1)])
    found = search_scales(w, scales, candidates, levels, 64, h.diagonal())

    def costs(s):
        q = levels[nearest(w / spread(s, w.shape, 64), levels)] * spread(s, w.shape, 64)
        return ((q - w).double().square() * h.diagonal()).view(-1, 64).sum(1)

    every = torch.stack([costs(scales), *(costs(s) for s in candidates)])
    torch.testing.assert_close(costs(found), every.min(0).values, rtol=1e-5, atol=0)


def test_feedback_beats_rounding_to_nearest():
    linear, layer, h, x = problem("nf4")
    w, levels = linear.weight.data, layer.levels()
    s = spread(layer.block_scales(), w.shape, 64)
    codes = round_with_feedback(w, s, levels, Covariance(h))
    plain = levels[nearest(w / s, levels)] * s
    assert (x @ (w - levels[codes] * s).T).norm() < 0.8 * (x @ (w - plain).T).norm()


def test_feedback_with_independent_inputs_is_rounding_to_nearest():
    linear, layer, _, _ = problem("nf4")
    w, levels = linear.weight.data, layer.levels()
    s = spread(layer.block_scales(), w.shape, 64)
    apart = Covariance(torch.diag(torch.rand(w.shape[1], dtype=torch.float64) + 0.5))
    assert torch.equal(round_with_feedback(w, s, levels, apart), nearest(w / s, levels))


def textbook_feedback(w, s, levels, hessian, order):
    """GPTQ in float64 on one long vector, with any Hessian (arXiv 2210.17323, algorithm 1 without its blocks)."""
    inverse = torch.linalg.inv(hessian[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    w, s = w.reshape(-1)[order].double().clone(), s.reshape(-1)[order].double()
    codes = torch.empty(len(w), dtype=torch.int64)
    for j in range(len(w)):
        codes[j] = (levels.double() * s[j] - w[j]).abs().argmin()
        w[j:] -= (w[j] - levels[codes[j]].double() * s[j]) / upper[j, j] * upper[j, j:]
    result = torch.empty_like(codes)
    result[order] = codes
    return result


@pytest.mark.parametrize("with_outputs", [False, True])
def test_feedback_is_the_textbook_on_the_kronecker_product(with_outputs):
    _, layer, _, _ = problem("nf4", 8, 64)
    torch.manual_seed(3)
    w, s, levels = torch.randn(20, 70), 2 + torch.rand(20, 70), layer.levels()
    x, y = torch.randn(200, 70) @ torch.randn(70, 70), torch.randn(90, 20) @ torch.randn(20, 20)
    inputs, outputs = Covariance(damped(x.T @ x)), Covariance(damped(y.T @ y)) if with_outputs else None
    g = outputs.matrix if outputs else torch.eye(20, dtype=torch.float64)
    rows = outputs.feedback()[0] if outputs else torch.arange(20)
    order = (rows[:, None] * 70 + inputs.feedback()[0]).reshape(-1)
    expected = textbook_feedback(w, s, levels, torch.kron(g, inputs.matrix), order).view(20, 70)
    codes = round_with_feedback(w, s, levels, inputs, outputs)
    assert float((codes == expected).double().mean()) > 0.99  # float32 may tip a value between two levels


def test_feedback_between_rows_leaves_less_predicted_loss():
    linear, layer, h, _ = problem("nf4", 160, 192)
    g = torch.randn(400, 160) @ torch.randn(160, 160)
    g = damped(g.T @ g / len(g), 0.1)
    w, levels = linear.weight.data, layer.levels()
    s = spread(layer.block_scales(), w.shape, 64)

    def loss(codes):
        error = (w - levels[codes] * s).double()
        return float((g @ error @ h * error).sum())

    one = loss(round_with_feedback(w, s, levels, Covariance(h)))
    assert loss(round_with_feedback(w, s, levels, Covariance(h), Covariance(g))) < 0.8 * one


@pytest.mark.parametrize("with_outputs", [False, True])
@pytest.mark.parametrize("config", ["nf4", "int8"])
def test_where_descent_ends_no_other_code_is_better(config, with_outputs):
    linear, layer, h, _ = problem(config, 80, 128)
    g = torch.randn(400, 80) @ torch.randn(80, 80)
    g = damped(g.T @ g / len(g), 0.1) if with_outputs else torch.eye(80, dtype=torch.float64)
    w, levels = linear.weight.data, layer.levels()
    s = spread(layer.block_scales(), w.shape, layer.block_size) * torch.where(torch.rand(80, 1) < 0.5, -0.9, 0.9)
    outputs = Covariance(g) if with_outputs else None
    start = round_with_feedback(w, s, levels, Covariance(h), outputs)

    def loss(codes):
        error = (w - levels[codes] * s).double()
        return float((g @ error @ h * error).sum())

    def could_improve(codes):
        """The share of codes for which another level, all others as they are, is better: float64, every level."""
        error = (w - levels[codes] * s).double()
        steps = (levels.double() - levels[codes].double()[..., None]) * s.double()[..., None]
        curvature = (g.diagonal()[:, None] * h.diagonal())[..., None]
        changes = -2 * steps * (g @ error @ h)[..., None] + steps.square() * curvature
        return float((changes.amin(-1) < -1e-6 * changes.abs().mean()).double().mean())

    codes, before = descend(w, start, s, levels, Covariance(h), outputs), start
    assert loss(codes) < loss(start) and could_improve(start) > 0
    for _ in range(500):
        if torch.equal(codes, before):
            break
        assert loss(codes) <= loss(before) * (1 + 1e-6)
        before, codes = codes, descend(w, codes, s, levels, Covariance(h), outputs)
    assert torch.equal(codes, before)
    assert could_improve(codes) < 1e-3  # float32 may take two levels for equally good


def test_nf4_scales_may_turn_the_codebook_over():
    linear, layer, h, _ = problem("nf4")
    requantize(layer, linear.weight.detach(), Covariance(h), rank=4)
    assert (layer.block_scales() < 0).any()
    assert (layer.block_scales() > 0).any()
    linear, layer, h, _ = problem("int8")
    requantize(layer, linear.weight.detach(), Covariance(h), rank=4)
    assert (layer.block_scales() > 0).all()


def test_refitted_scales_are_the_least_squares_solution():
    linear, layer, h, _ = problem("nf4", 8, 128)
    w, levels = linear.weight.data, layer.levels()
    units = levels[nearest(w / spread(layer.block_scales(), w.shape, 64), levels)]
    found = refit_scales(w, units, layer.block_scales(), h, 64)
    root = torch.linalg.cholesky(h)
    for row in range(8):
        columns = torch.stack([(units[row] * (torch.arange(128) // 64 == b)).double() @ root for b in range(2)], 1)
        # the pull towards the old scales as two more equations
        pull = (0.01 * columns.square().sum(0)).sqrt().diag()
        old = layer.block_scales()[2 * row : 2 * row + 2].double()
        a = torch.cat([columns, pull])
        b = torch.cat([w[row].double() @ root, pull @ old])
        expected = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
        torch.testing.assert_close(found[2 * row : 2 * row + 2].double(), expected, rtol=1e-5, atol=1e-8)


def test_the_same_input_gives_the_same_bytes():
    layers = []
    for _ in range(2):
        linear, layer, h, _ = problem("nf4-double")
        requantize(layer, linear.weight.detach(), Covariance(h), rank=4)
        layers.append(layer.state_dict())
    assert all(torch.equal(value, layers[1][key]) for key, value in layers[0].items())


def test_codes_are_packed_as_bitsandbytes_packs_them():
    torch.manual_seed(0)
    w = torch.randn(4, 128)
    packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    _, layer, _, _ = problem("nf4", 4, 128)
    layer.store(nearest(w / spread(state.absmax, w.shape, 64), layer.levels()), state.absmax)
    assert torch.equal(layer.weight.data.view(-1), packed.view(-1))

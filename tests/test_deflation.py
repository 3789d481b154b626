"""Deflated execution: exact where the backbone is, and better than any other path of its rank where it is not."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from bitsandbytes.functional import get_4bit_type
from conftest import FAMILIES, output, tiny_inputs, tiny_model
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from hf_polarize import (
    CIMConfig,
    ClosedForm,
    PolarizeConfig,
    SurrogateConfig,
    attach_cim,
    backbone_only,
    calibrate_to_chip,
    detach_cim,
    polarize,
    save_polarized,
)
from hf_polarize import deflation as deflation_module
from hf_polarize.backbone import quantize_linear
from hf_polarize.calibration import layer_statistics
from hf_polarize.card import model_card
from hf_polarize.cim.hook import OnChip, reset_reads
from hf_polarize.cim.planes import weight_code
from hf_polarize.cim.programming import codes_for_cells
from hf_polarize.cim.variation import chip_moments
from hf_polarize.compensation import compensate, damped
from hf_polarize.deflation import Deflation, deflate, deflating_path, fit_to_chip, removed_directions
from hf_polarize.inspection import inspect_checkpoint
from hf_polarize.rounding import Covariance, round_with_feedback, spread
from hf_polarize.surrogate import factors

NOISY = CIMConfig.preset("noisy")
DEFLATED = ClosedForm(deflated=True)
IDEAL_SIGNED = CIMConfig.preset("ideal", encoding="sign_magnitude")


def covariance(size, seed=0):
    """Return a covariance with few strong directions, as inputs of transformers have."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=generator, dtype=torch.float64) * torch.arange(1, size + 1) ** -1.5
    return damped(factor @ factor.T * size)


def batches():
    return [tiny_inputs(tiny_model("llama-tied"), n=8)]


def polarized(**arguments):
    return polarize(
        tiny_model("llama-tied"), batches(), PolarizeConfig(**arguments), SurrogateConfig(r=4), DEFLATED,
        max_tokens=256, window=32,
    )  # fmt: skip


def test_the_path_is_the_truncated_decomposition():
    """Against numpy-like float64: no other pair of factors leaves less of tr(M (I - R A) H (I - R A)^T)."""
    m, h = covariance(24, 1), covariance(24, 2)
    a, r, s = deflating_path(m, h, 5)

    def left(removed):
        rest = torch.eye(24, dtype=torch.float64) - removed
        return float(torch.trace(m @ rest @ h @ rest.T))

    values = torch.linalg.svdvals(torch.linalg.cholesky(m).T @ torch.linalg.cholesky(h))
    assert left(r @ a) == pytest.approx(float(values[5:].square().sum()), rel=1e-9)
    assert torch.allclose(s, values[:5])
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        step = [1e-3 * torch.randn(t.shape, generator=generator, dtype=torch.float64) * t.abs().mean() for t in (r, a)]
        assert left((r + step[0]) @ (a + step[1])) > left(r @ a)


def test_without_noise_it_is_the_plain_closed_form():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 24, generator=generator)
    error = 0.1 * torch.randn(40, 24, generator=generator).double()
    h = covariance(24)
    plain = compensate(weight, error, h, 4)
    a, r, _ = deflating_path(error.T @ error, h, 4)
    assert torch.allclose((error @ r @ a).float(), plain.b @ plain.a, atol=1e-5)


def test_off_the_chip_nothing_is_removed():
    """Every reader computes the same: Q x + B A x."""
    model = polarized(cim=NOISY)
    inputs = tiny_inputs(model)
    detach_cim(model)
    before = output(model, inputs)
    for name in factors(model):
        model.get_submodule(name).get_base_layer().deflation = None
    assert torch.equal(output(model, inputs), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backbone", ["nf4", "int8"])
def test_every_family_is_deflated_and_reloads(family, backbone, tmp_path):
    model = tiny_model(family)
    inputs = tiny_inputs(model)
    chip = NOISY.replace(mismatch=0.3, read_noise=0.0)
    original = output(model, inputs)

    def error(closed_form):
        one = polarize(
            tiny_model(family), [inputs], PolarizeConfig(backbone, cim=chip), SurrogateConfig(r=8), closed_form
        )
        return one, float((output(one, inputs) - original).norm())

    (model, deflated), (_, plain) = error(DEFLATED), error(ClosedForm())
    assert deflated < plain
    reset_reads(model)
    here = output(model, inputs)
    again = getattr(transformers, FAMILIES[family][0]).from_pretrained(save_polarized(model, tmp_path / "saved"))
    assert torch.equal(output(again, inputs), here)
    assert len(removed_directions(again)) == len(removed_directions(model)) > 0


def test_on_an_ideal_chip_it_is_what_is_computed_off_it():
    model = polarized(cim=CIMConfig.preset("ideal", mapping="one_hot"))
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(50, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        chip = layer(x)
        detach_cim(model)
        digital = layer(x)
    assert float((chip - digital).norm() / digital.norm()) < 0.02  # inputs of 8 bits


@pytest.mark.parametrize(
    "chip",
    [
        NOISY,
        NOISY.replace(read_noise=0.3),
        NOISY.replace(read_noise=0.0, adc_bits=None),
        CIMConfig(mismatch=0.02, read_noise=0.0, adc_bits=None),
        CIMConfig(mismatch=0.02, read_noise=0.0, adc_bits=None, ir_drop=0.3),
        CIMConfig(mismatch=0.02, read_noise=0.0, adc_bits=None, weight_bits=5),
        NOISY.replace(read_noise=0.0, adc_bits=None, mismatch=0.02, stuck_at_zero=0.02, stuck_at_one=0.01),
    ],
)
def test_the_expected_error_is_that_of_many_chips(chip):
    """The closed form's own figure against chips that are made and run, and against the plain path of its rank."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(128, 96, bias=False)
    linear.weight = torch.nn.Parameter(torch.randn(96, 128, generator=generator) * 0.1)
    h = covariance(128)
    x = torch.randn(400, 128, generator=generator) @ torch.linalg.cholesky(h).float().T
    config = PolarizeConfig(cim=chip)
    weight = linear.weight.detach()
    layer = quantize_linear(linear, config)
    solution = deflate(layer, weight, Covariance(h), 8, 8, config, ClosedForm(deflated=True))
    plain = compensate(weight, weight.double() - layer.dequantized().double(), h, 8)
    exact = x @ weight.T

    def error(a, b, r):
        found: list[float] = []
        first = torch.nn.Linear(128, 8, bias=False)
        first.weight = torch.nn.Parameter(a, requires_grad=False)
        surrogate = SimpleNamespace(lora_A={"default": first}, disable_adapters=False)
        for seed in range(12):
            layer.chip = OnChip(layer, "layer", chip.replace(chip_seed=seed))
            layer.deflation = None if r is None else Deflation(layer, surrogate, "default", r)
            with torch.no_grad():
                y = layer(x) + (x @ a.T) @ b.T
            found.append(float((y - exact).square().mean() / exact.square().mean()))
        return (sum(found) / len(found)) ** 0.5

    deflated = error(solution.a, solution.b, solution.r)
    if chip.read_noise == 0:  # how large readings are beside it depends on the largest input of each token
        assert deflated == pytest.approx(solution.errors[-1], rel=0.1)
    assert deflated < 0.8 * error(plain.a, plain.b, None)


@pytest.mark.parametrize("activations", ["int8", "nf4"])
def test_rounded_activations_lose_less(activations):
    model = polarized(activations=activations)
    inputs = tiny_inputs(model)
    layers = [model.get_submodule(name).get_base_layer() for name in factors(model)]
    deflated = output(model, inputs)
    for layer in layers:
        layer.deflation = None
    rounded = output(model, inputs)
    for layer in layers:
        layer.activations = None
    exact = output(model, inputs)
    assert float((deflated - exact).norm()) < 0.9 * float((rounded - exact).norm())


def test_a_checkpoint_keeps_what_is_removed(tmp_path):
    model = polarized(cim=NOISY)
    inputs = tiny_inputs(model)
    here = output(model, inputs)
    save_polarized(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(output(again, inputs), here)
    attach_cim(again, NOISY.replace(chip_seed=9))
    assert not torch.equal(output(again, inputs), here)
    plain = polarize(tiny_model("llama-tied"), batches(), max_tokens=256, window=32)
    save_polarized(plain, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "deflation.safetensors").exists()


def test_layers_off_the_chip_are_solved_as_such():
    """They keep what an exact backbone gets, and a calibration to the chip leaves them alone."""
    original = tiny_model("llama-tied")
    chip = NOISY.replace(layers=["mlp"])
    model = polarized(cim=chip)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in removed_directions(model)} == {"mlp"}
    exact = factors(polarize(
        tiny_model("llama-tied"), batches(), PolarizeConfig(), SurrogateConfig(r=4), ClosedForm(),
        max_tokens=256, window=32,
    ))  # fmt: skip
    before = {name: b.detach().clone() for name, (_, b) in factors(model).items()}
    for name, (a, b) in factors(model).items():
        same = torch.allclose(b @ a, exact[name][1] @ exact[name][0], rtol=1e-3, atol=1e-5)
        assert same == ("self_attn" in name), name
    calibrate_to_chip(model, original, batches())
    for name, (_, b) in factors(model).items():
        assert torch.equal(b, before[name]) == ("self_attn" in name), name
    with pytest.raises(ValueError, match="no surrogate stands beside a layer on a chip"):
        calibrate_to_chip(detach_cim(model), original, batches())


def test_there_must_be_something_to_deflate_against():
    with pytest.raises(ValueError, match="takes what a surrogate sees out of the input of a noisy backbone"):
        polarized()


@pytest.mark.parametrize("encoding", ["sign_magnitude", "twos_complement"])
@pytest.mark.parametrize("mismatch", [0.0, 0.0066, 0.15, 0.4])
def test_quiet_integers_are_those_of_least_expected_error(encoding, mismatch):
    """Against integers in Python, one by one: the distance squared, and the variance of the cells that are active."""
    config = CIMConfig.preset("noisy", encoding=encoding, mismatch=mismatch, mapping="quiet")
    found = weight_code(config, get_4bit_type("nf4", device="cpu"))

    def error(n, k):
        bits = abs(k) if encoding == "sign_magnitude" else k % 256
        return (n - k) ** 2 + mismatch**2 * sum(4**i for i in range(8) if bits >> i & 1)

    written = (found.executed * 127).round().int().tolist()
    for n, k in zip(range(-127, 128), written, strict=True):
        assert error(n, k) == pytest.approx(min(error(n, other) for other in range(-127, 128)))
    if mismatch < 0.01:
        assert written == list(range(-127, 128))
    elif encoding == "sign_magnitude":
        assert written[127 + 67] == 63 and written[127 - 67] == -63


def test_a_deflated_model_is_written_quietly_unless_the_chip_says_otherwise():
    model = polarized(cim=NOISY)
    assert model.config.quantization_config.cim == NOISY.replace(mapping="quiet")
    detach_cim(model)
    assert attach_cim(model, NOISY).config.quantization_config.cim.mapping == "quiet"
    assert attach_cim(model, NOISY.replace(mapping="grid")).config.quantization_config.cim.mapping == "grid"
    error = []
    layer = model.model.layers[0].mlp.down_proj.get_base_layer()
    for mapping in ("grid", "quiet"):
        moments = chip_moments(layer, NOISY.replace(mapping=mapping))
        error.append(float(((moments.mean - layer.dequantized()).square() + moments.variance).sum()))
    assert error[1] < 0.95 * error[0]
    x = torch.randn(3, layer.in_features)
    reset_reads(model)
    bare = layer.executed(x)
    with backbone_only(model):  # deflates nothing
        reset_reads(model)
        assert torch.equal(layer(x), bare)
    reset_reads(model)
    assert not torch.equal(layer(x), bare)
    plain = polarize(
        tiny_model("llama-tied"), batches(), PolarizeConfig(cim=NOISY), SurrogateConfig(r=4), max_tokens=256, window=32
    )
    assert plain.config.quantization_config.cim == NOISY


def test_a_chip_that_is_given_at_loading_is_written_as_one_that_is_attached(tmp_path):
    model = polarized(cim=NOISY)
    folder = save_polarized(detach_cim(model), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=PolarizeConfig(cim=NOISY))
    assert loaded.config.quantization_config.cim.mapping == "quiet"
    inputs = tiny_inputs(model)
    assert torch.equal(output(loaded, inputs), output(attach_cim(model, NOISY), inputs))


def test_ranks_go_where_the_array_hurts(tmp_path):
    """By predicted loss on the chip, and judged by held-out data that runs on it."""
    model = polarize(
        tiny_model("llama-tied"), [tiny_inputs(tiny_model("llama-tied"), n=24)], PolarizeConfig(cim=NOISY),
        SurrogateConfig(r=4), ClosedForm(deflated=True, two_sided=True, allocation="sensitivity", held_out=4),
        max_tokens=768, window=32,
    )  # fmt: skip
    (trial,) = model.polarization["provenance"]["choices"]
    assert trial["choice"] == "ranks by sensitivity"
    assert model.config.quantization_config.cim == NOISY.replace(mapping="quiet")
    for layer in model.sensitivity.layers:
        assert 0 <= layer.after < layer.before
    inputs = tiny_inputs(model)
    here = output(model, inputs)
    save_polarized(model, tmp_path / "out")
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), inputs), here)


def test_a_model_that_was_loaded_on_a_chip_is_solved_for_its_new_values(tmp_path):
    """Choices are made off the chip of the values that were loaded, and the new values get a chip of their own."""
    original = tiny_model("llama-tied")
    original.save_pretrained(tmp_path / "model")
    chip = NOISY.replace(read_noise=0.0, adc_bits=None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=PolarizeConfig(cim=chip))
    choosing = ClosedForm(two_sided=True, held_out=2)
    arguments = {"surrogate": SurrogateConfig(r=4), "closed_form": choosing, "max_tokens": 256, "window": 32}
    polarize(loaded, batches(), original=original, **arguments)
    fresh = polarize(tiny_model("llama-tied"), batches(), PolarizeConfig(cim=chip), **arguments)
    inputs = tiny_inputs(fresh)
    assert torch.allclose(output(loaded, inputs), output(fresh, inputs), atol=1e-4)
    assert loaded.config.quantization_config.cim == chip
    ours, theirs = (model.polarization["provenance"]["choices"] for model in (loaded, fresh))
    assert [trial["with"] for trial in ours] == pytest.approx([trial["with"] for trial in theirs], rel=1e-3)


@pytest.mark.parametrize("encoding", ["sign_magnitude", "twos_complement"])
def test_codes_for_cells_without_defects_are_those_of_any_backbone(encoding):
    """Then every cell makes the same of a code, and the rounding is GPTQ's."""
    linear = torch.nn.Linear(192, 96, bias=False)
    config = CIMConfig.preset("ideal", mapping="one_hot") if encoding == "twos_complement" else IDEAL_SIGNED
    layer = quantize_linear(linear, PolarizeConfig(cim=config))
    inputs, weight = Covariance(covariance(192)), linear.weight.detach()
    codes = codes_for_cells(layer, "layer", weight, inputs, config)
    executed = weight_code(config, layer.levels()).executed.float()
    levels = executed if config.mapping == "one_hot" else (layer.levels() * 127).round() / 127
    plain = round_with_feedback(weight, spread(layer.block_scales(), weight.shape, 64), levels, inputs)
    assert float((codes == plain).float().mean()) > 0.999


@pytest.mark.parametrize("drift", [{}, {"drift_exponent": 0.05, "drift_spread": 0.01, "drift_time": 1e5}])
def test_a_layer_that_is_written_for_its_chip(drift):
    """Against float64: the weights that the chip ends up with, in the metric of the inputs."""
    linear = torch.nn.Linear(192, 96, bias=False)
    chip = NOISY.replace(stuck_at_zero=0.01, column_gain=0.02, read_noise=0.0, adc_bits=None, **drift)
    layer = quantize_linear(linear, PolarizeConfig(cim=chip))
    h, weight = covariance(192), linear.weight.detach()

    def error(codes=None):
        if codes is not None:
            layer.store(codes, layer.block_scales())
        found = OnChip(layer, "layer", chip).fast.weight.double() - weight.double()
        return float(((found @ h) * found).sum() ** 0.5)

    before, digital = error(), weight.double() - layer.dequantized().double()
    codes = codes_for_cells(layer, "layer", weight, Covariance(h), chip)
    assert error(codes) < 0.5 * before
    assert error(codes) < 1.2 * float(((digital @ h) * digital).sum() ** 0.5)


def test_calibrated_to_a_chip():
    """The better the more is fitted to it; what is written for one chip is wrong for another."""
    original = tiny_model("llama-tied")
    inputs = tiny_inputs(original, n=16)
    expected = output(original, inputs)
    chip = NOISY.replace(mismatch=0.3, read_noise=0.0)
    model = polarized(cim=chip)
    fitted, written = copy.deepcopy(model), copy.deepcopy(model)

    def error(model):
        return float((output(model, inputs) - expected).norm())

    calibrate_to_chip(fitted, original, batches())
    calibrate_to_chip(written, original, batches(), codes=True)
    assert error(written) < 0.7 * error(fitted) and error(fitted) < error(model)
    for one in (written, model):
        attach_cim(one, chip.replace(chip_seed=5))
    assert error(written) > error(model)


def test_a_fitted_model_is_saved_as_such_and_not_fitted_again(tmp_path, caplog):
    original, inputs = tiny_model("llama-tied"), tiny_inputs(tiny_model("llama-tied"))
    save_polarized(polarized(cim=NOISY), tmp_path / "any")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "any")
    before = {name: b.detach().clone() for name, (_, b) in factors(model).items()}
    chosen = ClosedForm(two_sided=True)
    calibrate_to_chip(model, original, batches(), chosen, codes=True, memory_limit=2**14)  # in several passes
    assert not any(torch.equal(b, before[name]) for name, (_, b) in factors(model).items())
    save_polarized(model, tmp_path / "fitted")
    card = model_card(inspect_checkpoint(tmp_path / "fitted"), "me/fitted").content
    assert "fitted to the simulated chip of seed 0 alone, its codes written for those cells" in card
    assert "chip.replace(chip_seed=1))  # another chip of its kind: worse, the model was fitted to seed 0" in card
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fitted")
    reset_reads(model)
    assert torch.equal(output(again, inputs), output(model, inputs))
    with pytest.raises(ValueError, match="was fitted to a chip already"):
        calibrate_to_chip(again, original, batches())
    attach_cim(again, NOISY.replace(chip_seed=1))
    assert "fitted to one chip, and is the worse for it on this one, with chip_seed 1 instead of 0" in caplog.text
    caplog.clear()
    other = PolarizeConfig(cim=NOISY.replace(chip_seed=2))
    AutoModelForCausalLM.from_pretrained(tmp_path / "fitted", quantization_config=other)
    assert "with chip_seed 2 instead of 0" in caplog.text


def test_what_can_not_be_measured_leaves_a_model_as_it_was():
    model, original = polarized(cim=NOISY), tiny_model("llama-tied")
    before = {name: b.detach().clone() for name, (_, b) in factors(model).items()}
    broken = copy.deepcopy(original)
    broken.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="finite"):
        calibrate_to_chip(model, broken, batches())
    assert all(torch.equal(b, before[name]) for name, (_, b) in factors(model).items())
    calibrate_to_chip(model, original, batches())


def test_a_chip_that_must_run_fast_keeps_codes_that_can(monkeypatch):
    model, original = polarized(cim=NOISY), tiny_model("llama-tied")
    attach_cim(model, NOISY.replace(model="fast"))
    layer = model.model.layers[0].self_attn.q_proj.get_base_layer()
    before = layer.dequantized().clone()

    def refused(*_):
        raise ValueError("not valid")

    monkeypatch.setattr(deflation_module, "OnChip", refused)
    with pytest.raises(ValueError, match="not valid"):
        calibrate_to_chip(model, original, batches(), codes=True)
    assert torch.equal(layer.dequantized(), before)


def test_a_chip_with_measured_ranges_is_measured_anew():
    chip = NOISY.replace(adc_range="max")
    model = attach_cim(polarized(cim=NOISY), chip, batches())
    before = dict(model.config.quantization_config.cim.ranges)
    calibrate_to_chip(model, tiny_model("llama-tied"), batches())
    after = model.config.quantization_config.cim.ranges
    assert after.keys() == before.keys() and after != before


def test_what_can_not_be_fitted_to_a_chip():
    model, original = polarized(cim=NOISY), tiny_model("llama-tied")
    for wrong, message in (
        (tiny_model("bert"), "the original is a"),
        (AutoModelForCausalLM.from_config(original.config), "that is another model"),
        (original, "max_tokens must hold"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate_to_chip(model, wrong, batches(), max_tokens=2 if wrong is original else 16384)
    twice = get_peft_model(model, SurrogateConfig(r=2), adapter_name="second")
    with pytest.raises(ValueError, match="expected one adapter made with a SurrogateConfig"):
        calibrate_to_chip(twice, original, batches())


def test_experts_that_no_token_reached_are_fitted_as_well():
    model, original = polarized(cim=NOISY), tiny_model("llama-tied")
    seen = {"model.layers.0.mlp.up_proj": original.model.layers[0].mlp.up_proj}
    (known,) = layer_statistics(original, batches(), seen, 2**40)
    before = {name: b.detach().clone() for name, (_, b) in factors(model).items()}
    fit_to_chip(model, dict(original.named_modules()), [known], batches())
    assert not any(torch.equal(b, before[name]) for name, (_, b) in factors(model).items())


def test_what_training_made_of_b_stays_beside_what_a_chip_needs():
    original, name = tiny_model("llama-tied"), "model.layers.0.mlp.up_proj"
    linear, seen = original.get_submodule(name), []
    with linear.register_forward_hook(lambda _, given, __: seen.append(given[0])):
        output(original, tiny_inputs(original, n=16))
    model = polarized(cim=NOISY.replace(mismatch=0.3, read_noise=0.0))
    a, b = factors(model)[name]
    learned = 0.1 * torch.randn(b.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        b += learned
    aim = seen[0] @ (linear.weight + learned @ a).T.detach()

    def error():
        with torch.no_grad():
            return float((model.get_submodule(name)(seen[0]) - aim).norm() / aim.norm())

    before = error()
    calibrate_to_chip(model, original, batches())
    assert error() < before < 0.5 * float((seen[0] @ (learned @ a).T).detach().norm() / aim.norm())

"""Models on a simulated chip: on, off, saved, reloaded, trained."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import FAMILIES, TEXT, output, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

from hf_polarize import (
    CIMConfig,
    ClosedForm,
    PolarizeConfig,
    SurrogateConfig,
    attach_cim,
    backbone_only,
    detach_cim,
    polarize,
    save_polarized,
)
from hf_polarize.backbone import backbone_layers, quantize_linear
from hf_polarize.cim import hook
from hf_polarize.cim.array import INTEGERS_ARE_FAST
from hf_polarize.cim.fast import normal_like
from hf_polarize.cim.hook import OnChip, chips, off_chip, reset_reads
from hf_polarize.plan import make_plan

NOISY = CIMConfig.preset("noisy")


def quantized(family, tmp_path, backbone="nf4", dtype=torch.float32, **arguments):
    tiny_model(family, dtype=dtype).save_pretrained(tmp_path / family)
    auto = getattr(transformers, FAMILIES[family][0])
    config = PolarizeConfig(backbone=backbone, **arguments)
    return auto.from_pretrained(tmp_path / family, quantization_config=config, dtype=dtype)


def difference(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backbone", ["nf4", "int8"])
def test_every_family_runs_on_a_chip_and_comes_off_it(family, backbone, tmp_path):
    model = quantized(family, tmp_path, backbone)
    inputs = tiny_inputs(model)
    before = output(model, inputs)
    attach_cim(model, CIMConfig.preset("ideal"))
    ideal = difference(output(model, inputs), before)  # inputs and the grid at 8 bits
    attach_cim(model, NOISY)
    assert 0 < ideal < 0.5 * difference(output(model, inputs), before)
    detach_cim(model)
    assert torch.equal(output(model, inputs), before)
    assert model.config.quantization_config.cim is None


@pytest.mark.parametrize("backbone", ["nf4", "int8"])
def test_an_ideal_chip_computes_what_its_layers_hold(backbone, tmp_path):
    """Against float64: the dequantized weight times the rounded input, up to half a step of the grid."""
    from hf_polarize.cim.planes import quantized_inputs

    model = quantized("llama-tied", tmp_path, backbone)
    attach_cim(model, CIMConfig.preset("ideal", mapping="one_hot" if backbone == "nf4" else "grid"))
    for name, layer in backbone_layers(model):
        x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
        q, scale = quantized_inputs(x.flatten(0, 1), 8)
        expected = (q * scale).double() @ layer.dequantized().double().T
        assert difference(layer(x).flatten(0, 1), expected) < 5e-5, name  # weights in 16 bits


@pytest.mark.parametrize("kind", ["fast", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_reload_is_the_same_chip(kind, dtype, tmp_path):
    chip = NOISY.replace(chip_seed=7, model="auto" if kind == "fast" else kind)
    model = quantized("llama-untied", tmp_path, dtype=dtype, cim=chip)
    inputs = tiny_inputs(model)
    here = output(model, inputs)
    assert here.dtype == dtype
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert again.config.quantization_config.cim == chip
    assert torch.equal(output(again, inputs), here)
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=dtype, quantization_config=PolarizeConfig(cim=chip.replace(chip_seed=8))
    )
    assert not torch.equal(output(other, inputs), here)


DIGEST = """
import hashlib, torch
from hf_polarize import CIMConfig
from hf_polarize.cim.chip import fabricate
from hf_polarize.cim.planes import weight_code
config = CIMConfig(mismatch=0.1, column_gain=0.1, column_offset=0.1, stuck_at_one=0.01, chip_seed=5)
indices = torch.full((40, 3, 64), 3, dtype=torch.int16)
digest = hashlib.sha256()
for plane in fabricate(indices, weight_code(config, torch.zeros(1)), config, "a.layer"):
    for tensor in (plane.cells, plane.gain, plane.offset):
        digest.update(tensor.numpy().tobytes())
digest = digest.hexdigest()
"""


def test_a_chip_is_the_same_in_another_process():
    here = {}
    exec(DIGEST, here)
    command = [sys.executable, "-c", DIGEST + "print(digest)"]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    assert there == here["digest"]


RELOAD = """
import sys, torch, hf_polarize
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(repr(model(torch.arange(12)[None]).logits.double().sum().item()))
"""


def test_a_model_on_a_chip_is_the_same_in_another_process(tmp_path):
    model = quantized("llama-tied", tmp_path, cim=NOISY.replace(chip_seed=3))
    here = model(torch.arange(12)[None]).logits.double().sum().item()
    model.save_pretrained(tmp_path / "saved")
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "saved")]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    assert float(there) == here


@pytest.mark.parametrize("kind", ["fast", "exact"])
def test_layers_on_a_chip_take_tokens_one_by_one(kind, tmp_path):
    """Bit for bit, where products are those of integers."""
    layer = next(layer for _, layer in backbone_layers(quantized("llama-tied", tmp_path)))
    chip = OnChip(layer, "layer", NOISY.replace(read_noise=0.0, model="exact" if kind == "exact" else "auto"))
    assert chip.exact == (kind == "exact")
    if kind == "fast":
        chip.fast.std.zero_()  # what readings err by is another draw for each batch
    x = torch.randn(40, layer.in_features, generator=torch.Generator().manual_seed(0))
    parts = torch.cat([chip.product(part) for part in x.split([1, 7, 32])])
    close = {} if kind == "exact" or INTEGERS_ARE_FAST else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(parts, chip.product(x), **(close or {"rtol": 0, "atol": 0}))


def test_it_is_said_that_layers_run_plane_by_plane(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(hook.logger, "warning_once", said.append)
    dead_zone = CIMConfig(encoding="sign_magnitude", adc_bits=3, mismatch=0.0, read_noise=0.0)
    for bits in (3, 4):
        attach_cim(quantized("llama-tied", tmp_path), dead_zone.replace(adc_bits=bits))
    assert "14 of 14 layers run plane by plane" in said[0] and "a dead zone" in said[0]
    assert said.pop() == said[0]  # whatever the numbers in it
    attach_cim(quantized("llama-tied", tmp_path), NOISY.replace(model="exact"))
    attach_cim(quantized("llama-tied", tmp_path), NOISY)
    assert len(said) == 1  # as asked for, and fast


def test_read_noise_is_new_at_every_read_and_can_begin_anew(tmp_path):
    model = attach_cim(quantized("llama-tied", tmp_path), NOISY.replace(chip_seed=1))
    inputs = tiny_inputs(model)
    first, second = output(model, inputs), output(model, inputs)
    assert not torch.equal(first, second)
    reset_reads(model)
    assert torch.equal(output(model, inputs), first)


@pytest.mark.parametrize("kind", ["fast", "exact"])
def test_gradient_checkpointing_reads_the_same_again(kind, tmp_path):
    """Else the gradients would be those of another forward pass than the loss."""
    model = attach_cim(quantized("llama-tied", tmp_path), NOISY.replace(read_noise=1.0, model=kind)).train()
    inputs, embedding = tiny_inputs(model), model.get_input_embeddings().weight

    def gradients():
        torch.manual_seed(0)
        embedding.grad = None
        embedding.requires_grad_()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        return loss, embedding.grad

    loss, expected = gradients()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again, found = gradients()
        assert torch.equal(again, loss)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["fast", "exact"])
def test_a_token_of_zeros_reads_as_nothing(kind, tmp_path):
    layer = next(layer for _, layer in backbone_layers(quantized("llama-tied", tmp_path)))
    chip = OnChip(layer, "layer", NOISY.replace(read_noise=1.0, column_offset=1.0, model=kind))
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
    x[2] = 0
    assert chip.product(x)[2].abs().max() == 0 and chip.product(x)[1].abs().min() > 0


@pytest.mark.parametrize("backbone", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["auto", "exact"])
def test_a_row_of_zeros_reads_as_nothing(kind, backbone):
    linear = torch.nn.Linear(128, 64, bias=False)
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(0))
    linear.weight.data[0] = 0
    config = NOISY.replace(read_noise=1.0, column_offset=1.0, model=kind)
    chip = OnChip(quantize_linear(linear, PolarizeConfig(backbone)), "layer", config)
    assert chip.exact == (kind == "exact")
    y = chip.product(torch.randn(4, 128, generator=torch.Generator().manual_seed(0)))
    assert y[:, 0].abs().max() == 0 and y[:, 1:].abs().min() > 0


def test_only_the_layers_that_were_chosen(tmp_path):
    model = attach_cim(quantized("llama-tied", tmp_path), NOISY.replace(layers=[r"mlp\.down_proj"]))
    assert {name.rpartition(".")[2] for name, _ in chips(model)} == {"down_proj"}
    with pytest.raises(ValueError, match=r"none of the 14 layers has a name that layers=\['nothing'\] finds"):
        attach_cim(model, NOISY.replace(layers=["nothing"]))
    assert len(list(chips(model))) == 2  # what was attached stays


def test_generate_and_a_step_of_training(tmp_path, tokenizer):
    """The surrogates of a model on a chip learn: gradients are those of the chip's own weights."""
    model = quantized("llama-tied", tmp_path)
    model.add_adapter(SurrogateConfig(r=4), "surrogate")
    attach_cim(model, NOISY.replace(read_noise=0.0))
    ids = tokenizer(TEXT[:4], return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


def test_the_gradient_is_that_of_the_chips_weight(tmp_path):
    model = attach_cim(quantized("llama-tied", tmp_path), NOISY)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(6, layer.in_features, requires_grad=True)
    upstream = torch.randn(6, layer.out_features)
    (layer(x) * upstream).sum().backward()
    assert torch.allclose(x.grad, upstream @ layer.chip.fast.weight, rtol=1e-4, atol=1e-5)


def test_the_surrogate_stays_digital(tmp_path):
    """A surrogate adds the same on a chip as off it."""
    model = polarize(tiny_model("llama-tied"), tiny_inputs_batches(), max_tokens=256, window=32)
    layer = model.model.layers[1].self_attn.q_proj
    x = torch.randn(5, layer.in_features)

    def surrogate():
        with torch.no_grad():
            both = layer(x)
            with backbone_only(model):
                return both - layer(x)

    digital = surrogate()
    attach_cim(model, NOISY.replace(read_noise=0.0, adc_bits=None))
    assert torch.allclose(surrogate(), digital, atol=1e-5)


def tiny_inputs_batches():
    return [tiny_inputs(tiny_model("llama-tied"), n=8)]


def test_a_polarized_checkpoint_keeps_its_chip(tmp_path):
    model = polarize(tiny_model("llama-tied"), tiny_inputs_batches(), max_tokens=256, window=32)
    attach_cim(model, NOISY)
    inputs = tiny_inputs(model)
    here = output(model, inputs)
    save_polarized(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(output(again, inputs), here)
    off = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=PolarizeConfig())
    detach_cim(model)
    assert torch.equal(output(off, inputs), output(model, inputs))


@pytest.mark.parametrize("how", ["max", "percentile", "mse"])
def test_measured_ranges_are_kept(how, tmp_path):
    model = quantized("llama-tied", tmp_path)
    inputs = tiny_inputs(model)
    chip = CIMConfig(adc_bits=4, adc_range=how, mismatch=0.0, read_noise=0.0)
    with pytest.raises(ValueError, match="is measured: give batches"):
        attach_cim(model, chip)
    exact = output(attach_cim(model, chip.replace(adc_bits=None, adc_range="full", ranges={})), inputs)
    full = difference(output(attach_cim(model, chip.replace(adc_range="full")), inputs), exact)
    attach_cim(model, chip, data=[inputs])
    measured = output(model, inputs)
    assert difference(measured, exact) < full  # counts use a part of the full range
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), inputs), measured)


def test_ranges_hold_for_what_they_were_measured_for(tmp_path):
    model = quantized("llama-tied", tmp_path)
    inputs = tiny_inputs(model)
    attach_cim(model, CIMConfig(adc_range="percentile", percentile=90.0, mismatch=0.1), data=[inputs])
    kept = model.config.quantization_config.cim
    assert kept.ranges and max(kept.ranges.values()) < kept.rows
    assert kept.replace(chip_seed=1, mismatch=0.2, layers=["q_proj"], percentile=90.0).ranges == kept.ranges
    for change in ({"adc_range": "full"}, {"percentile": 99.9}, {"rows": 16}, {"adc_range": "mse"}):
        assert not kept.replace(**change).ranges
    expected = output(attach_cim(model, CIMConfig(mismatch=0.1)), inputs)
    attach_cim(model, kept.replace(adc_range="full", ranges=kept.ranges))  # of no meaning there
    assert torch.equal(output(model, inputs), expected)
    attach_cim(model, kept.replace(adc_bits=None, model="fast"))  # nothing is cut without an ADC


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bert-mlm"])
def test_a_checkpoint_is_the_same_chip_with_a_head_and_without(family, tmp_path):
    model = quantized(family, tmp_path)
    inputs = tiny_inputs(model)
    measured = NOISY.replace(read_noise=0.0, adc_range="max", layers=[r"\.[01]\."])
    attach_cim(model, measured, data=[inputs]).save_pretrained(tmp_path / "saved")
    without = {"add_pooling_layer": False} if family == "bert-mlm" else {}
    bare = transformers.AutoModel.from_pretrained(tmp_path / "saved", **without)
    on_chip = dict(chips(model))
    assert on_chip
    for (name, chip), (_, again) in zip(on_chip.items(), chips(bare), strict=True):
        x = torch.randn(3, chip.in_features, generator=torch.Generator().manual_seed(0))
        assert torch.equal(chip.product(x), again.product(x)), name


@pytest.mark.parametrize("pattern", [r"^model\.layers\.0", r"^layers\.0"])
def test_layers_are_found_with_a_head_and_without(pattern, tmp_path):
    model = quantized("llama-tied", tmp_path)
    for core in (model, model.model):
        core.config.quantization_config = model.config.quantization_config
        assert len(list(chips(attach_cim(core, NOISY.replace(layers=[pattern]))))) == 7
    original = tiny_model("llama-tied")
    for part in (original, original.model):
        make_plan(part, PolarizeConfig(cim=NOISY.replace(layers=[pattern])))


def test_ranges_are_of_what_the_array_gets(tmp_path):
    """A failure to measure them leaves the chip that was attached."""
    model = polarize(
        tiny_model("llama-tied"), [tiny_inputs(tiny_model("llama-tied"))], PolarizeConfig(cim=NOISY),
        SurrogateConfig(r=4), ClosedForm(deflated=True), max_tokens=256, window=32,
    )  # fmt: skip
    before = [chip for _, chip in chips(model)]
    measured = NOISY.replace(adc_range="max")
    with pytest.raises(ValueError, match="no input of the data reached"):
        attach_cim(model, measured, data=[])
    assert [chip for _, chip in chips(model)] == before and model.config.quantization_config.cim.adc_range == "full"

    layer = model.model.layers[0].self_attn.q_proj.get_base_layer()
    deflation, seen = layer.deflation, []
    layer.deflation = SimpleNamespace(active=True, rest=lambda x: (seen.append(x), (torch.zeros_like(x), None))[1])
    attach_cim(model, measured, data=[tiny_inputs(model)])
    layer.deflation = deflation
    ranges = model.config.quantization_config.cim.ranges
    assert ranges["model.layers.0.self_attn.q_proj"] == 1 < ranges["model.layers.0.self_attn.k_proj"]
    worn = attach_cim(model, measured.replace(ir_drop=0.5), data=[tiny_inputs(model)]).config.quantization_config.cim
    name = "model.layers.0.self_attn.k_proj"
    assert worn.ranges[name] == pytest.approx(0.75 * ranges[name])  # of a mean cell


@pytest.mark.parametrize("kind", ["fast", "exact"])
def test_autocast_has_no_say_in_an_array(kind, tmp_path):
    chip = NOISY.replace(model="auto" if kind == "fast" else kind)
    layer = attach_cim(quantized("llama-tied", tmp_path), chip).model.layers[0].mlp.down_proj
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    here = layer(x)
    layer.chip.reset()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), here)


def test_off_the_chip_for_a_while(tmp_path):
    model = quantized("llama-tied", tmp_path)
    x = torch.arange(12)[None]
    before = model(x).logits
    attach_cim(model, CIMConfig.preset("noisy", read_noise=0.0))
    on_chip = model(x).logits
    with pytest.raises(KeyError), off_chip(model):
        assert torch.equal(model(x).logits, before)
        raise KeyError
    reset_reads(model)
    assert not torch.equal(on_chip, before) and torch.equal(model(x).logits, on_chip)


@pytest.mark.parametrize("kind", ["fast", "exact"])
def test_activations_that_overflowed_stay_so_and_touch_no_other_token(kind, tmp_path):
    layer = next(layer for _, layer in backbone_layers(quantized("llama-tied", tmp_path)))
    chip = OnChip(layer, "layer", CIMConfig.preset("noisy", read_noise=0.0, model=kind))
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
    broken = x.clone()
    broken[1, 3], broken[2, 5] = torch.nan, torch.inf
    chip.reset()
    expected = chip.product(x)
    chip.reset()
    result = chip.product(broken)
    assert torch.equal(result[[0, 3]], expected[[0, 3]])
    assert not result[1].isfinite().any() and not result[2].isfinite().any()
    assert chip.product(x[:0]).shape == (0, layer.out_features)


def test_noise_of_large_outputs_is_new_as_well():
    """Cut from a table of 2^22 numbers, with a place of its own for every piece."""
    generator = torch.Generator().manual_seed(0)
    first, second = (normal_like(torch.empty(2**11, 2**11), generator).flatten() for _ in range(2))
    assert float((first == second).double().mean()) < 1e-3
    assert float(first.mean()) == pytest.approx(0, abs=0.01) and float(first.std()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("bits", [3, 6])
def test_the_fast_model_knows_where_it_is_not_valid(bits, tmp_path):
    model = quantized("llama-tied", tmp_path)
    dead_zone = CIMConfig(encoding="sign_magnitude", adc_bits=bits, mismatch=0.0, read_noise=0.0)
    with pytest.raises(ValueError, match=r'fast model is not valid for .*model="auto" runs such layers exactly'):
        attach_cim(model, dead_zone.replace(model="fast"))
    assert all(chip.exact and chip.reason for _, chip in chips(attach_cim(model, dead_zone)))


def test_what_can_not_be_is_said(tmp_path):
    with pytest.raises(ValueError, match="no backbone to put on a chip"):
        attach_cim(tiny_model("llama-tied"), NOISY)
    with pytest.raises(TypeError, match="takes a CIMConfig; got dict"):
        attach_cim(tiny_model("llama-tied"), {})
    with pytest.raises(ValueError, match="a chip quantizes its inputs itself"):
        PolarizeConfig(activations="int8", cim=NOISY)
    for config, message in (
        (PolarizeConfig("int8", cim=CIMConfig(mapping="one_hot")), 'an INT8 backbone takes "grid"'),
        (PolarizeConfig(cim=NOISY.replace(layers=["nothing"])), "none of the 14 layers has a name"),
    ):
        original = tiny_model("llama-tied")
        with pytest.raises(ValueError, match=message):
            polarize(original, [tiny_inputs(original)], config)
        assert not list(backbone_layers(original))
    with pytest.raises(TypeError, match="cim must be a CIMConfig, a dict"):
        PolarizeConfig(cim="noisy")
    model = attach_cim(quantized("llama-tied", tmp_path), NOISY)
    with pytest.raises(ValueError, match="block scales are part of the chip"):
        model.model.layers[0].mlp.down_proj.free_scales()

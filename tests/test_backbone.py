"""The backbone against bitsandbytes itself and against the weight that it dequantizes to."""

import copy
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import FAMILIES, output, tiny_inputs, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from hf_polarize import PolarizeConfig
from hf_polarize.backbone import backbone_layers, quantize_linear, weight_matrix
from hf_polarize.formats import BackboneLinear4bit, fake_quantize

BACKBONES = {
    "nf4": {"backbone": "nf4"},
    "nf4-double": {"backbone": "nf4", "double_quant": True},
    "int8": {"backbone": "int8"},
}


@pytest.fixture(params=BACKBONES)
def config(request):
    return PolarizeConfig(**BACKBONES[request.param])


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def load(family, folder, config, **kwargs):
    return getattr(transformers, FAMILIES[family][0]).from_pretrained(folder, quantization_config=config, **kwargs)


def peer_config(config):
    return BitsAndBytesConfig(
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
        llm_int8_threshold=0.0,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=config.bnb_4bit_compute_dtype,
        llm_int8_skip_modules=config.modules_to_not_convert,
    )


def test_loading_quantizes_bit_for_bit_as_bitsandbytes(family, config, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    ours = load(family, tmp_path, config)
    theirs = load(family, tmp_path, peer_config(ours.config.quantization_config))
    mine, peer = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == peer.keys()
    for key in mine:
        assert mine[key].dtype == peer[key].dtype and torch.equal(mine[key], peer[key]), key
    inputs = tiny_inputs(ours)
    assert torch.equal(output(ours, inputs), output(theirs, inputs))


def test_quantizing_in_memory_gives_the_same_layers_as_loading(family, config, tmp_path):
    original = tiny_model(family)
    original.save_pretrained(tmp_path)
    loaded = load(family, tmp_path, copy.deepcopy(config))
    resolved = loaded.config.quantization_config
    count = 0
    for name, layer in backbone_layers(loaded):
        direct = quantize_linear(original.get_submodule(name), resolved)
        expected, got = layer.state_dict(), direct.state_dict()
        assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected), name
        count += 1
    assert count >= 8


def test_a_layer_multiplies_with_the_weight_that_it_dequantizes_to():
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 64)
    x = torch.randn(5, 128)
    for arguments in BACKBONES.values():
        layer = quantize_linear(linear, PolarizeConfig(**arguments)).train()  # no repacking, no rounding of the input
        expected = F.linear(x.double(), layer.dequantized().double(), linear.bias.double())
        # int8 keeps float16 scales
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("double_quant", [False, True])
def test_scales_and_codes_survive_an_inference(double_quant):
    """bitsandbytes alone rounds them on a CPU with AVX512-BF16 (and leaves plain ones transposed)."""
    torch.manual_seed(0)
    layer = quantize_linear(torch.nn.Linear(128, 64), PolarizeConfig(double_quant=double_quant)).eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    weight = layer.dequantized()
    with torch.no_grad():
        first = layer(torch.ones(3, 128))
    assert torch.equal(layer.dequantized(), weight)
    after = layer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    with torch.no_grad():
        assert torch.equal(layer(torch.ones(3, 128)), first)


def test_a_layer_of_odd_shape_runs_after_loading():
    layer = quantize_linear(torch.nn.Linear(72, 10, bias=False), PolarizeConfig()).eval()
    x = torch.randn(3, 72)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.dequantized()), rtol=1e-4, atol=1e-4)


def test_evaluation_computes_the_same_with_and_without_gradients():
    torch.manual_seed(0)
    layer = quantize_linear(torch.nn.Linear(128, 64), PolarizeConfig()).eval()
    x = torch.randn(3, 128)
    with torch.no_grad():
        expected = layer(x)
    x.requires_grad_(True)
    y = layer(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantized().sum(0).expand(3, -1), rtol=1e-4, atol=1e-5)


def test_dequantize_gives_plain_layers_of_the_same_function(family, config, tmp_path):
    original = tiny_model(family)
    original.save_pretrained(tmp_path)
    model = load(family, tmp_path, config)
    weights = {name: layer.dequantized() for name, layer in backbone_layers(model)}
    plain = model.dequantize()
    assert not getattr(plain, "is_quantized", False) and not list(backbone_layers(plain))
    assert not any(isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) for module in plain.modules())
    for name, weight in weights.items():
        module = plain.get_submodule(name)
        assert type(module) is type(original.get_submodule(name))  # a Conv1D where one stood
        torch.testing.assert_close(weight_matrix(module), weight.to(module.weight.dtype), rtol=0, atol=0)
    plain.save_pretrained(tmp_path / "plain")
    again = getattr(transformers, FAMILIES[family][0]).from_pretrained(tmp_path / "plain")
    inputs = tiny_inputs(plain)
    assert torch.equal(output(again, inputs), output(plain, inputs))


def test_heads_and_tied_layers_stay_in_high_precision(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    model = load(family, tmp_path, PolarizeConfig())
    names = {name for name, _ in backbone_layers(model)}
    for name, module in model.named_modules():
        is_head = name in ("lm_head", "classifier") or name.startswith("cls.")
        if type(module) is torch.nn.Linear or isinstance(module, Conv1D):
            # T5 asks for its wo layers in float32
            assert is_head or name.endswith(".wo"), name
        assert not (is_head and name in names)


def test_modules_to_not_convert_are_left_alone(tmp_path):
    tiny_model("llama-untied").save_pretrained(tmp_path)
    model = load("llama-untied", tmp_path, PolarizeConfig(modules_to_not_convert=["down_proj"]))
    names = {name for name, _ in backbone_layers(model)}
    assert "lm_head" in names and not any("down_proj" in name for name in names)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no layer to quantize"):
        load("llama-untied", tmp_path, PolarizeConfig(modules_to_not_convert=["model", "lm_head"]))


def test_one_configuration_serves_many_models(tmp_path, config):
    before = config.to_dict()
    for family in ("llama-tied", "bert", "llama-untied"):
        tiny_model(family, dtype=torch.bfloat16).save_pretrained(tmp_path / family)
        load(family, tmp_path / family, config)
    assert config.to_dict() == before


def test_tied_layers_stay_whatever_is_named(tmp_path, config):
    tiny_model("llama-tied").save_pretrained(tmp_path / "original")
    config.llm_int8_skip_modules = ["down_proj"]
    model = load("llama-tied", tmp_path / "original", config)
    inputs = tiny_inputs(model)
    expected = output(model, inputs)
    assert type(model.lm_head) is torch.nn.Linear
    model.save_pretrained(tmp_path / "saved")
    peer = peer_config(model.config.quantization_config)
    assert torch.equal(output(load("llama-tied", tmp_path / "original", peer), inputs), expected)


def test_rows_of_any_stride_and_no_rows_at_all():
    torch.manual_seed(0)
    x = torch.randn(128, 5)
    for arguments in BACKBONES.values():
        layer = quantize_linear(torch.nn.Linear(128, 64), PolarizeConfig(**arguments)).eval()
        with torch.no_grad():
            assert torch.equal(layer(x.T), layer(x.T.contiguous()))
            assert layer(torch.empty(2, 0, 128)).shape == (2, 0, 64)


def test_sharded_checkpoints_and_a_reload(tmp_path, config):
    tiny_model("llama-untied").save_pretrained(tmp_path / "original", max_shard_size="40KB")
    model = load("llama-untied", tmp_path / "original", config)
    inputs = tiny_inputs(model)
    expected = output(model, inputs)
    for step in ("first", "second"):  # saving a loaded bitsandbytes model raises in transformers
        model.save_pretrained(tmp_path / step, max_shard_size="40KB")
        assert len(list((tmp_path / step).glob("*.safetensors"))) > 1
        model = AutoModelForCausalLM.from_pretrained(tmp_path / step)
        assert isinstance(model.config.quantization_config, PolarizeConfig)
        assert torch.equal(output(model, inputs), expected)


def test_device_map_auto_works_and_disk_is_refused(tmp_path):
    tiny_model("llama-untied").save_pretrained(tmp_path)
    model = load("llama-untied", tmp_path, PolarizeConfig(), device_map="auto")
    assert all(isinstance(layer, BackboneLinear4bit) for _, layer in backbone_layers(model))
    output(model, tiny_inputs(model))
    model.save_pretrained(tmp_path / "quantized")
    for device_map, limits in (({"": "disk"}, {}), ("auto", {"max_memory": {"cpu": "30KB"}})):
        arguments = {"device_map": device_map, "offload_folder": tmp_path / "offload", **limits}
        with pytest.raises(ValueError, match="can't be quantized and offloaded to disk in one go"):
            load("llama-untied", tmp_path, PolarizeConfig(), **arguments)
        with pytest.raises(ValueError, match="layers can't be offloaded to disk"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", **arguments)


MEASURE = """
import sys, torch
from transformers import AutoModelForCausalLM
from hf_polarize import PolarizeConfig
from hf_polarize.backbone import backbone_layers

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
before = status("VmRSS")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=PolarizeConfig())
size = sum(p.nbytes for p in model.parameters())
size += sum(scale.nbytes for _, layer in backbone_layers(model) for scale in layer.scales())
print(status("VmHWM") - before - size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of a process as Linux tells it")
def test_loading_takes_little_more_than_the_model_on_disk(smollm2):
    sizes = [tensor.nbytes for tensor in load_file(smollm2 / "model.safetensors").values()]  # bfloat16
    command = [sys.executable, "-c", MEASURE, smollm2]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) <= sum(sizes) + 2 * max(sizes)  # the largest one in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_runs_in_the_dtype_of_the_model_unless_chosen(tmp_path, dtype):
    tiny_model("llama-untied", dtype=dtype).save_pretrained(tmp_path)
    model = load("llama-untied", tmp_path, PolarizeConfig())
    assert model.dtype == dtype and {layer.compute_dtype for _, layer in backbone_layers(model)} == {dtype}
    chosen = load("llama-untied", tmp_path, PolarizeConfig(compute_dtype="float16"))
    assert {layer.compute_dtype for _, layer in backbone_layers(chosen)} == {torch.float16}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@given(
    st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=7, max_size=7),
        min_size=1,
        max_size=4,
    )
)
def test_fake_quantization_takes_the_nearest_value_of_the_grid(kind, rows):
    x = torch.tensor(rows)
    grid = torch.arange(-127, 128) / 127 if kind == "int8" else bnb.functional.get_4bit_type("nf4", device="cpu")
    rounded = fake_quantize(x, kind)
    for row, got in zip(x.double(), rounded.double(), strict=True):
        scale = row.abs().max()
        values = scale * grid.double()
        distance = (row[:, None] - values).abs().min(1).values
        torch.testing.assert_close((got - row).abs(), distance, rtol=1e-4, atol=float(scale) * 1e-6)


def test_activations_are_rounded_before_the_backbone_and_gradients_pass():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32, bias=False)
    plain = quantize_linear(linear, PolarizeConfig()).train()
    rounding = quantize_linear(linear, PolarizeConfig(activations="nf4")).train()
    x = torch.randn(4, 64, requires_grad=True)
    y = rounding(x)
    assert torch.equal(y, plain(fake_quantize(x, "nf4")))
    assert not torch.allclose(y, plain(x))
    y.sum().backward()
    torch.testing.assert_close(x.grad, rounding.dequantized().sum(0).expand(4, -1), rtol=1e-4, atol=1e-5)

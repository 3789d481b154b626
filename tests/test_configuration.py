"""What is accepted, what is refused and how, and what survives a round trip."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from hf_polarize import CIMConfig, PolarizeConfig, SurrogateConfig
from hf_polarize.cim import configuration

configs = st.builds(
    lambda backbone, double_quant, dtype, activations, skip: PolarizeConfig(
        backbone,
        double_quant=double_quant and backbone == "nf4",
        compute_dtype=dtype if backbone == "nf4" else None,
        activations=activations,
        modules_to_not_convert=skip,
    ),
    st.sampled_from(["nf4", "int8"]),
    st.booleans(),
    st.sampled_from([None, "float32", "bfloat16", torch.float16]),
    st.sampled_from([None, "int8", "nf4"]),
    st.none() | st.lists(st.sampled_from(["lm_head", "score", "layers.0"]), max_size=2),
)


@given(configs)
def test_a_configuration_survives_json(config):
    written = json.loads(json.dumps(config.to_dict()))
    read = AutoQuantizationConfig.from_dict(written)
    assert isinstance(read, PolarizeConfig)
    for name in ("backbone", "double_quant", "activations", "modules_to_not_convert", "bnb_4bit_compute_dtype"):
        assert getattr(read, name) == getattr(config, name)
    assert read.to_dict() == config.to_dict()


@given(configs)
def test_readers_without_the_library_see_a_bitsandbytes_configuration(config):
    written = json.loads(json.dumps(config.to_dict()))
    assert written["quant_method"] == "bitsandbytes"
    vanilla = BitsAndBytesConfig.from_dict(written)
    assert vanilla.quantization_method() == {"nf4": "nf4", "int8": "llm_int8"}[config.backbone]
    assert vanilla.llm_int8_threshold == 0
    assert vanilla.llm_int8_skip_modules == config.modules_to_not_convert


def test_other_bitsandbytes_configurations_pass_through():
    plain = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    assert type(AutoQuantizationConfig.from_dict(plain.to_dict())) is BitsAndBytesConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "nf3"}, r"backbone must be one of 'nf4', 'int8'; got 'nf3'"),
        ({"activations": "fp8"}, r"activations must be one of None, 'int8', 'nf4'; got 'fp8'"),
        ({"double_quant": "yes"}, r"double_quant must be one of True, False; got 'yes'"),
        ({"backbone": "int8", "double_quant": True}, "double_quant compresses the scales of NF4"),
        ({"compute_dtype": "float64"}, r"compute_dtype must be one of None, 'float32', 'bfloat16', 'float16'"),
        ({"backbone": "int8", "compute_dtype": "float32"}, "multiplies in INT8"),
        ({"modules_to_not_convert": "lm_head"}, "list of names; got 'lm_head'"),
    ],
)
def test_a_wrong_choice_is_refused_with_what_is_accepted(arguments, message):
    with pytest.raises(ValueError, match=message):
        PolarizeConfig(**arguments)


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="bits"):
        PolarizeConfig(bits=4)


def test_a_surrogate_is_a_lora_of_unit_scale():
    config = SurrogateConfig(r=16, rank_pattern={"down_proj": 4})
    assert isinstance(config, LoraConfig) and config.peft_type == "LORA"
    assert config.lora_alpha == 16 and config.alpha_pattern == {"down_proj": 4}
    assert SurrogateConfig().r == 8 and SurrogateConfig().target_modules == "all-linear"
    assert SurrogateConfig(start="random").init_lora_weights is False


def test_peft_knows_every_key_that_a_surrogate_writes():
    assert set(SurrogateConfig().to_dict()) == set(LoraConfig().to_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r must be an integer of at least 1; got 0"),
        ({"r": 2.5}, "r must be an integer"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\] must be an integer of at least 1; got -1"),
        ({"r": 8, "lora_alpha": 16}, "unit scale"),
        ({"alpha_pattern": {"q_proj": 4}}, "unit scale"),
        ({"use_rslora": True}, "use_rslora must be False"),
        ({"use_dora": True}, "use_dora must be False"),
        ({"lora_dropout": 0.1}, r"lora_dropout must be 0\.0"),
        ({"bias": "all"}, "bias must be 'none'"),
        ({"start": "pissa"}, "start must be one of 'zero', 'random'; got 'pissa'"),
    ],
)
def test_what_breaks_the_format_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SurrogateConfig(**arguments)


def test_the_physical_defaults_of_a_chip():
    """kT/C of 128 cells of 1 fF at 300 K is 0.18 mV; a count of 128 rows at 0.8 V is 6.25 mV."""
    config = CIMConfig(rows=128, adc_bits=7, adc_noise=0.0)
    assert config.reading_noise == pytest.approx(0.18 / 6.25, rel=0.01)
    assert CIMConfig(rows=128, adc_bits=7).reading_noise == pytest.approx(math.hypot(0.5, 0.18) / 6.25, rel=0.01)
    assert CIMConfig().cell_mismatch == pytest.approx(0.00664, rel=0.001)
    assert CIMConfig(cell_capacitance=4.0).cell_mismatch == pytest.approx(0.00332, rel=0.001)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rows": 0}, "rows must be an integer in 1..4096; got 0"),
        ({"input_bits": 9}, "input_bits must be an integer in 2..8; got 9"),
        ({"adc_bits": 0}, "adc_bits must be an integer in 1..16"),
        ({"encoding": "offset"}, "encoding must be one of 'twos_complement', 'sign_magnitude'; got 'offset'"),
        ({"mismatch": -0.1}, r"mismatch must be a number in 0..1; got -0.1"),
        ({"read_noise": math.inf}, r"read_noise must be a number in 0..10000; got inf"),
        ({"column_offset": math.nan}, r"column_offset must be a number in 0..10000; got nan"),
        ({"drift_time": math.inf}, r"drift_time must be a number in 20..1e\+12; got inf"),
        ({"ranges": {"a": 0.0}}, r"ranges: the largest count of a must be in 0..4096; got 0.0"),
        ({"ranges": 3}, "ranges must be a dict of a largest count by layer; got 3"),
        ({"stuck_at_zero": 0.7, "stuck_at_one": 0.7}, "sum is above 1"),
        ({"mapping": "learned", "weight_bits": 8}, "has weight_bits of 4 to 7 planes; got 8"),
        ({"mapping": "one_hot", "rows": 48}, "rows that divide the 64 weights"),
        ({"mapping": "one_hot", "rows": 0}, "rows must be an integer in 1"),
        ({"chip_seed": "a"}, "chip_seed must be an integer"),
        ({"layers": "mlp"}, "layers must be a list of regular expressions; got 'mlp'"),
        ({"layers": ["(mlp"]}, r"layers: '\(mlp' is no regular expression"),
    ],
)
def test_chips_that_can_not_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CIMConfig(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rows": 128, "adc_bits": 6}, "64 codes for a span of 128 counts"),
        ({"rows": 64, "adc_bits": 6, "encoding": "sign_magnitude"}, "64 codes for a span of 128 counts"),
        ({"rows": 128, "adc_bits": 6, "adc_range": "max"}, None),  # measured: it may well do
        ({"rows": 128, "adc_bits": 7}, None),
        ({"rows": 64, "adc_bits": 6, "encoding": "sign_magnitude", "adc_range": "max"}, None),
        ({"rows": 128, "adc_bits": None}, None),
    ],
)
def test_an_adc_with_too_few_codes_is_warned_of(arguments, message, monkeypatch):
    said = []
    monkeypatch.setattr(configuration.logger, "warning_once", said.append)
    CIMConfig(**arguments)
    assert len(said) == (message is not None) and all(message in text for text in said)


def test_what_changes_nothing_beside_a_preset_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(configuration.logger, "warning_once", said.append)
    chip = CIMConfig.preset("noisy", v_dd=0.6)
    assert chip.reading_noise == CIMConfig.preset("noisy").reading_noise
    assert len(said) == 1 and "v_dd acts on outputs through read_noise, which this chip sets to 0.02" in said[0]
    assert CIMConfig.preset("noisy", v_dd=0.6, read_noise=None).reading_noise > chip.reading_noise
    CIMConfig.preset("sram-16nm", v_dd=0.6)
    CIMConfig.preset("noisy", read_noise=None, cell_capacitance=4.0)  # kT/C
    assert len(said) == 1
    CIMConfig.preset("noisy", cell_capacitance=4.0)
    assert "through mismatch, which this chip sets to 0.15 and read_noise" in said[1]


def test_presets_and_dicts_of_chips():
    with pytest.raises(ValueError, match="no preset 'nosy'; known are 'ideal', "):
        CIMConfig.preset("nosy")
    with pytest.raises(ValueError, match="no 'adc_bit'; the nearest is 'adc_bits'"):
        CIMConfig.from_dict({"adc_bit": 3})
    config = CIMConfig.preset("nvm", chip_seed=3)
    assert CIMConfig.from_dict(config.to_dict()) == config
    assert CIMConfig().to_dict() == {}
    of_numpy = CIMConfig(
        chip_seed=np.arange(3)[2], mismatch=np.float32(0.25), zero_code=np.bool_(False), layers=("a",),
        adc_range="max", ranges={"a": np.float32(3)},
    )  # fmt: skip
    assert CIMConfig.from_dict(json.loads(json.dumps(of_numpy.to_dict()))) == of_numpy
    assert of_numpy.to_dict()["ranges"] == {"a": 3.0}

"""The bill of a chip against arithmetic by hand."""

import json

import pytest
from conftest import SIZES, VOCABULARY, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, SwinConfig, ViTConfig

from hf_polarize import CIMConfig
from hf_polarize.cim.energy import (
    EnergyConfig,
    LayerShape,
    adc_energy,
    attention_macs,
    bill_of,
    digital_mac,
    paper_section,
)
from hf_polarize.cli import main

CHIP = CIMConfig(rows=64, adc_bits=6, v_dd=0.8, cell_capacitance=1.0)
SEVEN = EnergyConfig(node=7, digital="bf16", context=10)


def test_three_layers_by_hand():
    """8 x 8 planes, 64 rows, a 6-bit ADC at 0.8 V and 7 nm, 1 fF; BF16 at 0.32 pJ. All in pJ."""
    half = (8 * 128 - 1) / (8 * 255)  # of the bits of -127..127; -128 would make it one half
    shapes = [
        LayerShape("a", 100, 128, rank=8, deflated=True),
        LayerShape("b", 10, 65, rank=0),
        LayerShape("head", 1000, 100, on_chip=False),
    ]
    bill = bill_of(shapes, 500, CHIP, SEVEN, nf4=True)
    adc = (100 * 6 * 7 / 28 + 0.001 * 4096) * 0.64 * 1e-3  # 0.0986 pJ a reading
    shift_add = 17.5 * 7 / 28 * 1e-3
    cell = 0.5 * half * 1.0 * 0.64 * 1e-3  # 0.16 fJ
    a, b, head = bill.layers["a"], bill.layers["b"], bill.layers["head"]
    assert a["array"] == pytest.approx(64 * 100 * 128 * cell)
    assert a["ADC"] == pytest.approx(64 * 100 * 2 * adc)
    assert a["shift-add"] == pytest.approx(64 * 100 * 2 * shift_add)
    assert a["scales"] == pytest.approx(100 * 2 * 0.32)
    assert a["surrogate"] == a["deflation"] == pytest.approx(8 * 228 * 0.32)
    assert b["array"] == pytest.approx(64 * 10 * 65 * cell)
    assert b["ADC"] == pytest.approx(64 * 10 * 2 * adc)  # 65 rows are two groups
    assert b["shift-add"] == pytest.approx(64 * 10 * 2 * shift_add)
    assert b["scales"] == pytest.approx(10 * 2 * 0.32)
    assert b["surrogate"] == b["deflation"] == 0
    assert set(head.values()) == {0, head["other layers"]}
    assert head["other layers"] == pytest.approx(100000 * 0.32)
    assert bill.layers["attention"]["attention"] == pytest.approx(500 * 0.32)
    assert bill.total == pytest.approx(sum(sum(layer.values()) for layer in bill.layers.values()))
    assert bill.macs == 12800 + 650 + 100000 + 500
    assert bill.tops_per_watt == pytest.approx(2 * bill.macs / bill.total)
    assert bill.caps()["ADC"] == pytest.approx(2 * bill.macs / (a["ADC"] + b["ADC"]))
    on_chip = sum(a.values()) + sum(b.values())
    assert bill.to_dict()["TOPS/W, layers on the chip"] == pytest.approx(2 * (12800 + 650) / on_chip)
    assert bill.to_dict()["TOPS/W, layers on the chip, 1 bit"] == pytest.approx(2 * 64 * (12800 + 650) / on_chip)


def test_a_deflated_signed_layer_by_hand():
    """7 x 7 planes of magnitudes, each bit 1 in 64 of the magnitudes 1..127; quiet integers left out."""
    chip = CIMConfig.preset("noisy", mapping="grid")
    bill = bill_of([LayerShape("a", 100, 130, rank=8, deflated=True)], 0, chip, SEVEN, nf4=True).layers["a"]
    cell = 0.5 * (2 * 64 / 255) * 1.0 * 0.64 * 1e-3
    readings = 49 * 100 * 3  # 130 rows are three groups of 64
    assert bill["array"] == pytest.approx(49 * 100 * 130 * cell)
    assert bill["ADC"] == pytest.approx(readings * (100 * 10 * 7 / 28 + 0.001 * 4**10) * 0.64 * 1e-3)
    assert bill["shift-add"] == pytest.approx(readings * 17.5 * 7 / 28 * 1e-3)
    assert bill["scales"] == pytest.approx(100 * 3 * 0.32)
    assert bill["surrogate"] == bill["deflation"] == pytest.approx(8 * 230 * 0.32)


def test_planes_follow_the_encoding_and_the_mapping():
    def adc(**changes):
        return bill_of([LayerShape("a", 8, 64)], 0, CHIP.replace(**changes), SEVEN, nf4=True).totals()["ADC"]

    assert adc(encoding="sign_magnitude") == pytest.approx(adc() * 49 / 64)
    assert adc(mapping="one_hot") == pytest.approx(adc() * 15 / 8)
    assert adc(input_bits=4, weight_bits=4) == pytest.approx(adc() / 4)
    assert adc(adc_bits=None) == pytest.approx(adc(adc_bits=7))  # tells 0..64 apart


def test_cells_that_hold_nothing_cost_nothing():
    def array(**changes):
        return bill_of([LayerShape("a", 8, 64)], 0, CHIP.replace(**changes), SEVEN, nf4=True).totals()["array"]

    # 8 planes, half of the cells, against 15 with one of 16
    assert array(mapping="one_hot") == pytest.approx(array() * (15 / 16) / (8 * 0.5), rel=0.01)
    noisy = CIMConfig.preset("noisy")
    deflated = bill_of([LayerShape("a", 8, 64, rank=4, deflated=True)], 0, noisy, SEVEN, nf4=True).totals()["array"]
    quiet = array(**noisy.replace(mapping="quiet").to_dict())  # what a deflated layer is written with
    assert deflated == pytest.approx(quiet) and quiet > 1.1 * array(**noisy.to_dict())


def test_what_the_surrogate_alone_allows():
    """The known caps at d = 768 and r = 8: f = 2.08 %."""
    bill = bill_of([LayerShape("a", 768, 768, rank=8)], 0, CHIP, SEVEN, nf4=True)
    paper = paper_section(bill)
    caps = paper["cap of the surrogate alone, TOPS/W"]
    assert paper["share of surrogate MACs"] == pytest.approx(0.0208, abs=1e-4)
    assert paper["claim, fJ per MAC"] == pytest.approx(4.31, abs=0.005)
    known = {"fp16, 45 nm": 64, "fp16, 7 nm": 192, "bf16, 7 nm": 300, "int8, 45 nm": 417, "int8, 7 nm": 1247}
    for name, value in known.items():
        assert caps[name] == pytest.approx(value, rel=0.01)
    deflated = paper_section(bill_of([LayerShape("a", 768, 768, rank=8, deflated=True)], 0, CHIP, SEVEN, nf4=True))
    assert deflated["share of surrogate MACs"] == 2 * paper["share of surrogate MACs"]
    # a surrogate that costs what is left, and nothing else, makes the claim
    assert 2e3 / (0.0208333 * paper["surrogate MAC that the claim leaves, fJ, everything else free"]) == pytest.approx(
        464, rel=1e-4
    )


def test_digital_arithmetic_between_the_nodes():
    assert digital_mac("fp16", 45).value == 1.5
    assert 0.5 < digital_mac("fp16", 16).value < digital_mac("fp16", 28).value < 1.5
    assert digital_mac("bf16", 45).value == pytest.approx(0.32 * 1.5 / 0.5)
    with pytest.raises(ValueError, match="fp16, bf16 or int8, at 7 to 45 nm; got 'fp8' at 7 nm"):
        EnergyConfig(node=7, digital="fp8")


def test_attention_counts_its_context():
    config = tiny_model("llama-tied").config  # 2 layers, 4 heads of 16
    assert attention_macs(config, 10) == 2 * 10 * 64 * 2
    config.sliding_window, config.layer_types = 4, ["full_attention", "sliding_attention"]
    assert attention_macs(config, 10) == 2 * (10 + 4) * 64
    # two layers of an encoder, and two of a decoder that attend twice
    assert attention_macs(tiny_model("t5").config, 10) == 2 * 10 * 64 * (2 + 2 * 2)
    for size, patch in ((32, 8), ((32, 64), [8, 16])):
        image = ViTConfig(**{**SIZES[ViTConfig], "image_size": size, "patch_size": patch})
        assert attention_macs(image, 10) == 2 * (4 * 4 + 1) * 64 * 2
    config.layer_types = ["full_attention", "linear_attention"]
    assert attention_macs(config, 10) == 2 * 10 * 64
    assert attention_macs(Qwen2Config(sliding_window=4, use_sliding_window=False), 10) == 2 * 10 * 4096 * 32
    assert attention_macs(SwinConfig(), 10) == 0  # other heads in every stage


def test_noise_costs_an_adc_the_same_at_every_node():
    """The ADC of `noisy`, 10 bits at 0.8 V: 1049 fJ / V^2 for the noise, 1000 at 28 nm for the rest."""
    noisy = CIMConfig.preset("noisy")
    for node in (28, 7):
        assert adc_energy(noisy, node) == pytest.approx((1000 * node / 28 + 1048.576) * 0.64)


def test_narrow_layers_have_no_more_rank_than_they_can(tmp_path, tokenizer):
    config = LlamaConfig(**SIZES[LlamaConfig], num_key_value_heads=1, vocab_size=VOCABULARY)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tmp_path / 'model'}\nr: 4\ncim: noisy\noutput_dir: {tmp_path / 'out'}\n")
    assert main(["energy", str(recipe)]) == 0
    assert list(json.loads((tmp_path / "out" / "energy.json").read_text())["ranks"]) == ["0", "16", "2", "4", "8"]


def test_the_command(tmp_path, capsys, tokenizer):
    tiny_model("llama-tied").save_pretrained(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tmp_path / 'model'}\nr: 4\ncim: sram-16nm\noutput_dir: {tmp_path / 'out'}\n")
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(["energy", str(recipe), "cim=null"]) == 1
    assert "Name a chip in the recipe" in capsys.readouterr().err
    assert main(["energy", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert "The largest item is" in shown
    assert "464 TOPS/W at rank 8" in shown
    record = json.loads((tmp_path / "out" / "energy.json").read_text())
    assert record["pJ per token"] == pytest.approx(sum(record["totals"].values()))
    assert (tmp_path / "out" / "energy.png").stat().st_size > 5000
    cited = ("Horowitz, ISSCC 2014", "Jouppi et al., ISCA 2021", "ZigZag-IMC", "assumed: ")
    assert all(constant["source"].startswith(cited) for constant in record["constants"])
    assert record["assumptions"]["node"] == 16 and "| 28 |" in shown
    nodes = record["nodes"]
    assert nodes["16"]["totals"] == record["totals"] and set(nodes) == {"45", "28", "16", "7"}
    assert nodes["28"]["shift-add, fJ per reading"] == 17.5
    # the paper's claim is of rank 8, whatever the recipe's
    assert main(["energy", str(recipe), "r=8"]) == 0
    eight = json.loads((tmp_path / "out" / "energy.json").read_text())
    assert eight["paper"] == record["paper"] and eight["totals"] != record["totals"]
    for overrides, node in ((["cim={preset: sram-28nm}"], 28), (["cim=sram-28nm", "energy_node=7"], 7)):
        assert main(["energy", str(recipe), *overrides]) == 0
        assert json.loads((tmp_path / "out" / "energy.json").read_text())["assumptions"]["node"] == node
    assert main(["energy", str(recipe), "energy_node=0"]) == 1
    assert "at 7 to 45 nm; got 'bf16' at 0.0 nm" in capsys.readouterr().err

    assert main(["energy", str(recipe), "cim={preset: sram-16nm, layers: [mlp]}", "deflated=true"]) == 0
    layers = json.loads((tmp_path / "out" / "energy.json").read_text())["layers"]
    for name, bill in layers.items():
        assert (bill["array"] > 0) == (bill["deflation"] > 0) == ("mlp" in name)

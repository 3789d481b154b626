"""The surrogate as PEFT sees it: attach, disable, stack, merge."""

import copy

import pytest
import torch
import transformers
from conftest import FAMILIES, output, tiny_inputs, tiny_model
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer

from hf_polarize import PolarizeConfig, SurrogateConfig, backbone_only, merge_surrogates, polarize, save_polarized
from hf_polarize.backbone import backbone_layers, quantize_linear
from hf_polarize.plan import make_plan
from hf_polarize.surrogate import SurrogateLayer, factors, surrogate_adapter

BACKBONES = ["nf4", "int8"]


def backbone(family="llama-untied", kind="nf4", **kwargs):
    """Return a tiny model with a backbone, and its inputs."""

    model = tiny_model(family, **kwargs)
    made = make_plan(model, PolarizeConfig(kind))
    for name, layer in made.layers.items():
        model.set_submodule(name, quantize_linear(layer, made.quantizer.quantization_config))
    made.quantizer.mark(model)
    return model, tiny_inputs(model)


def polarized(family="llama-untied", kind="nf4"):
    model = tiny_model(family)
    return polarize(model, [tiny_inputs(model)], PolarizeConfig(kind), SurrogateConfig(r=4)), tiny_inputs(model)


def user_lora(**kwargs):
    return LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **kwargs)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("family", FAMILIES)
def test_get_peft_model_puts_a_path_beside_every_backbone_layer(family, kind):
    model, inputs = backbone(family, kind)
    names = {name for name, _ in backbone_layers(model)}
    expected = output(model, inputs)
    peft_model = get_peft_model(model, SurrogateConfig(r=8), adapter_name="surrogate")
    assert names == set(factors(peft_model))
    assert not [
        n for n, m in peft_model.named_modules() if isinstance(m, LoraLayer) and not isinstance(m, SurrogateLayer)
    ]
    assert all(a.shape[0] == 8 and a.dtype == torch.float32 for a, _ in factors(peft_model).values())
    assert torch.equal(output(peft_model, inputs), expected)  # it starts as the bare backbone


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_layer_adds_b_a_x_with_unit_scale(kind):
    model, _ = backbone(kind=kind)
    model.add_adapter(SurrogateConfig(r=4, rank_pattern={"down_proj": 2}, start="random"), "surrogate")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer = model.get_submodule(name)
        a, b = factors(model)[name]
        assert len(a) == (2 if "down" in name else 4)
        x = torch.randn(3, a.shape[1])
        with torch.no_grad():
            expected = layer.base_layer(x) + x @ a.T @ b.T
            torch.testing.assert_close(layer(x), expected)


def test_disabling_leaves_the_backbone_and_enabling_brings_it_back():
    model, inputs = polarized()
    expected = output(model, inputs)
    with backbone_only(model):
        bare = output(model, inputs)
    assert not torch.allclose(bare, expected)
    model.disable_adapters()
    assert torch.equal(output(model, inputs), bare)
    model.enable_adapters()
    assert torch.equal(output(model, inputs), expected)


def test_the_surrogates_bring_the_outputs_nearer_to_the_original():
    for family in FAMILIES:
        original = tiny_model(family)
        inputs = tiny_inputs(original)
        reference = output(original, inputs)
        model, _ = polarized(family)
        error = (output(model, inputs) - reference).square().mean()
        with backbone_only(model):
            bare = (output(model, inputs) - reference).square().mean()
        assert error < 0.9 * bare, family


@pytest.mark.parametrize("through", ["get_peft_model", "add_adapter"])
def test_a_users_lora_stacks_on_top(through):
    model, inputs = polarized()
    alone = output(model, inputs)
    before = {name: (a.clone(), b.clone()) for name, (a, b) in factors(model).items()}
    if through == "get_peft_model":
        stacked = get_peft_model(model, user_lora())
        off = stacked.disable_adapter()
    else:
        model.add_adapter(user_lora(), "task")
        stacked, off = model, None

    both = output(stacked, inputs)
    assert not torch.allclose(both, alone)
    trainable = {name for name, parameter in stacked.named_parameters() if parameter.requires_grad}
    assert trainable and not any(".surrogate." in name for name in trainable)
    for name, (a, b) in factors(stacked).items():
        assert torch.equal(a, before[name][0]) and torch.equal(b, before[name][1])

    if off is not None:
        with off:  # the reference model of a preference loss
            assert torch.equal(output(stacked, inputs), alone)
    else:
        stacked.disable_adapters()
        assert torch.equal(output(stacked, inputs), alone)
        stacked.enable_adapters()
    assert torch.equal(output(stacked, inputs), both)
    assert {name for name, parameter in stacked.named_parameters() if parameter.requires_grad} == trainable
    with backbone_only(stacked):
        assert not torch.allclose(output(stacked, inputs), alone)


def test_loading_another_adapter_leaves_the_surrogates_alone(tmp_path):
    """transformers reports their keys as missing from that adapter's file, and as newly initialized."""
    model, _ = polarized()
    model.add_adapter(user_lora(), "task")
    model.save_pretrained(tmp_path)
    fresh, inputs = polarized()
    alone = output(fresh, inputs)
    fresh.load_adapter(str(tmp_path), adapter_name="task")
    assert not torch.allclose(output(fresh, inputs), alone)
    fresh.disable_adapters()
    assert torch.equal(output(fresh, inputs), alone)


def test_the_users_adapter_can_go_again():
    model, inputs = polarized()
    alone = output(model, inputs)
    model.add_adapter(user_lora(), "task")
    model.delete_adapter("task")
    assert torch.equal(output(model, inputs), alone)


def test_naming_the_surrogate_makes_it_trainable():
    model, _ = polarized()
    model.add_adapter(user_lora(), "task")
    assert not any(a.requires_grad for a, _ in factors(model).values())
    model.set_adapter("surrogate")
    assert all(a.requires_grad and b.requires_grad for a, b in factors(model).values())


def test_an_adapter_of_the_same_name_is_refused():
    model, inputs = polarized()
    alone = output(model, inputs)
    with pytest.raises(ValueError, match="would overwrite it"):
        get_peft_model(model, user_lora(), adapter_name="surrogate")
    assert torch.equal(output(model, inputs), alone)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_dequantizes_first(family, kind, tmp_path):
    model, inputs = polarized(family, kind)
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, SurrogateLayer):
            a, b = factors(model)[name]
            expected[name] = (module.base_layer.dequantized().double() + (b.double() @ a.double())).float()
    merged = merge_surrogates(model)
    assert not list(backbone_layers(merged)) and not getattr(merged, "peft_config", None)
    for name, weight in expected.items():
        module = merged.get_submodule(name)
        got = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
        torch.testing.assert_close(got.detach(), weight.detach())
    merged.save_pretrained(tmp_path)
    again = getattr(transformers, FAMILIES[family][0]).from_pretrained(tmp_path)
    assert torch.equal(output(again, inputs), output(merged, inputs))


def test_pefts_own_merge_is_refused_with_the_reason():
    model, inputs = backbone()
    peft_model = get_peft_model(model, SurrogateConfig(r=4, start="random"))
    alone = output(peft_model, inputs)
    with pytest.raises(ValueError, match="merge_surrogates"):
        peft_model.merge_and_unload()
    assert torch.equal(output(peft_model, inputs), alone)
    peft_model.add_adapter("task", user_lora())
    with pytest.raises(ValueError, match=r"\['task'\] are stacked on the surrogate"):
        merge_surrogates(peft_model)
    with pytest.raises(ValueError, match="delete your own"):
        peft_model.unload()
    peft_model.delete_adapter("task")
    assert torch.equal(output(peft_model, inputs), alone)


def test_merging_adds_in_float32_and_rounds_once():
    model = tiny_model("llama-untied", dtype=torch.bfloat16)
    polarize(model, [tiny_inputs(model)])
    expected = {
        name: (model.get_submodule(name).base_layer.dequantized().double() + (b.double() @ a.double()))
        for name, (a, b) in factors(model).items()
    }
    frequencies = model.model.rotary_emb.inv_freq.clone()
    merged = merge_surrogates(model)
    assert merged.dtype == torch.bfloat16 and torch.equal(merged.model.rotary_emb.inv_freq, frequencies)
    for name, weight in expected.items():
        half_step = weight.abs() * 2**-8 + 1e-6  # of bfloat16, and the sum's own float32
        assert ((merged.get_submodule(name).weight.double() - weight).abs() <= half_step).all(), name


def test_dequantizing_and_then_merging_is_the_same(tmp_path):
    model, inputs = polarized()
    other, _ = polarized()
    expected = output(merge_surrogates(model), inputs)
    other.dequantize()
    with pytest.raises(ValueError, match="merge_surrogates"):
        other.save_pretrained(tmp_path)
    merged = merge_surrogates(other)
    merged.save_pretrained(tmp_path)
    assert torch.equal(output(merged, inputs), expected)
    assert torch.equal(output(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), inputs), expected)


def test_every_row_of_a_mixed_batch_keeps_the_surrogates():
    model, inputs = polarized()
    alone = output(model, inputs)
    stacked = get_peft_model(model, user_lora())
    both = output(stacked, inputs)
    stacked.eval()
    names = ["__base__", "default", "__base__", "default"]
    with torch.no_grad():
        mixed = stacked(**inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        expected = alone[row] if name == "__base__" else both[row]
        # paths are added in another order, and some CPUs then round the next layer's input to bfloat16 otherwise
        assert (mixed[row] - expected).norm() < 0.02 * (both[row] - alone[row]).norm()


def test_rescaling_the_users_adapter_leaves_the_surrogates_at_unit_scale():
    model, inputs = polarized()
    alone = output(model, inputs)
    stacked = get_peft_model(model, user_lora())
    both = output(stacked, inputs)
    with rescale_adapter_scale(stacked, 0.0):
        assert torch.equal(output(stacked, inputs), alone)
    assert torch.equal(output(stacked, inputs), both)


def test_a_lora_beside_no_surrogate_freezes_them_too():
    model, _ = polarized()
    stacked = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    trainable = [name for name, parameter in stacked.named_parameters() if parameter.requires_grad]
    assert trainable and all("lm_head" in name for name in trainable)


def test_a_model_can_be_copied_and_pickled(tmp_path):
    model, inputs = polarized()
    expected = output(model, inputs)
    assert torch.equal(output(copy.deepcopy(model), inputs), expected)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(output(torch.load(tmp_path / "model.pt", weights_only=False), inputs), expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"target_modules": ["q_proj", "down_proj"]}, {"q_proj", "down_proj"}),
        ({"target_modules": r".*layers\.1.*(up|gate)_proj"}, {"up_proj", "gate_proj"}),
        ({"exclude_modules": ["o_proj", "v_proj"]}, {"q_proj", "k_proj", "up_proj", "gate_proj", "down_proj"}),
    ],
)
def test_only_the_chosen_layers_get_a_surrogate(arguments, expected, tmp_path):
    model = tiny_model("llama-untied")
    inputs = tiny_inputs(model)
    polarize(model, [inputs], surrogate=SurrogateConfig(r=4, **arguments))
    names = set(factors(model))
    assert {name.rpartition(".")[2] for name in names} == expected
    assert len(list(backbone_layers(model))) == 14  # all are quantized
    again = transformers.AutoModelForCausalLM.from_pretrained(save_polarized(model, tmp_path))
    assert set(factors(again)) == names and torch.equal(output(again, inputs), output(model, inputs))
    with pytest.raises(ValueError, match="matches none of the 14 layers"):
        polarize(tiny_model("llama-untied"), [inputs], surrogate=SurrogateConfig(target_modules=["z_proj"]))


def test_a_model_that_bitsandbytes_quantized_is_refused(tmp_path):
    tiny_model("llama-untied").save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match="was quantized by bitsandbytes alone"):
        get_peft_model(model, SurrogateConfig())


def test_another_original_is_refused():
    model, inputs = backbone()
    for other, message in (
        (tiny_model("gpt2"), "the original is a GPT2LMHeadModel, the model a LlamaForCausalLM"),
        (backbone()[0], "quantized already"),
        (tiny_model("llama-tied"), "that is another model"),
    ):
        with pytest.raises(ValueError, match=message):
            polarize(model, [inputs], original=other)


def test_a_model_that_peft_refuses_is_left_as_it_was(monkeypatch):
    model = tiny_model("llama-untied")
    inputs = tiny_inputs(model)
    before = output(model, inputs)

    def refuse(*args):
        raise ValueError("not with this model")

    monkeypatch.setattr(model, "add_adapter", refuse)
    with pytest.raises(ValueError, match="not with this model"):
        polarize(model, [inputs])
    assert not list(backbone_layers(model)) and not getattr(model, "is_quantized", False)
    assert torch.equal(output(model, inputs), before)


def test_a_rank_that_does_not_fit_is_refused_before_any_work():
    model = tiny_model("llama-untied")
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.min\(in, out\) = 1\.\.64 for .*; got 65"):
        polarize(model, [tiny_inputs(model)], surrogate=SurrogateConfig(r=65))
    assert not list(backbone_layers(model))
    quantized, _ = backbone()
    with pytest.raises(ValueError, match=r"1\.\.64 for .*q_proj"):
        get_peft_model(quantized, SurrogateConfig(r=65))


def test_a_model_without_surrogates_is_named():
    model, _ = backbone()
    model.add_adapter(user_lora(), "task")
    with pytest.raises(ValueError, match=r"found none \(adapters of the model: \['task'\]\)"):
        surrogate_adapter(model)

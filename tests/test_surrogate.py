"""The surrogate as PEFT sees it: attach, disable, stack, merge."""

import pytest
import torch
import transformers
from conftest import FAMILIES, output, tiny_inputs, tiny_model
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from hf_polarize import PolarizeConfig, SurrogateConfig, backbone_only, merge_surrogates, polarize
from hf_polarize.backbone import backbone_layers, quantize_linear
from hf_polarize.polarization import make_plan
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

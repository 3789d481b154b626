"""Covariances against the activations themselves, in float64."""

from contextlib import contextmanager

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, tiny_inputs, tiny_model
from datasets import Dataset
from transformers import AlbertConfig, AlbertModel, OPTConfig, OPTForCausalLM

from hf_polarize import PolarizeConfig, polarize
from hf_polarize.backbone import quantize_linear
from hf_polarize.calibration import layer_statistics, shared_inputs
from hf_polarize.data import calibration_batches
from hf_polarize.models import bfloat16_products
from hf_polarize.plan import make_plan


def layers_of(model):
    return make_plan(model).layers


def collect(model, batches, **kwargs):
    result = {}
    for part in layer_statistics(model, batches, layers_of(model), **kwargs):
        result.update({name: statistics.h for name, statistics in part.items()})
    return result


def activations(model, batches, name):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().double().flatten(0, -2))
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_mean_of_x_x_transposed(family):
    model = tiny_model(family)
    batches = [tiny_inputs(model, seed=seed) for seed in range(3)]
    covariances = collect(model, batches)
    assert set(covariances) == set(layers_of(model))
    for name in covariances:
        x = activations(model, batches, name)
        expected = x.T @ x / len(x)
        # float32 products of at most 400 tokens
        torch.testing.assert_close(
            covariances[name].double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


def test_bounded_memory_takes_more_passes_and_gives_the_same():
    model = tiny_model("llama-untied")
    batches = [tiny_inputs(model)]
    limit = 4 * 128**2  # one covariance of the widest input
    parts = list(layer_statistics(model, batches, layers_of(model), memory_limit=limit))
    assert len(parts) > 2
    assert all(sum(4 * len(h) ** 2 for h in {id(s.h): s.h for s in part.values()}.values()) <= limit for part in parts)
    whole = collect(model, batches)
    for part in parts:
        for name, statistics in part.items():
            torch.testing.assert_close(statistics.h, whole[name])


@pytest.mark.parametrize("weigh_tokens", [False, True])
def test_several_passes_with_gradients_give_the_same(weigh_tokens):
    model = tiny_model("llama-untied")
    layers = layers_of(model)
    config = make_plan(model).quantizer.quantization_config
    backbone = {name: quantize_linear(layer, config) for name, layer in layers.items()}

    def statistics(limit):
        parts = layer_statistics(
            model, [tiny_inputs(model)], layers, limit, gradients=True, weigh_tokens=weigh_tokens, backbone=backbone
        )
        return list(parts)

    (whole,), parts = statistics(2**40), statistics(12 * 128**2)
    assert len(parts) > 2
    split = {name: known for part in parts for name, known in part.items()}
    assert set(split) == set(whole) == set(layers)
    for name, known in whole.items():
        assert torch.equal(split[name].h, known.h) and torch.equal(split[name].g, known.g)  # the same labels are drawn
        assert split[name].loss == known.loss


def test_layers_that_are_called_more_than_once_see_all_of_their_inputs():
    """ALBERT runs the same layers for every block."""
    config = AlbertConfig(
        vocab_size=96, embedding_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AlbertModel(config).eval()
    batches = [{"input_ids": torch.randint(3, 96, (2, 16))}]
    whole = collect(model, batches)
    for part in layer_statistics(model, batches, layers_of(model), memory_limit=4 * 64**2):
        for name, statistics in part.items():
            torch.testing.assert_close(statistics.h, whole[name])


def test_padding_is_refused_or_left_out(tokenizer):
    model = tiny_model("llama-tied")
    padded = {**tiny_inputs(model), "attention_mask": torch.ones(4, 32, dtype=torch.int64)}
    padded["attention_mask"][:, 20:] = 0
    with pytest.raises(ValueError, match="has padding"):
        polarize(model, [padded])
    rows = {"input_ids": [[5, 6, 7, 0, 0]] * 40, "attention_mask": [[1, 1, 1, 0, 0]] * 40}
    batches = calibration_batches(model, Dataset.from_dict(rows), None, 30, 120, 4, 0)
    assert batches[0]["input_ids"].unique().tolist() == [5, 6, 7]


def test_layers_with_one_input_share_one_covariance():
    model = tiny_model("llama-untied")
    groups, once = shared_inputs(model, tiny_inputs(model), layers_of(model))
    assert once
    assert [name.rpartition(".")[2] for name in groups[0]] == ["q_proj", "k_proj", "v_proj"]
    covariances = collect(model, [tiny_inputs(model)])
    prefix = "model.layers.1"
    assert covariances[f"{prefix}.mlp.gate_proj"] is covariances[f"{prefix}.mlp.up_proj"]
    assert covariances[f"{prefix}.self_attn.q_proj"] is not covariances[f"{prefix}.self_attn.o_proj"]


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama-tied").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    collect(model, [tiny_inputs(model)])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_overflow_of_the_original_is_named():
    model = tiny_model("llama-untied")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite on the calibration data"):
        collect(model, [tiny_inputs(model)])


@pytest.mark.parametrize("family", ["llama-untied", "bert", "vit", "t5", "gpt2"])
def test_output_covariances_are_asked_for_and_cost_the_model_nothing(family):
    model = tiny_model(family)
    batches = [tiny_inputs(model)]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    (part,) = layer_statistics(model, batches, layers_of(model), gradients=True)
    plain = collect(model, batches)
    for name, statistics in part.items():
        torch.testing.assert_close(statistics.h, plain[name])
        if name == "pooler.dense":
            assert statistics.g is None  # the hidden states don't depend on it
            continue
        out_features = layers_of(model)[name].weight.shape[1 if family == "gpt2" else 0]
        assert statistics.g.shape == (out_features, out_features)
        assert float(statistics.g.diagonal().min()) >= 0 and float(statistics.g.trace()) > 0
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


@contextmanager
def watched(layers):
    """See each layer's inputs and gradients, float64, from outside: a pair per call, by name."""
    seen = {name: [] for name in layers}

    def watch(name):
        def hook(module, args, output):
            if output.requires_grad:
                output.register_hook(lambda g: seen[name].append((args[0].detach().double(), g.double())))

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", ["llama-untied", "bert", "gpt2"])
def test_tokens_weigh_as_much_as_their_gradients(family):
    model = tiny_model(family)
    batches = [tiny_inputs(model, seed=seed) for seed in range(2)]
    layers = layers_of(model)
    with watched(layers) as seen:
        (part,) = layer_statistics(model, batches, layers, gradients=True, weigh_tokens=True)
    plain = collect(model, batches)
    assert set(part) == set(plain)
    weighted = 0
    for name, statistics in part.items():
        if not seen[name]:
            assert name == "pooler.dense"
            torch.testing.assert_close(statistics.h, plain[name])
            continue
        x, g = (torch.cat([pair[i].flatten(0, -2) for pair in seen[name]]) for i in (0, 1))
        norm = g.norm(dim=1)
        expected = (x.T * norm) @ x / norm.sum()
        # bfloat16 rounds both factors of a product by at most 2^-9, so by Cauchy-Schwarz that is the most
        bound = 2**-8 * float(expected.diagonal().max())
        assert (statistics.h - expected).abs().max() < bound
        weighted += bool((plain[name] - expected).abs().max() > bound)
        unit = g / norm.clamp(min=1e-30).sqrt()[:, None]
        expected = unit.T @ unit * (norm.square().sum() / norm.sum()) / predictions(batches)
        assert (statistics.g - expected).abs().max() < 2**-8 * float(expected.diagonal().max())
    assert weighted > len(part) / 2  # in most layers that is not what tokens of equal weight give


def predictions(batches):
    """A causal model predicts at every token, and a model of hidden states at each of those."""
    return sum(batch["input_ids"].numel() for batch in batches)


def opt():
    sizes = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=64, **sizes)).eval()


def albert():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return AlbertModel(AlbertConfig(vocab_size=VOCABULARY, embedding_size=64, **sizes)).eval()


@pytest.mark.parametrize("weigh_tokens", [False, True])
@pytest.mark.parametrize("make", [lambda: tiny_model("llama-untied"), opt, albert])
def test_the_loss_of_an_error_is_that_of_whole_samples(make, weigh_tokens):
    """
    1/2 (sum_t g_t^T E x_t)^2 over samples, with each gradient and input seen from outside.

    OPT flattens samples in its MLP, ALBERT calls each layer twice.
    """
    model = make()
    batches = [tiny_inputs(tiny_model("llama-untied"), n=6, seed=seed) for seed in range(2)]
    layers = layers_of(model)
    config = PolarizeConfig("nf4")
    config.resolve(torch.float32)
    backbone = {name: quantize_linear(layer, config) for name, layer in layers.items()}
    options = {"gradients": True, "weigh_tokens": weigh_tokens, "backbone": backbone}
    with watched(layers) as seen:
        (part,) = layer_statistics(model, batches, layers, **options)
    for name, statistics in part.items():
        if not seen[name]:
            assert name == "pooler" and statistics.loss is None  # the hidden states don't depend on it
            continue
        error = (layers[name].weight.detach() - backbone[name].dequantized()).double()
        changes = [((x @ error.T) * g).reshape(6, -1).sum(1) for x, g in seen[name]]
        calls = len(changes) // len(batches)
        whole = torch.stack(changes).view(len(batches), calls, 6).sum(1)
        expected = 0.5 * float(whole.square().sum()) / predictions(batches)
        assert statistics.loss == pytest.approx(expected, rel=0.05)


def test_output_covariance_predicts_the_loss_of_a_small_error():
    """1/2 tr(G E H E^T) against KL(original || model), for an error in the layer before the logits."""
    model = tiny_model("llama-untied")
    name = "model.layers.1.mlp.down_proj"
    batches = [tiny_inputs(model, n=64, seed=seed) for seed in range(4)]
    layers = {name: layers_of(model)[name]}
    (part,) = layer_statistics(model, batches, layers, gradients=True)
    statistics = part[name]
    torch.manual_seed(0)
    weight = model.get_submodule(name).weight
    error = 0.02 * weight.std() * torch.randn_like(weight)
    predicted = 0.5 * float((statistics.g @ error @ statistics.h * error).sum())

    def log_probabilities():
        with torch.no_grad():
            return torch.cat([model(**batch).logits.double().log_softmax(-1).flatten(0, 1) for batch in batches])

    before = log_probabilities()
    weight.data += error
    after = log_probabilities()
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    # the Kronecker factors take inputs and gradients to be independent
    assert predicted == pytest.approx(measured, rel=0.25)


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="PyTorch 2.9 made it a setting")
@pytest.mark.parametrize(
    "dtype, inside", [(torch.float32, "bf16"), (torch.bfloat16, "bf16"), (torch.float16, None), (torch.float64, None)]
)
def test_products_are_in_bfloat16_only_beside_bfloat16(dtype, inside, monkeypatch):
    monkeypatch.setattr("hf_polarize.models.bfloat16_is_fast", lambda device: True)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with pytest.raises(KeyboardInterrupt), bfloat16_products(tiny_model("bert").to(dtype)):
        assert matmul.fp32_precision == (inside or before)
        raise KeyboardInterrupt
    assert matmul.fp32_precision == before

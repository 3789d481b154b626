"""Distillation: losses against their definitions, and a trainer that trains what it is told to and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from conftest import output, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, LlamaForSequenceClassification, TrainingArguments

from hf_polarize import CIMConfig, PolarizeConfig, SurrogateConfig, attach_cim, polarize, save_polarized
from hf_polarize.backbone import backbone_layers
from hf_polarize.cim.hook import reset_reads
from hf_polarize.configuration import ClosedForm
from hf_polarize.data import split
from hf_polarize.distillation import (
    HIDDEN,
    INDICES,
    TOP,
    divergence,
    divergence_of_top,
    hidden_distance,
    shared_head,
    teacher_dataset,
)
from hf_polarize.formats import BackboneLinear4bit
from hf_polarize.surrogate import factors
from hf_polarize.training import PolarizeTrainer, distill, freeze, trainable_parameters

PLAIN = ClosedForm(scale_search=False, alternations=0, gradients=False)


def windows(n=24, seed=1):
    return tiny_inputs(tiny_model("llama-untied"), n=n, seed=seed)["input_ids"]


def make(tmp_path, family="llama-untied", config=None, closed_form=PLAIN, **kwargs):
    """Return a polarized model, and the outputs of its original on data and held-out data."""
    model = tiny_model(family)
    data, held_out = (
        teacher_dataset(model, split(windows(n, seed), 4, model), tmp_path, **kwargs) for n, seed in ((24, 1), (8, 2))
    )
    polarize(model, [tiny_inputs(model)], config or PolarizeConfig("nf4"), SurrogateConfig(r=4), closed_form)
    return model, data, held_out


def arguments(folder, **kwargs):
    return TrainingArguments(
        output_dir=str(folder), report_to=[], seed=0, use_cpu=True, disable_tqdm=True, logging_steps=2,
        **{"per_device_train_batch_size": 4, "learning_rate": 2e-3, "max_steps": 12, "save_steps": 6, **kwargs},
    )  # fmt: skip


def test_divergence_and_its_gradient_are_those_of_the_whole():
    torch.manual_seed(0)
    weight = torch.randn(50, 16, dtype=torch.float64)
    hidden = torch.randn(700, 16, dtype=torch.float64, requires_grad=True)  # three chunks, the last one short
    teacher = torch.randn(700, 16, dtype=torch.float64)
    ours = divergence(hidden, teacher, lambda x: x @ weight.T)
    (gradient,) = torch.autograd.grad(3 * ours, hidden)
    log_p, log_q = ((x @ weight.T).log_softmax(-1) for x in (teacher, hidden))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    (expected_gradient,) = torch.autograd.grad(3 * expected, hidden)
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)  # the head works in float32
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-7)


def test_divergence_of_top_classes_is_exact_with_all_and_a_lower_bound_with_few():
    torch.manual_seed(0)
    p, q = torch.randn(2, 40, 30)
    exact = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    last = 0.0
    for k in (3, 10, 29, 30):
        top = p.log_softmax(-1).topk(k)
        value = float(divergence_of_top(q, top.values, top.indices))
        assert last - 1e-5 < value <= float(exact) + 1e-5
        last = value
    assert last == pytest.approx(float(exact), rel=1e-5)


def test_hidden_distance_is_relative():
    torch.manual_seed(0)
    theirs = torch.randn(9, 5)
    assert float(hidden_distance(theirs * 1.1, theirs)) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("family", ["llama-untied", "gpt2", "bert", "bert-mlm", "vit", "t5"])
def test_the_original_is_kept_on_disk_for_every_family(family, tmp_path):
    model = tiny_model(family)
    batch = tiny_inputs(model, n=3)
    data = teacher_dataset(model, [batch], tmp_path)
    assert len(data) == 3 and list(tmp_path.rglob("*.arrow"))
    columns = data[:]
    for key, value in batch.items():
        assert torch.equal(columns[key], value)
    theirs = output(model, batch)
    if HIDDEN in columns:
        head = shared_head(model)
        ours = columns[HIDDEN] if head is None else head(columns[HIDDEN])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    else:
        log_p = theirs.log_softmax(-1).view(3, -1, theirs.shape[-1])
        torch.testing.assert_close(columns[TOP], log_p.gather(-1, columns[INDICES].long()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama-untied", "bert", "bert-mlm", "t5"])
def test_samples_of_different_length_are_padded_and_padding_does_not_count(family, tmp_path):
    model, other = tiny_model(family), tiny_model(family, seed=1)
    both = ("input_ids", "decoder_input_ids") if family == "t5" else ("input_ids",)
    batches = [
        {key: tiny_inputs(model, n=2, seed=i)["input_ids"][:, :length] for key in both}
        for i, length in enumerate((5, 16))
    ]
    data = teacher_dataset(model, batches, tmp_path)
    assert [len(row["input_ids"]) for row in data] == [5, 5, 16, 16]
    polarize(other, batches, PolarizeConfig("nf4"), SurrogateConfig(r=4), PLAIN)
    trainer = PolarizeTrainer(other, arguments(tmp_path, per_device_eval_batch_size=4))
    found = trainer.evaluate(data)["eval_loss"]
    alone = [  # no padding
        PolarizeTrainer(other, arguments(tmp_path, per_device_eval_batch_size=2)).evaluate(part)["eval_loss"]
        for part in (data.select([0, 1]), data.select([2, 3]))
    ]
    if family == "bert":  # relative to the mean square of the original's states, of all tokens together
        squares = [part["teacher_hidden"][:].square().mean() for part in (data.select([0, 1]), data.select([2, 3]))]
        expected = sum(n * loss * s for n, loss, s in zip((5, 16), alone, squares, strict=True))
        expected = float(expected / sum(n * s for n, s in zip((5, 16), squares, strict=True)))
    else:
        expected = (5 * alone[0] + 16 * alone[1]) / 21
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_classifier_that_looks_for_its_padding_finds_it(tmp_path):
    config = tiny_model("llama-untied").config
    config.update({"pad_token_id": 7, "num_labels": 3})
    model = LlamaForSequenceClassification(config).eval()
    model.score.weight.data.mul_(100)  # else the losses are of the size of rounding
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(8, 60, (2, length), generator=generator)} for length in (5, 16)]
    data = teacher_dataset(model, batches, tmp_path).add_column("label", [0, 1, 2, 0])
    polarize(model, batches, surrogate=SurrogateConfig(r=4), closed_form=PLAIN)
    together, *alone = (
        PolarizeTrainer(model, arguments(tmp_path, per_device_eval_batch_size=4)).evaluate(part)["eval_loss"]
        for part in (data, data.select([0, 1]), data.select([2, 3]))
    )
    assert together == pytest.approx(sum(alone) / 2, rel=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"top_k": 16}])
def test_distilling_brings_the_model_nearer_and_trains_surrogates_alone(tmp_path, kwargs):
    model, data, held_out = make(tmp_path, **kwargs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    record = distill(
        model, data, held_out, tmp_path / "run", epochs=6, learning_rate=5e-3, batch_size=4, bf16=False, patience=9
    )
    assert record["end"] < 0.95 * record["start"]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(".lora_A." in key or ".lora_B." in key for key in changed)


@pytest.mark.parametrize("deflated", [False, True])
def test_on_a_chip_any_chip_is_trained_on_and_the_own_one_is_left(tmp_path, deflated):
    """What is deflated depends on A and R together: there B is trained alone."""
    chip = CIMConfig.preset("noisy", chip_seed=3)
    closed_form = ClosedForm(scale_search=False, alternations=0, gradients=False, deflated=deflated)
    model, data, held_out = make(tmp_path, config=PolarizeConfig("nf4", cim=chip), closed_form=closed_form)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    record = distill(
        model, data, held_out, tmp_path / "run", epochs=4, learning_rate=5e-3, batch_size=4, bf16=False, patience=9
    )
    assert record["end"] < record["start"]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.rpartition(".lora_")[2][0] for key in changed} == ({"B"} if deflated else {"A", "B"})
    reset_reads(model)
    trained = output(model, tiny_inputs(model))
    assert torch.equal(trained, output(attach_cim(model, chip), tiny_inputs(model)))


@pytest.mark.parametrize("double_quant", [False, True])
def test_scales_and_norms_are_trained_inside_the_format(tmp_path, double_quant):
    model, data, held_out = make(tmp_path, config=PolarizeConfig("nf4", double_quant=double_quant))
    record = distill(
        model, data, held_out, tmp_path / "run", train=["surrogate", "scales", "norms"], epochs=4,
        learning_rate=3e-3, batch_size=4, bf16=False, patience=9,
    )  # fmt: skip
    assert record["end"] < record["start"] and set(record["shares"]) == {"surrogate", "scales", "norms"}
    assert all(layer.free is None for _, layer in backbone_layers(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    # what was trained is what a reader gets
    again = AutoModelForCausalLM.from_pretrained(save_polarized(model, tmp_path / "saved"))
    inputs = tiny_inputs(model)
    assert torch.equal(output(again, inputs), output(model, inputs))


def test_the_gradient_of_a_scale_is_that_of_the_dequantized_weight():
    from torch import nn

    from hf_polarize.backbone import quantize_linear

    torch.manual_seed(0)
    config = PolarizeConfig("nf4")
    config.resolve(torch.float32)
    layer = quantize_linear(nn.Linear(128, 24), config).train()
    x = torch.randn(5, 3, 128, requires_grad=True)
    scales = layer.free_scales()
    target = torch.randn(5, 3, 24)
    ours = torch.autograd.grad((layer(x) * target).sum(), [x, scales])
    units = layer._scaled(torch.ones_like(scales))
    free = scales.detach().clone().requires_grad_()
    weight = units * free.repeat_interleave(64).view_as(units)
    expected = torch.autograd.grad((F.linear(x, weight, layer.bias) * target).sum(), [x, free])
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_accumulating_gradients_is_a_larger_batch(tmp_path):
    results = []
    for size, steps in ((8, 1), (2, 4)):
        model, data, _ = make(tmp_path)
        run = PolarizeTrainer(
            model,
            arguments(
                tmp_path / "run", per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=3
            ),
            train_dataset=data,
        )
        run.train()
        results.append(factors(model))
    for name, pair in results[0].items():
        for one, other in zip(pair, results[1][name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("train", [["surrogate"], ["surrogate", "scales", "norms"]])
def test_resuming_gives_the_same_model_as_training_through(tmp_path, train):
    results = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-6")):
        model, data, _ = make(tmp_path)
        run = PolarizeTrainer(model, arguments(tmp_path / "run"), train=train, train_dataset=data)
        run.train(resume_from_checkpoint=resume)
        freeze(model)
        results.append({**model.state_dict()})
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], msg=key)


def test_training_stops_when_held_out_text_gains_nothing(tmp_path):
    model, data, held_out = make(tmp_path)
    run = PolarizeTrainer(
        model,
        arguments(
            tmp_path / "run", max_steps=60, eval_strategy="steps", eval_steps=2, save_steps=2,
            load_best_model_at_end=True, metric_for_best_model="eval_loss",
            greater_is_better=True,  # every evaluation is worse than the one before
        ),
        train_dataset=data, eval_dataset=held_out, callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    run.train()
    assert run.state.global_step < 60


def test_a_training_that_only_does_harm_leaves_the_closed_form(tmp_path):
    model, data, held_out = make(tmp_path)
    before = {name: (a.clone(), b.clone()) for name, (a, b) in factors(model).items()}
    record = distill(model, data, held_out, tmp_path / "run", learning_rate=10.0, bf16=False, patience=1)
    assert record["end"] == record["start"]
    for name, pair in factors(model).items():
        assert all(torch.equal(x, y) for x, y in zip(pair, before[name], strict=True))


def test_held_out_samples_that_fill_no_batch_count_as_well(tmp_path):
    model, data, _ = make(tmp_path)
    original = tiny_model("llama-untied")
    held_out = teacher_dataset(original, split(windows(3, 2), 4, original), tmp_path)
    record = distill(model, data, held_out, tmp_path / "run", micro_batch_size=4, bf16=False)
    assert 0 < record["end"] < record["start"]


def test_the_original_may_stay_in_memory_instead(tmp_path):
    model, data, _ = make(tmp_path)
    losses = []
    for original, rows in ((None, data), (tiny_model("llama-untied"), data.remove_columns(HIDDEN))):
        run = PolarizeTrainer(model, arguments(tmp_path / "run"), original=original, eval_dataset=rows)
        losses.append(run.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(ValueError, match="no outputs of the original model"):
        PolarizeTrainer(model, arguments(tmp_path / "run"), eval_dataset=data.remove_columns(HIDDEN)).evaluate()


def test_hidden_and_layer_terms_add_to_the_loss(tmp_path):
    model, data, held_out = make(tmp_path, closed_form=ClosedForm(scale_search=False, alternations=0))
    fresh = tiny_model("llama-untied")
    polarize(
        fresh, [tiny_inputs(fresh)], PolarizeConfig("nf4"), SurrogateConfig(r=4),
        ClosedForm(scale_search=False, alternations=0), keep_layer_losses=True,
    )  # fmt: skip
    assert set(fresh.layer_losses) == set(factors(fresh))
    record = distill(
        fresh, data, held_out, tmp_path / "run", hidden_weight=0.1, layer_weight=1.0,
        layer_losses=fresh.layer_losses, epochs=2, learning_rate=1e-3, batch_size=4, bf16=False,
    )  # fmt: skip
    assert record["end"] < record["start"]
    with pytest.raises(ValueError, match="layer_weight needs layer_losses"):
        PolarizeTrainer(model, arguments(tmp_path / "run"), layer_weight=1.0)


def test_unknown_parts_are_refused(tmp_path):
    model, _, _ = make(tmp_path)
    with pytest.raises(ValueError, match=r"any of surrogate, scales, norms, biases; got \['scale'\]"):
        trainable_parameters(model, ["scale"])
    assert all(layer.free is None for _, layer in backbone_layers(model) if isinstance(layer, BackboneLinear4bit))


@pytest.mark.parametrize("family", ["bert", "vit", "bert-mlm", "gpt2"])
def test_other_families_are_distilled_as_well(family, tmp_path):
    model = tiny_model(family)
    batches = [tiny_inputs(model, n=4, seed=seed) for seed in range(4)]
    data, held_out = (teacher_dataset(model, part, tmp_path) for part in (batches[:3], batches[3:]))
    polarize(model, batches[:1], PolarizeConfig("nf4"), SurrogateConfig(r=4), PLAIN)
    record = distill(
        model, data, held_out, tmp_path / "run", train=["surrogate", "biases"], epochs=6, learning_rate=2e-3,
        batch_size=4, bf16=False, patience=9,
    )  # fmt: skip
    assert record["end"] < record["start"]

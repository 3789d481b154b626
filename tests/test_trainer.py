"""Plain Trainer: a task loss trains the surrogates and nothing else, saves, resumes; and stacks."""

import pytest
import torch
from conftest import TEXT, output, tiny_inputs, tiny_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from hf_polarize import CIMConfig, ClosedForm, PolarizeConfig, SurrogateConfig, polarize, save_polarized
from hf_polarize.cim.hook import chips, reset_reads
from hf_polarize.surrogate import factors


@pytest.fixture(scope="module")
def dataset(tokenizer):
    return Dataset.from_list([dict(tokenizer(text)) for text in TEXT])


def arguments(folder, **kwargs):
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, learning_rate=5e-3, max_steps=12, save_steps=6,
        logging_steps=3, report_to=[], seed=0, use_cpu=True, disable_tqdm=True, **kwargs,
    )  # fmt: skip


def trainer(model, tokenizer, dataset, folder, **kwargs):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    held_out = dataset.select(range(16)) if kwargs else None
    return Trainer(
        model, arguments(folder, **kwargs), train_dataset=dataset, eval_dataset=held_out, data_collator=collator
    )


def make(how="polarize", backbone="nf4"):
    model = tiny_model("llama-untied")
    if how == "polarize":
        return polarize(model, [tiny_inputs(model)], PolarizeConfig(backbone), SurrogateConfig(r=4))
    model = polarize(model, [tiny_inputs(model)], PolarizeConfig(backbone))
    model.delete_adapter("surrogate")
    torch.manual_seed(0)
    return get_peft_model(model, SurrogateConfig(r=4))


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("how", ["polarize", "get_peft_model"])
@pytest.mark.parametrize("backbone", ["nf4", "int8"])
def test_a_task_loss_trains_the_surrogates_alone(how, backbone, tokenizer, dataset, tmp_path):
    model = make(how, backbone)
    before = snapshot(model)
    run = trainer(model, tokenizer, dataset, tmp_path)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    # every B moves; an A only moves once its B is no longer zero
    assert changed and all(".lora_A." in key or ".lora_B." in key for key in changed)
    assert {key for key in before if ".lora_B." in key} <= changed


@pytest.mark.parametrize("how", ["polarize", "get_peft_model", "from_pretrained"])
def test_resuming_gives_the_same_model_as_training_through(how, tokenizer, dataset, tmp_path):
    if how == "from_pretrained":
        save_polarized(make(), tmp_path / "polarized")

        def start():
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "polarized")
            model.set_adapter("surrogate")
            return model
    else:

        def start():
            return make(how)

    through = start()
    trainer(through, tokenizer, dataset, tmp_path / "run").train()
    resumed = start()
    trainer(resumed, tokenizer, dataset, tmp_path / "run").train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6")
    )
    for (name, one), (_, other) in zip(factors(through).items(), factors(resumed).items(), strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, msg=name)


def test_the_best_step_is_loaded_at_the_end(tokenizer, dataset, tmp_path):
    model = make()
    steps = {"eval_strategy": "steps", "eval_steps": 6, "metric_for_best_model": "eval_loss"}
    run = trainer(model, tokenizer, dataset, tmp_path, load_best_model_at_end=True, greater_is_better=True, **steps)
    run.train()  # the greatest loss is that of the first evaluation
    best = load_file(f"{tmp_path}/checkpoint-6/adapter_model.safetensors")
    assert run.state.best_model_checkpoint.endswith("checkpoint-6")
    for name, (a, _) in factors(model).items():
        assert torch.equal(a, best[f"base_model.model.{name}.lora_A.weight"])


def test_what_was_trained_is_what_is_saved(tokenizer, dataset, tmp_path):
    model = make()
    trainer(model, tokenizer, dataset, tmp_path / "run").train()
    model.eval()
    again = AutoModelForCausalLM.from_pretrained(save_polarized(model, tmp_path / "saved"))
    inputs = tiny_inputs(model)
    assert torch.equal(output(again, inputs), output(model, inputs))


def test_a_plain_trainer_on_a_chip(tokenizer, dataset, tmp_path):
    """It learns for the chip that is attached, resumes, and what is saved is that."""
    chip = CIMConfig.preset("noisy", chip_seed=3)

    def start():
        model = tiny_model("llama-untied")
        config, closed_form = PolarizeConfig(cim=chip), ClosedForm(deflated=True)
        return polarize(model, [tiny_inputs(model)], config, SurrogateConfig(r=4), closed_form)

    through, resumed, untrained = start(), start(), start()
    run = trainer(through, tokenizer, dataset, tmp_path / "run")
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer(resumed, tokenizer, dataset, tmp_path / "run").train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6")
    )
    inputs = tiny_inputs(through)
    for model in (through, resumed, untrained):
        reset_reads(model.eval())
    there = output(through, inputs)
    assert all(chip.config.chip_seed == 3 for _, chip in chips(through)) and len(list(chips(through))) == 14
    after, before = (float((output(model, inputs) - there).norm() / there.norm()) for model in (resumed, untrained))
    assert after < 0.001 * before
    again = AutoModelForCausalLM.from_pretrained(save_polarized(through, tmp_path / "saved"))
    assert again.config.quantization_config.cim.chip_seed == 3
    assert torch.equal(output(again, inputs), there)


def test_evaluation_between_steps_leaves_the_gradients_alone(tokenizer, dataset, tmp_path):
    """bitsandbytes repacks the weights at an inference on some CPUs and would train no more after it."""
    model = make()
    run = trainer(model, tokenizer, dataset, tmp_path, eval_strategy="steps", eval_steps=4)
    run.train()
    evaluations = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 3 and evaluations[-1] < evaluations[0]


def test_a_task_adapter_trains_on_frozen_surrogates(tokenizer, dataset, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_polarized(make(), tmp_path / "polarized"))
    inputs = tiny_inputs(model)
    alone = output(model, inputs)
    before = {name: (a.clone(), b.clone()) for name, (a, b) in factors(model).items()}
    stacked = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trainer(stacked, tokenizer, dataset, tmp_path / "run").train()
    stacked.eval()
    assert all(
        torch.equal(a, before[name][0]) and torch.equal(b, before[name][1])
        for name, (a, b) in factors(stacked).items()
    )
    assert not torch.allclose(output(stacked, inputs), alone)
    with stacked.disable_adapter():
        assert torch.equal(output(stacked, inputs), alone)

    # the user's adapter goes to a folder of its own and comes back on top of the checkpoint
    stacked.save_pretrained(tmp_path / "task", selected_adapters=["default"])
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "polarized")
    fresh.load_adapter(str(tmp_path / "task"), adapter_name="task")
    fresh.set_adapter("task")
    assert torch.equal(output(fresh, inputs), output(stacked, inputs))

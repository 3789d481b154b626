"""
Train a task adapter on a polarized model with plain Trainer, QLoRA style: backbone and surrogates stay frozen.

    python examples/task_adapter.py out/quickstart out/task
"""

import sys

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import hf_polarize  # noqa: F401 (keeps the surrogates active and frozen under the new adapter)

checkpoint, output = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(checkpoint)
model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
model.print_trainable_parameters()

texts = [f"Question: what is {a} plus {b}? Answer: {a + b}." for a in range(12) for b in range(12)]
trainer = Trainer(
    model,
    TrainingArguments(output, max_steps=20, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[]),
    train_dataset=Dataset.from_list([dict(tokenizer(text)) for text in texts]),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
model.save_pretrained(output, selected_adapters=["default"])

fresh = AutoModelForCausalLM.from_pretrained(checkpoint)
fresh.load_adapter(output, adapter_name="task")
fresh.set_adapter("task")
prompt = tokenizer("Question: what is 3 plus 4? Answer:", return_tensors="pt")
print(tokenizer.decode(fresh.generate(**prompt, max_new_tokens=8, do_sample=False)[0]))

"""
Polarize a real model, look at what it cost, save it, and read it back with and without hf_polarize.

    pip install "hf-polarize[demo]"
    python examples/polarize_and_share.py out/example
"""

import sys

import torch
from transformers import AutoModelForCausalLM

from hf_polarize import PolarizeConfig, SurrogateConfig, backbone_only, polarize, save_polarized
from hf_polarize.data import token_windows
from hf_polarize.evaluation import evaluate_causal_lm, gap_recovered, reference_states
from hf_polarize.pipeline import load_model
from hf_polarize.recipe import Recipe
from hf_polarize.sources import load_data

directory = sys.argv[1] if len(sys.argv) > 1 else "out/example"

# any transformers model will do: AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M") needs a network
model, tokenizer = load_model(Recipe(model="demo:smollm2", device="cpu"))

# text that plays no part in making the model
windows = token_windows(load_data("python-docs"), tokenizer, window=512, count=8)
reference = reference_states(model, windows)
original = evaluate_causal_lm(model, windows, reference)

polarize(
    model,
    "self",  # the model writes its own calibration text; a file, a list of strings or a data set will do as well
    PolarizeConfig(backbone="nf4"),
    SurrogateConfig(r=8),
    processor=tokenizer,
    window=256,
    max_tokens=4096,
)
polarized = evaluate_causal_lm(model, windows, reference)
with backbone_only(model):
    backbone = evaluate_causal_lm(model, windows, reference)
print(f"loss: original {original.loss:.3f}, NF4 {backbone.loss:.3f}, polarized {polarized.loss:.3f}")
print(f"gap recovered: {gap_recovered(original, backbone, polarized):.0%}")

save_polarized(model, directory, tokenizer)
again = AutoModelForCausalLM.from_pretrained(directory)  # the same line works where hf_polarize is not installed
with torch.no_grad():
    assert torch.equal(again(windows[:1]).logits, model(windows[:1]).logits)
print(f"saved to {directory}; hf-polarize push {directory} user/name shares it")

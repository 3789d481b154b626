"""What kind of model it is, and how it is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

Batch = dict[str, torch.Tensor]


def full_name(model: PreTrainedModel, layer: str) -> str:
    """
    Return the name of a layer as a model with a head has it, which holds the base model under its prefix.

    `layers.0.mlp` of a `LlamaModel` is `model.layers.0.mlp` of a `LlamaForCausalLM`.
    """
    return f"{model.base_model_prefix}.{layer}" if model.base_model_prefix and model.base_model is model else layer


def to_model(batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
    """Move a batch to the device of a model, and images and the like to its dtype."""
    return {
        key: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for key, value in batch.items()
    }


def bfloat16_is_fast(device: torch.device) -> bool:
    """
    Tell whether a device multiplies bfloat16 matrices faster than float32 ones.

    Of CPUs, those with AMX do. AVX512-BF16 alone is no gain: on a Xeon without AMX SmolLM2's forward pass took 1.36
    times as long under autocast.
    """
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported())
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def mixed_precision(model: PreTrainedModel) -> torch.autocast:
    """Multiply in bfloat16 inside this context, if the model is in float32 and its device is faster that way."""
    device = torch.device(model.device)
    return torch.autocast(
        device.type, torch.bfloat16, enabled=model.dtype == torch.float32 and bfloat16_is_fast(device)
    )


@contextmanager
def bfloat16_products(model: PreTrainedModel) -> Iterator[None]:
    """
    Multiply float32 matrices in bfloat16 on the CPU inside this context, with float32 sums and results.

    For sums over what a model computes in bfloat16, by itself or under [`mixed_precision`]: nothing changes for one
    that computes in another dtype, on other devices, or before PyTorch 2.9. The switch is the whole process's.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    device = torch.device(model.device)
    computed = model.dtype == torch.bfloat16 or (model.dtype == torch.float32 and bfloat16_is_fast(device))
    if matmul is None or device.type != "cpu" or not computed:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def final_states(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collect the final hidden states of the base model's forward passes."""
    states: list[torch.Tensor] = []
    handle = model.base_model.register_forward_hook(lambda module, args, output: states.append(output[0]))
    try:
        yield states
    finally:
        handle.remove()


def is_text_model(model: PreTrainedModel) -> bool:
    return getattr(model, "main_input_name", "input_ids") == "input_ids"


def is_causal_lm(model: PreTrainedModel) -> bool:
    """Tell whether a model predicts the next token of its input: it has an output embedding and looks only back."""
    return (
        is_text_model(model)
        and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        and model.get_output_embeddings() is not None
    )


def tokens_per_sample(model: PreTrainedModel, window: int) -> int:
    """Return the tokens of one sample: of a text window, or the patches of an image."""
    size, patch = getattr(model.config, "image_size", None), getattr(model.config, "patch_size", None)
    if is_text_model(model):
        return window
    return (size // patch) ** 2 + 1 if isinstance(size, int) and isinstance(patch, int) else 197


@contextmanager
def gradients_of_inputs(model: PreTrainedModel) -> Iterator[None]:
    """Let gradients flow through a model from its embeddings on, to no parameter."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(lambda module, args, output: output.requires_grad_(True)))
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()

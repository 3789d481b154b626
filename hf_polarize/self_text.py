"""Calibration text that the original model writes itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.utils import logging

from .models import bfloat16_is_fast, is_causal_lm

SELF = "self"
"""Name of the calibration data that the original model writes itself."""

LIKELIEST = 4
"""Tokens after the first that the model does not sample when it writes its own calibration text."""


def bfloat16_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy with parameters in bfloat16 where that is faster than the float32 of the model; else the model."""
    if model.dtype != torch.float32 or not bfloat16_is_fast(torch.device(model.device)):
        return model
    cast = {id(p): torch.nn.Parameter(p.detach().bfloat16(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, cast)


_CANT_WRITE = (
    f'{{}} can\'t write its own calibration text (data="{SELF}"): {{}}; '
    "give a text file, a list of strings or a data set"
)


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    Draw a class of softmax(logits) for each row, `(n, 1)`, by inverting its distribution.

    torch.multinomial draws a number for every class: a millisecond per row of a vocabulary on a CPU.
    """
    cumulated = logits.float().softmax(-1).cumsum(-1)
    drawn = torch.rand(len(logits), 1, generator=generator).to(logits.device) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, drawn).clamp(max=logits.shape[-1] - 1)


class _Sample(LogitsProcessor):
    """Leave only one next token possible: the first `after` times the likeliest, then one that is drawn."""

    def __init__(self, generator: torch.Generator, after: int) -> None:
        self.generator, self.after = generator, after

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[-1] <= self.after:
            return scores
        return torch.full_like(scores, -torch.inf).scatter(-1, draw(scores, self.generator), 0.0)


@torch.no_grad()
def self_windows(model: PreTrainedModel, window: int, count: int, seed: int, batch_size: int = 128) -> torch.Tensor:
    """
    Let a causal language model write its own calibration text.

    Each window starts with a random word of the vocabulary and its `LIKELIEST` likeliest successors, which find a
    topic for it, and goes on at temperature 1 (LLM-QAT, arXiv 2305.17888, section 2.1). What follows the end of a text
    is the next one, as in pretraining. A chat model that starts from its first token writes mostly fragments.

    Args:
        model (`PreTrainedModel`): the original model.
        window (`int`): tokens per window.
        count (`int`): number of windows.
        seed (`int`): of the sampling; torch's own random state is left as it was.
        batch_size (`int`, defaults to 128): windows written side by side, at most.

    Returns:
        `torch.Tensor` of shape `(count, window)`, int64.
    """
    if not model.can_generate() or not is_causal_lm(model):
        raise ValueError(_CANT_WRITE.format(type(model).__name__, "it is no causal language model"))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(model.config.get_text_config().vocab_size, (count, 1), generator=generator)
    parts: list[torch.Tensor] = []
    writer = bfloat16_copy(model)
    own = writer.generation_config
    with logging.tqdm(total=count * (window - 1), desc="writing calibration text", unit="token") as bar:

        def show(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            bar.update(len(ids))
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # never a reason to stop

        # generate fills gaps from the model's own configuration
        writer.generation_config = GenerationConfig(do_sample=False, max_new_tokens=window - 1, pad_token_id=0)
        try:
            for ids in starts.to(model.device).chunk(-(-count // batch_size)) if window > 1 else ():
                # in one call: a prompt of several tokens makes torch copy the output embedding for each row on a CPU
                written = writer.generate(
                    ids, attention_mask=torch.ones_like(ids), stopping_criteria=[show],
                    logits_processor=[_Sample(generator, LIKELIEST)],
                )  # fmt: skip
                parts.append(written.cpu())
        finally:
            writer.generation_config = own
    return torch.cat(parts) if parts else starts

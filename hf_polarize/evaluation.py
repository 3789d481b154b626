"""How far a polarized model is from the original: loss, perplexity, divergence, and the gap recovered."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import datasets
import evaluate
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .models import Batch, final_states, is_causal_lm, is_text_model, to_model
from .surrogate import core_model

CHUNK = 128
"""Tokens whose logits are in memory at a time."""


@dataclass
class Quality:
    """
    What one model does on one text.

    Attributes:
        loss (`float`): mean negative log-likelihood of a token, nats. For a model that isn't a causal language model:
            the mean distance of its output from the original's (see [`output_distance`]); 0 for the original.
        perplexity (`float`, *optional*): exp(loss), per token; causal language models only.
        kl (`float`, *optional*): mean KL(original || model) per token, nats.
        window_losses (`list[float]`): `loss` of each window, input or batch, for paired comparisons.
    """

    loss: float
    perplexity: float | None
    kl: float | None
    window_losses: list[float] = field(default_factory=list)


@dataclass
class Reference:
    """The original model's final hidden states, `(1, window, hidden)` each, and how it makes logits of them."""

    hidden: list[torch.Tensor]
    head: Callable[[torch.Tensor], torch.Tensor]


def logit_head(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from final hidden states to logits, with the scaling and capping that some families add."""
    embedding = model.get_output_embeddings()
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = embedding(hidden).float() * scale
        return torch.tanh(logits / cap) * cap if cap else logits

    return head


def final_hidden(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def check_head(model: PreTrainedModel, head: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> None:
    """Make sure that hidden states and `logit_head` together are what the model itself computes."""
    short = ids[:, :16].to(model.device)
    with final_states(model) as states:  # of one pass: a noisy chip gives other ones at the next
        own = model(input_ids=short, use_cache=False).logits.float()
    ours = head(states[-1])
    if not torch.allclose(own, ours, rtol=1e-2, atol=1e-2 * float(own.abs().max())):
        raise ValueError(
            f"{type(model).__name__} does more between its hidden states and its logits than this evaluation knows; "
            "use lm-eval for this model"
        )


@torch.no_grad()
def reference_states(model: nn.Module, windows: torch.Tensor) -> Reference:
    """
    Run the original model once and keep its final hidden states, so that it need not stay in memory.

    Args:
        model (`PreTrainedModel`): a causal language model.
        windows (`torch.Tensor` of shape `(n, window)`): token ids.
    """
    core = core_model(model)
    head = logit_head(core)
    check_head(core, head, windows[:1])
    return Reference(
        [
            final_hidden(core, ids[None])
            for ids in logging.tqdm(windows, desc="hidden states of the original", unit="window")
        ],
        head,
    )


@torch.no_grad()
def evaluate_causal_lm(
    model: nn.Module, windows: torch.Tensor, reference: Reference | None = None, desc: str = "evaluating"
) -> Quality:
    """
    Measure token perplexity, and the mean KL(original || model) per token, over windows that don't overlap.

    In each window every token but the first is predicted from those before it in the window, the protocol of papers'
    "WikiText-2 perplexity" (not lm-eval's, which counts words). Logits exist for `CHUNK` tokens at a time.

    Args:
        model (`PreTrainedModel` or `PeftModel`): a causal language model.
        windows (`torch.Tensor` of shape `(n, window)`): token ids.
        reference ([`Reference`], *optional*): of the original model on the same windows; without it `kl` is `None`.
        desc (`str`): label of the progress bar.

    Returns:
        [`Quality`]
    """
    core = core_model(model)
    training = core.training
    core.eval()
    head = logit_head(core)
    check_head(core, head, windows[:1])
    losses, divergence = [], 0.0
    for i, ids in enumerate(logging.tqdm(windows, desc=desc, unit="window")):
        hidden = final_hidden(core, ids[None])[0, :-1]
        targets = ids[1:].to(hidden.device)
        total = 0.0
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            log_q = F.log_softmax(head(hidden[part]), dim=-1)
            total += float(F.nll_loss(log_q, targets[part], reduction="sum"))
            if reference is not None:
                log_p = F.log_softmax(reference.head(reference.hidden[i][0, :-1][part]), dim=-1)
                divergence += float((log_p.exp() * (log_p - log_q)).sum())
        losses.append(total / len(targets))
    core.train(training)
    loss = sum(losses) / len(losses)
    kl = None if reference is None else divergence / (len(losses) * (windows.shape[1] - 1))
    return Quality(loss, math.exp(min(loss, 700.0)), kl, losses)


@dataclass
class Outputs:
    """
    What a model that isn't a causal language model gives for each batch, in bounded memory.

    Attributes:
        values (`list[torch.Tensor]` of shape `(..., features or classes)`): float32 on the CPU. What the output
            embedding takes where there is one (its logits may be 50 times as large), else logits, else hidden states,
            which are averaged over the tokens of an input where batches have an `attention_mask` (embeddings of
            sentences).
        head (`Callable`, *optional*): the output embedding.
        logits (`bool`): whether the model gives logits.
    """

    values: list[torch.Tensor]
    head: Callable[[torch.Tensor], torch.Tensor] | None
    logits: bool

    def log_probabilities(self, values: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(values if self.head is None else self.head(values).float().cpu(), dim=-1)


@torch.no_grad()
def model_outputs(model: nn.Module, batches: Sequence[Batch], desc: str = "evaluating") -> Outputs:
    """Run a model on batches and keep its [`Outputs`]."""
    core = core_model(model)
    embedding = core.get_output_embeddings() if is_text_model(core) else None
    training = core.training
    core.eval()
    values: list[torch.Tensor] = []
    handle = None
    if embedding is not None:
        weight = embedding.weight
        handle = embedding.register_forward_pre_hook(lambda module, args: values.append(args[0].float().cpu()))
    logits = False
    for batch in logging.tqdm(batches, desc=desc, unit="batch"):
        output = core(**to_model(batch, core))
        logits = "logits" in output
        if embedding is None:
            value = (output.logits if logits else output.last_hidden_state).float().cpu()
            values.append(value if logits or "attention_mask" not in batch else _averaged(value, batch))
    core.train(training)
    if handle is None:
        return Outputs(values, None, logits)
    handle.remove()

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = embedding(hidden.to(weight.device, weight.dtype))  # type: ignore[misc]
        return logits

    return Outputs(values, head, logits)


def _averaged(states: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the mean state of each input, `(batch, hidden)`."""
    mask = batch["attention_mask"][..., None].float()
    return (states * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def output_distance(original: Outputs, outputs: Outputs) -> Quality:
    """
    Return the mean KL(original || model) of logits, which is then `kl` as well, or else the mean 1 - cosine.

    `window_losses` are those of the inputs where each has one output (an image, a sentence), else of the batches.
    """
    losses: list[float] = []
    for theirs, ours in zip(original.values, outputs.values, strict=True):
        p, q = theirs.flatten(0, -2), ours.flatten(0, -2)
        parts = []
        for start in range(0, len(p), CHUNK):
            part = slice(start, start + CHUNK)
            if original.logits:
                log_p, log_q = original.log_probabilities(p[part]), outputs.log_probabilities(q[part])
                parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
            else:
                parts.append((1 - F.cosine_similarity(q[part].double(), p[part].double(), dim=-1)).clamp(min=0))
        distances = torch.cat(parts)
        losses += distances.tolist() if theirs.dim() == 2 else [float(distances.mean())]
    loss = sum(losses) / len(losses)
    return Quality(loss, None, loss if original.logits else None, losses)


class HeldOut:
    """
    Held-out data and what the original model says of it, to measure other models by.

    The original's outputs are computed once, when this is made, and kept: final hidden states for a causal language
    model, the outputs themselves for any other.

    Args:
        original (`PreTrainedModel`): in 16 or 32 bits.
        batches (`Sequence[dict[str, torch.Tensor]]`): held-out inputs without padding.

    Attributes:
        original ([`Quality`]): of the original itself.
        seconds (`float`): that measuring it took.
    """

    def __init__(self, original: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.batches = list(batches)
        self.causal = is_causal_lm(original)
        if self.causal:
            self.windows = torch.cat([batch["input_ids"] for batch in batches])
            self.reference = reference_states(original, self.windows)
        else:
            self.outputs = model_outputs(original, self.batches, desc="outputs of the original")
        started = time.monotonic()
        self.original = self.measure(original, "original")
        self.seconds = time.monotonic() - started

    def measure(self, model: nn.Module, desc: str) -> Quality:
        """Return what a model does on the data."""
        if self.causal:
            return evaluate_causal_lm(model, self.windows, self.reference, desc=f"evaluating {desc}")
        return output_distance(self.outputs, model_outputs(model, self.batches, f"evaluating {desc}"))

    def distance(self, model: nn.Module, desc: str) -> float:
        """Return the KL to the original, nats, or where there are no logits the mean distance of the output."""
        quality = self.measure(model, desc)
        return quality.loss if quality.kl is None else quality.kl


class GapRecovered(evaluate.Metric):
    """
    Share of the loss that quantization cost and that a polarized model takes back, in `evaluate`'s own interface.

    gap_recovered = (loss backbone - loss polarized) / (loss backbone - loss original), of the mean losses: 0 for the
    bare backbone, 1 for the original model.

    Example:

    ```python
    GapRecovered().compute(predictions=polarized.window_losses, references=original.window_losses,
                           backbone=backbone.window_losses)
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of the loss gap between a quantized and the original model that is recovered.",
            citation="",
            inputs_description="Losses of the polarized (predictions), original (references) and backbone-only model.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(
        self, predictions: Sequence[float], references: Sequence[float], backbone: Sequence[float]
    ) -> dict[str, float | None]:
        polarized, original, quantized = (sum(x) / len(x) for x in (predictions, references, backbone))
        gap = quantized - original
        return {"gap_recovered": (quantized - polarized) / gap if gap != 0 else None}


def gap_standard_error(original: Quality, backbone: Quality) -> float:
    """Return the paired standard error, over windows, of what quantization cost."""
    gaps = torch.tensor(backbone.window_losses) - torch.tensor(original.window_losses)
    return float(gaps.std() / len(gaps) ** 0.5) if len(gaps) > 1 else math.inf


def gap_recovered(original: Quality, backbone: Quality, polarized: Quality) -> float | None:
    """Return [`GapRecovered`] of three measurements; `None` where quantization cost nothing."""
    result = GapRecovered(keep_in_memory=True).compute(
        predictions=polarized.window_losses,
        references=original.window_losses,
        backbone=backbone.window_losses,
    )
    return result["gap_recovered"]  # type: ignore[no-any-return]

"""What the original model says, kept on disk, and how far another model is from it, chunk by chunk."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .evaluation import check_head, logit_head
from .models import Batch, is_causal_lm, to_model

Head = Callable[[torch.Tensor], torch.Tensor]

CHUNK = 256
"""Tokens whose logits are in memory at a time."""

TOP_K = 128
"""Log-probabilities that are kept of a token where hidden states don't give all of them."""

HIDDEN, TOP, INDICES = "teacher_hidden", "teacher_log_probabilities", "teacher_indices"
MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
TEACHER_COLUMNS = (HIDDEN, TOP, INDICES)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of a loss over tokens; its gradient towards the hidden states is taken chunk by chunk, in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, loss: Callable[[torch.Tensor, slice], torch.Tensor]) -> torch.Tensor:
        needed = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needed else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            with torch.set_grad_enabled(needed):
                chunk = hidden[part].detach().requires_grad_(needed)
                value = loss(chunk, part)
            total += value.detach()
            if gradient is not None:
                (gradient[part],) = torch.autograd.grad(value, chunk)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.gradient * grad_outputs[0], None


def divergence(hidden: torch.Tensor, teacher: torch.Tensor, head: Head) -> torch.Tensor:
    """
    Return the mean KL(original || model) per token, in nats, without all logits in memory at once.

    KL = sum_v p_v (log p_v - log q_v), p of the original. Logits exist for `CHUNK` tokens at a time, forward and
    backward, so that memory does not grow with vocabulary x window.

    Args:
        hidden (`torch.Tensor` of shape `(tokens, hidden)`): final hidden states of the model.
        teacher (`torch.Tensor` of shape `(tokens, hidden)`): those of the original.
        head (`Callable`): from final hidden states to logits; the same for both, and not trained.
    """

    def loss(chunk: torch.Tensor, part: slice) -> torch.Tensor:
        with torch.no_grad():
            log_p = F.log_softmax(head(teacher[part].to(chunk.dtype)).float(), dim=-1)
        log_q = F.log_softmax(head(chunk).float(), dim=-1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum")

    return _ChunkedLoss.apply(hidden, loss) / len(hidden)  # type: ignore[no-any-return]


def divergence_of_top(logits: torch.Tensor, log_p: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """
    Return the mean KL(original || model) per token over the original's k likeliest classes and the rest as one class.

    Args:
        logits (`torch.Tensor` of shape `(tokens, classes)`): of the model.
        log_p (`torch.Tensor` of shape `(tokens, k)`): log-probabilities of the original.
        indices (`torch.Tensor` of shape `(tokens, k)`): their classes.
    """
    log_q = F.log_softmax(logits.float(), dim=-1).gather(-1, indices.long())
    total = (log_p.exp() * (log_p - log_q)).sum(-1)
    if indices.shape[-1] < logits.shape[-1]:
        rest_p, rest_q = ((1 - x.exp().sum(-1)).clamp(min=1e-7) for x in (log_p, log_q))
        total = total + rest_p * (rest_p.log() - rest_q.log())
    return total.mean()


def hidden_distance(hidden: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared distance of hidden states `(tokens, hidden)`, relative to the mean square of theirs."""
    theirs = teacher.float()
    return (hidden.float() - theirs).square().mean() / theirs.square().mean().clamp(min=1e-12)


def shared_head(model: PreTrainedModel) -> Head | None:
    """Return the function from final hidden states to logits, if model and original have the same; else `None`."""
    if not is_causal_lm(model):
        return None
    embedding = model.get_output_embeddings()
    return logit_head(model) if type(embedding) is nn.Linear else None


@torch.no_grad()
def teacher_outputs(original: PreTrainedModel, batch: Batch, top_k: int | None = None) -> dict[str, torch.Tensor]:
    """
    Return what a student needs of the original's outputs on a batch.

    Args:
        original (`PreTrainedModel`): in evaluation mode.
        batch (`dict[str, torch.Tensor]`): inputs, on any device.
        top_k (`int`, *optional*): see [`teacher_dataset`].

    Returns:
        `dict` with `teacher_hidden` `(batch, tokens, hidden)`, or `teacher_log_probabilities` and `teacher_indices`
        `(batch, tokens, k)`; of an original with one output per input, `tokens` is 1.
    """
    arguments = to_model(batch, original)
    if top_k is None and shared_head(original) is not None:
        return {HIDDEN: original.base_model(**arguments, use_cache=False).last_hidden_state}
    result = original(**arguments)
    if "logits" not in result:
        return {HIDDEN: result.last_hidden_state}
    logits = result.logits if result.logits.dim() == 3 else result.logits[:, None]
    top = F.log_softmax(logits.float(), dim=-1).topk(min(top_k or TOP_K, logits.shape[-1]), dim=-1)
    return {TOP: top.values, INDICES: top.indices.to(torch.int32)}


@torch.no_grad()
def teacher_dataset(
    original: PreTrainedModel,
    batches: Sequence[Batch],
    folder: str | Path | None = None,
    top_k: int | None = None,
) -> datasets.Dataset:
    """
    Run the original model once over batches of inputs and keep what it says on disk, so that it need not stay.

    Args:
        original (`PreTrainedModel`): in 16 or 32 bits.
        batches (`Sequence[dict[str, torch.Tensor]]`): inputs without padding; batches may differ in length.
        folder (`str` or `Path`, *optional*): where the Arrow files go; the cache of `datasets` if left out.
        top_k (`int`, *optional*): keep the k largest log-probabilities, float32, of each token, instead of its final
            hidden state. The default is `TOP_K` for a model with logits that is no causal language model.

    Returns:
        `datasets.Dataset` with one row per sample: its inputs, and `teacher_hidden` `(tokens, hidden)`, or
        `teacher_log_probabilities` and `teacher_indices` `(tokens, k)`; float32.
    """
    training = original.training
    original.eval()
    head = shared_head(original)
    if head is not None:
        check_head(original, head, batches[0]["input_ids"][:1])

    def columns(batch: Batch) -> dict[str, torch.Tensor]:
        every = {**batch, **teacher_outputs(original, batch, top_k)}
        return {key: (value.float() if value.is_floating_point() else value).cpu() for key, value in every.items()}

    def rows() -> Iterator[dict[str, Any]]:
        for batch in logging.tqdm(batches, desc="outputs of the original", unit="batch"):
            values = columns(batch)
            for i in range(len(next(iter(values.values())))):
                yield {key: value[i].numpy() for key, value in values.items()}

    ragged = len({tuple(value.shape[1:]) for batch in batches for value in batch.values()}) > 1
    try:
        sample = columns({key: value[:1] for key, value in batches[0].items()})
        data = datasets.Dataset.from_generator(
            rows,
            features=datasets.Features({key: _feature(value[0], ragged) for key, value in sample.items()}),
            cache_dir=None if folder is None else str(folder),
            fingerprint=uuid.uuid4().hex,  # else it would hash the model to look for what it made before
            writer_batch_size=16,
        )
    finally:
        original.train(training)
    return data.with_format("torch")


def _feature(value: torch.Tensor, ragged: bool) -> Any:
    """Return the type of a column, the first dimension of which may differ from row to row."""
    kind = str(value.dtype).removeprefix("torch.")
    if value.dim() == 1:
        return datasets.Sequence(datasets.Value(kind), length=-1 if ragged else len(value))
    shape = (None if ragged else value.shape[0], *value.shape[1:])
    return {2: datasets.Array2D, 3: datasets.Array3D}[value.dim()](shape=shape, dtype=kind)


def padded_batch(samples: Sequence[dict[str, Any]], pad_token_id: int | None = None) -> Batch:
    """
    Stack samples of a data set; where they differ in length, fill them up, and say so in an `attention_mask`.

    Args:
        samples (`Sequence[dict[str, Any]]`): tensors, lists or numbers by name; strings are left out.
        pad_token_id (`int`, *optional*): what ids of tokens are filled up with; everything else is with zeros.
    """
    batch: Batch = {}
    for key, first in samples[0].items():
        if isinstance(first, str) or first is None:
            continue
        values = [torch.as_tensor(sample[key]) for sample in samples]
        if not values[0].dim():
            batch[key] = torch.stack(values)
            continue
        ids = key in MASKS
        batch[key] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=(pad_token_id or 0) * ids)
        sizes = torch.tensor([len(value) for value in values])
        if ids and MASKS[key] not in samples[0] and (sizes != sizes[0]).any():
            batch[MASKS[key]] = (torch.arange(int(sizes.max())) < sizes[:, None]).long()
    return batch

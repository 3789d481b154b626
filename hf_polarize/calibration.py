"""Data in, per-layer statistics out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbone import weight_matrix
from .data import Batch, mixed_precision, to_model

logger = logging.get_logger(__name__)

MEMORY_LIMIT = 2 * 1024**3
"""Bytes of covariances that are collected in one pass over the data."""


class _AllSeen(Exception):
    """Ends a forward pass when the last layer of this pass has seen its input."""


def shared_inputs(
    model: PreTrainedModel, batch: Batch, layers: Mapping[str, nn.Module]
) -> tuple[list[list[str]], bool]:
    """
    Group the layers that are called with the same tensor (q, k and v, say), in the order of their first calls.

    Layers that this batch does not reach (an expert that no token chose) come last, each on its own.

    Returns:
        The groups, and whether every layer was called just once.
    """
    calls = dict.fromkeys(layers, 0)
    inputs: list[torch.Tensor] = []  # held, so that no tensor is freed and its identity given to another
    groups: list[list[str]] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            calls[name] += 1
            for tensor, group in zip(inputs, groups, strict=True):
                if tensor is args[0]:
                    if name not in group:
                        group.append(name)
                    return
            if not any(name in group for group in groups):
                inputs.append(args[0])
                groups.append([name])

        return hook

    handles = [module.register_forward_pre_hook(look(name)) for name, module in layers.items()]
    try:
        run(model, {key: value[:1] for key, value in batch.items()}, layers)
    finally:
        for handle in handles:
            handle.remove()
    seen = {name for group in groups for name in group}
    return groups + [[name] for name in layers if name not in seen], all(number == 1 for number in calls.values())


def run(model: PreTrainedModel, batch: Batch, layers: Mapping[str, nn.Module]) -> None:
    """Run the base model on a batch, or the whole model if one of the layers is in its head."""
    base = model.base_model
    inside = {id(module) for module in base.modules()}
    target = base if all(id(layer) in inside for layer in layers.values()) else model
    arguments = to_model(batch, model)
    if "input_ids" in arguments and getattr(model.config, "use_cache", None) is not None:
        arguments["use_cache"] = False
    target(**arguments)


@dataclass
class Statistics:
    """
    What calibration knows of a layer.

    Attributes:
        h (`torch.Tensor` of shape `(in_features, in_features)`): H = E[x x^T] over tokens, float32.
        magnitude (`torch.Tensor` of shape `(in_features,)`): E|x|, float32.
        g (`torch.Tensor` of shape `(out_features, out_features)`, *optional*):
            G = sum over tokens of g g^T / number of predictions, float32, where g is the gradient of the negative
            log-likelihood, in nats, with respect to the layer's output, for labels that the model itself samples: the
            output side of the true Fisher information (K-FAC, arXiv 1503.05671). `None` where it wasn't asked for, and
            for a layer that the output does not depend on.
    """

    h: torch.Tensor
    g: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None


def layer_statistics(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    memory_limit: int = MEMORY_LIMIT,
    gradient_samples: int = 0,
    seed: int = 0,
) -> Iterator[dict[str, Statistics]]:
    """
    Stream the statistics of each layer, as many layers at a time as fit in memory.

    Layers with the same input share one H. If all of them need more than `memory_limit`, there are several passes over
    the data; without gradients, each stops at its last layer.

    Args:
        model (`PreTrainedModel`): the original model.
        batches (`Sequence[dict[str, torch.Tensor]]`): model inputs without padding.
        layers (`Mapping[str, nn.Module]`): Linear or Conv1D layers by name.
        memory_limit (`int`): bytes of statistics.
        gradient_samples (`int`, defaults to 0): collect G as well, over the first so many samples, one at a time.
        seed (`int`): of the labels that the model samples for G.

    Yields:
        `dict[str, Statistics]`: for the layers of one pass, by name. A layer that no token reached is left out.

    Raises:
        ValueError: If an activation of the model is not finite.
    """
    shapes = {name: weight_matrix(layer).shape for name, layer in layers.items()}
    training = model.training
    model.eval()
    try:
        groups, once = shared_inputs(model, batches[0], layers)
        passes: list[list[list[str]]] = [[]]
        used = 0
        for group in groups:
            size = 4 * shapes[group[0]][1] ** 2
            if gradient_samples:
                size += sum(4 * shapes[name][0] ** 2 for name in group)
            if passes[-1] and used + size > memory_limit:
                passes.append([])
                used = 0
            passes[-1].append(group)
            used += size
        samples = [{key: value[i : i + 1] for key, value in batch.items()} for batch in batches
                   for i in range(len(next(iter(batch.values()))))][:gradient_samples]  # fmt: skip
        total = len(passes) * (len(batches) + len(samples))
        with logging.tqdm(total=total, desc="calibrating", unit="batch") as bar:
            for part in passes:
                stop_early = once and part is not passes[-1]
                inputs = _input_covariances(model, batches, layers, part, stop_early=stop_early, bar=bar)
                names = [name for group in part for name in group]
                outputs = _output_covariances(model, samples, {n: layers[n] for n in names}, seed, bar)
                yield {name: Statistics(h, outputs.get(name), size) for name, (h, size) in inputs.items()}
    finally:
        model.train(training)


@torch.no_grad()
def _input_covariances(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    groups: list[list[str]],
    stop_early: bool,
    bar: Any,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    sums: dict[str, torch.Tensor] = {}
    magnitudes: dict[str, torch.Tensor] = {}
    tokens = dict.fromkeys((group[0] for group in groups), 0)

    def accumulate(name: str, last: bool) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            if name not in sums:
                sums[name], magnitudes[name] = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1])
            sums[name].addmm_(x.T, x)
            magnitudes[name] += x.abs().sum(0)
            tokens[name] += len(x)
            if last and stop_early:
                raise _AllSeen

        return hook

    handles = [
        layers[group[0]].register_forward_pre_hook(accumulate(group[0], last=group is groups[-1])) for group in groups
    ]
    try:
        for batch in batches:
            with suppress(_AllSeen):
                run(model, batch, layers)
            bar.update()
    finally:
        for handle in handles:
            handle.remove()

    result = {}
    for group in groups:
        if not tokens[group[0]]:
            logger.warning("no calibration token reached %s: it is compensated without statistics", ", ".join(group))
            continue
        covariance = sums.pop(group[0]).div_(tokens[group[0]])
        if not torch.isfinite(covariance.diagonal()).all():
            raise ValueError(
                f"the input of {group[0]} is not finite on the calibration data: the original model overflows in "
                f"{model.dtype}; load it in bfloat16 or float32"
            )
        result.update(dict.fromkeys(group, (covariance, magnitudes[group[0]].div_(tokens[group[0]]))))
    return result


def _output_covariances(
    model: PreTrainedModel, samples: Sequence[Batch], layers: Mapping[str, nn.Module], seed: int, bar: Any
) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def accumulate(gradient: torch.Tensor) -> None:
            g = gradient.reshape(-1, gradient.shape[-1]).float()
            if name not in sums:
                sums[name] = g.new_zeros(g.shape[1], g.shape[1])
            sums[name].addmm_(g.T, g)

        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(accumulate)

        return hook

    if not samples:
        return sums
    predictions = 0
    generator = torch.Generator().manual_seed(seed)
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad(), _gradients_of_inputs(model), mixed_precision(model):
            for sample in samples:
                arguments = to_model(sample, model)
                for value in arguments.values():
                    if value.is_floating_point():
                        value.requires_grad_(True)
                loss, count = _sampled_loss(model(**arguments), generator)
                torch.autograd.backward(loss)
                predictions += count
                bar.update()
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / predictions for name, total in sums.items()}


def _sampled_loss(output: Any, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """
    Return -log p(y) summed over predictions, y drawn from the model's own p(y), and the number of predictions.

    A model without logits counts as a normal distribution of unit variance around its normalized hidden states, for
    which an expected -log p of 1/2 |error|^2 is 1 - cosine.
    """
    if "logits" in output:
        logits = output.logits.float().flatten(0, -2)
        labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).to(logits.device)[:, 0]
        return F.cross_entropy(logits, labels, reduction="sum"), len(labels)
    states = F.normalize(output.last_hidden_state.float().flatten(0, -2), dim=-1)
    noise = torch.randn(states.shape, generator=generator).to(states.device)
    return (states * noise).sum(), len(states)


@contextmanager
def _gradients_of_inputs(model: PreTrainedModel) -> Iterator[None]:
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

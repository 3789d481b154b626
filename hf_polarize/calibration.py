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
from .data import Batch, draw, mixed_precision, to_model

logger = logging.get_logger(__name__)

MEMORY_LIMIT = 2 * 1024**3
"""Bytes of covariances that are collected in one pass over the data."""


GRADIENT_TOKENS = 512
"""Tokens whose gradients are in memory at a time."""


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
        h (`torch.Tensor` of shape `(in_features, in_features)`):
            H = E[x x^T] over tokens, float32; or with weights, sum ||g|| x x^T / sum ||g||.
        magnitude (`torch.Tensor` of shape `(in_features,)`, *optional*): E|x|, float32; not with weights.
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
    gradients: bool = False,
    weigh_tokens: bool = False,
    seed: int = 0,
) -> Iterator[dict[str, Statistics]]:
    """
    Stream the statistics of each layer, as many layers at a time as fit in memory.

    Layers with the same input share one H, if tokens count alike. If all of them need more than `memory_limit`, there
    are several passes over the data; without gradients, each stops at its last layer.

    Args:
        model (`PreTrainedModel`): the original model.
        batches (`Sequence[dict[str, torch.Tensor]]`): model inputs without padding.
        layers (`Mapping[str, nn.Module]`): Linear or Conv1D layers by name.
        memory_limit (`int`): bytes of statistics.
        gradients (`bool`, defaults to `False`): collect G as well; `GRADIENT_TOKENS` go through the model at a time.
        weigh_tokens (`bool`, defaults to `False`):
            With gradients, weigh each token of H by the norm of its gradient: tokens count for as much as their errors
            do. The expected loss, 1/2 E[(g^T E x)^2], would weigh them by its square, but gradients are heavy-tailed:
            in early layers a hundredth of the tokens would then be all that counts.
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
        if gradients and weigh_tokens:
            groups = [[name] for group in groups for name in group]
        passes: list[list[list[str]]] = [[]]
        used = 0
        for group in groups:
            size = 4 * shapes[group[0]][1] ** 2
            if gradients:
                size += sum(4 * shapes[name][0] ** 2 for name in group)
            if passes[-1] and used + size > memory_limit:
                passes.append([])
                used = 0
            passes[-1].append(group)
            used += size
        samples = list(_small_batches(batches)) if gradients else []
        total = len(passes) * (len(samples) + (0 if weigh_tokens and gradients else len(batches)))
        with logging.tqdm(total=total, desc="calibrating", unit="batch") as bar:
            for part in passes:
                targets = {name: layers[name] for group in part for name in group}
                weighted, outputs = _gradient_covariances(model, samples, targets, weigh_tokens, seed, bar)
                rest = [group for group in part if group[0] not in weighted]
                stop_early = once and part is not passes[-1]
                plain = _input_covariances(model, batches, layers, rest, stop_early, bar) if rest else {}
                found = {name: Statistics(h, outputs.get(name), size) for name, (h, size) in plain.items()}
                found.update({name: Statistics(h, outputs[name]) for name, h in weighted.items()})
                yield {name: found[name] for name in targets if name in found}
    finally:
        model.train(training)


def _small_batches(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Cut batches to those that a backward pass has memory for."""
    for batch in batches:
        first = next(iter(batch.values()))
        rows = max(1, GRADIENT_TOKENS // (first.shape[-1] if first.dim() == 2 else GRADIENT_TOKENS))
        for start in range(0, len(first), rows):
            yield {key: value[start : start + rows] for key, value in batch.items()}


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
        _check_finite(group[0], covariance, model)
        result.update(dict.fromkeys(group, (covariance, magnitudes[group[0]].div_(tokens[group[0]]))))
    return result


def _gradient_covariances(
    model: PreTrainedModel,
    samples: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    weigh_tokens: bool,
    seed: int,
    bar: Any,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the weighted H, where asked for, and G, of the layers that the output depends on."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}

    def accumulate(name: str, entered: torch.Tensor, gradient: torch.Tensor) -> None:
        g = gradient.reshape(-1, gradient.shape[-1])
        g = g if g.dtype == torch.bfloat16 else g.float()
        if name not in outputs:
            outputs[name] = torch.zeros(g.shape[1], g.shape[1], device=g.device)
        outputs[name] += g.T @ g  # in bfloat16 where the model computed in it
        if weigh_tokens:
            x, norm = entered.reshape(-1, entered.shape[-1]).float(), g.float().norm(dim=1)
            if name not in inputs:
                inputs[name], weights[name] = x.new_zeros(x.shape[1], x.shape[1]), norm.new_zeros(())
            inputs[name].addmm_(x.T * norm, x)
            weights[name] += norm.sum()

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if output.requires_grad:
                entered = args[0].detach()
                output.register_hook(lambda gradient: accumulate(name, entered, gradient))

        return hook

    if not samples:
        return {}, {}
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
    for name, h in inputs.items():
        _check_finite(name, h, model)
    weighted = {name: h.div_(weights[name]) for name, h in inputs.items() if weights[name] > 0}
    return weighted, {name: total.div_(predictions) for name, total in outputs.items()}


def _check_finite(name: str, covariance: torch.Tensor, model: PreTrainedModel) -> None:
    if not torch.isfinite(covariance.diagonal()).all():
        raise ValueError(
            f"the input of {name} is not finite on the calibration data: the original model overflows in "
            f"{model.dtype}; load it in bfloat16 or float32"
        )


def _sampled_loss(output: Any, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """
    Return -log p(y) summed over predictions, y drawn from the model's own p(y), and the number of predictions.

    A model without logits counts as a normal distribution of unit variance around its normalized hidden states, for
    which an expected -log p of 1/2 |error|^2 is 1 - cosine.
    """
    if "logits" in output:
        logits = output.logits.float().flatten(0, -2)
        labels = draw(logits.detach(), generator)[:, 0]
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

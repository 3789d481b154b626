"""Data in, per-layer statistics out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbone import weight_matrix
from .data import Batch, to_model

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


@torch.no_grad()
def input_covariances(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    memory_limit: int = MEMORY_LIMIT,
) -> Iterator[dict[str, torch.Tensor]]:
    """
    Stream H = E[x x^T] of the input of each layer, in float32, as many layers at a time as fit in memory.

    Layers with the same input share one H. If all of them need more than `memory_limit`, there are several passes over
    the data, each of which stops at its last layer.

    Args:
        model (`PreTrainedModel`): the original model.
        batches (`Sequence[dict[str, torch.Tensor]]`): model inputs without padding.
        layers (`Mapping[str, nn.Module]`): Linear or Conv1D layers by name.
        memory_limit (`int`): bytes.

    Yields:
        `dict[str, torch.Tensor]`: for the layers of one pass, H of shape `(in_features, in_features)` by name. A layer
        that no token reached is left out.

    Raises:
        ValueError: If an activation of the model is not finite.
    """
    width = {name: weight_matrix(layer).shape[1] for name, layer in layers.items()}
    training = model.training
    model.eval()
    try:
        groups, once = shared_inputs(model, batches[0], layers)
        passes: list[list[list[str]]] = [[]]
        used = 0
        for group in groups:
            size = 4 * width[group[0]] ** 2
            if passes[-1] and used + size > memory_limit:
                passes.append([])
                used = 0
            passes[-1].append(group)
            used += size
        with logging.tqdm(total=len(passes) * len(batches), desc="calibrating", unit="batch") as bar:
            for part in passes:
                stop_early = once and part is not passes[-1]
                yield _one_pass(model, batches, layers, part, stop_early=stop_early, bar=bar)
    finally:
        model.train(training)


def _one_pass(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    groups: list[list[str]],
    stop_early: bool,
    bar: Any,
) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}
    tokens = dict.fromkeys((group[0] for group in groups), 0)

    def accumulate(name: str, last: bool) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            if name not in sums:
                sums[name] = x.new_zeros(x.shape[1], x.shape[1])
            sums[name].addmm_(x.T, x)
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
        result.update(dict.fromkeys(group, covariance))
    return result

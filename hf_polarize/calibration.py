"""Data in, per-layer statistics out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbone import weight_matrix
from .formats import BackboneLayer
from .models import Batch, bfloat16_is_fast, bfloat16_products, gradients_of_inputs, mixed_precision, to_model

logger = logging.get_logger(__name__)

MEMORY_LIMIT = 2 * 1024**3
"""Bytes of covariances that are collected in one pass over the data."""


GRADIENT_TOKENS = 512
"""Tokens whose gradients are in memory at a time, if no sample has more."""


class _AllSeen(Exception):
    """Ends a forward pass when the last layer of this pass has seen its input."""


@torch.no_grad()
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
            H = E[x x^T] over tokens, float32; or with weights, sum ||g|| x x^T / sum ||g||. Beside gradients, products
            are in bfloat16 and sums in float32 where the model computed in bfloat16 on a CPU.
        g (`torch.Tensor` of shape `(out_features, out_features)`, *optional*):
            G = sum over tokens of g g^T / number of predictions, float32, where g is the gradient with respect to the
            layer's output of a random score, in nats, whose covariance is that of labels that the model itself
            samples: the output side of the true Fisher information (K-FAC, arXiv 1503.05671). With weights,
            g g^T / ||g||, scaled to the same trace. `None` where it wasn't asked for, and for a layer that the output
            does not depend on.
        magnitude (`torch.Tensor` of shape `(in_features,)`, *optional*): E|x|, float32; not with weights.
        loss (`float`, *optional*):
            What the layer's error E alone is expected to cost, 1/2 E[(sum_t g_t^T E x_t)^2], nats per prediction: the
            second-order term of the divergence, of whole samples. Kronecker factors take tokens as independent, which
            is far off where attention mixes them. `None` where there is no G, or E wasn't given.
    """

    h: torch.Tensor
    g: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    loss: float | None = None

    @classmethod
    def unseen(cls, layer: nn.Module) -> Statistics:
        """Return those of a layer that no token reached: all inputs count alike."""
        weight = weight_matrix(layer)
        eye = torch.eye(weight.shape[1], device=weight.device)
        return cls(eye, magnitude=eye.diagonal())


def layer_statistics(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    memory_limit: int = MEMORY_LIMIT,
    gradients: bool = False,
    weigh_tokens: bool = False,
    seed: int = 0,
    backbone: Mapping[str, BackboneLayer] | None = None,
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
        gradients (`bool`, defaults to `False`): collect G, too; `GRADIENT_TOKENS`, or one sample, pass at a time.
        weigh_tokens (`bool`, defaults to `False`):
            With gradients, weigh each token of H and of G by the norm of its gradient: tokens count for as much as
            their errors do. The expected loss, 1/2 E[(g^T E x)^2], would weigh them by its square, but gradients are
            heavy-tailed: in early layers a hundredth of the tokens would then be all that counts.
        seed (`int`): of the random signs for G.
        backbone (`Mapping[str, BackboneLayer]`, *optional*):
            Quantized layers, by name, on the devices of the model's: the losses of their errors are collected as well.

    Yields:
        `dict[str, Statistics]`: for the layers of one pass, by name. A layer that no token reached is left out.

    Raises:
        ValueError: If an activation of the model is not finite.
    """
    shapes = {name: weight_matrix(layer).shape for name, layer in layers.items()}
    fast = model.dtype == torch.bfloat16 or bfloat16_is_fast(torch.device(model.device))
    precision = torch.bfloat16 if fast else torch.float32
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
                size += sum(precision.itemsize * shapes[name].numel() for name in group if name in (backbone or {}))
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
                errors = {
                    name: (weight_matrix(layer).detach().float() - backbone[name].dequantized().float()).to(precision)
                    for name, layer in targets.items()
                    if backbone and samples and name in backbone
                }
                sums, predictions = _gradient_sums(model, samples, targets, errors, weigh_tokens, seed, bar)
                rest = [group for group in part if group[0] not in sums or not weigh_tokens]
                stop_early = once and part is not passes[-1]
                plain = _input_covariances(model, batches, layers, rest, stop_early, bar) if rest else {}
                found = {
                    name: sums[name].statistics(predictions, plain.get(name))
                    if name in sums
                    else Statistics(plain[name][0], magnitude=plain[name][1])
                    for name in targets
                    if name in sums or name in plain
                }
                del sums, plain, errors  # what is yielded is the consumer's to free
                yield found
                del found
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


class _GradientSums:
    """Sums over the tokens of one layer."""

    def __init__(self, weigh_tokens: bool, error: torch.Tensor | None) -> None:
        self.weigh_tokens, self.error = weigh_tokens, error
        self.inputs: torch.Tensor | None = None
        self.outputs: torch.Tensor | None = None
        self.norms = self.squares = self.losses = 0.0
        self.change: torch.Tensor | float = 0.0

    def add(self, entered: torch.Tensor, gradient: torch.Tensor, samples: int) -> None:
        """Take in the inputs `(..., in)` and the gradients `(..., out)` of the tokens of so many samples, in order."""
        x, g = entered.reshape(-1, entered.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        if self.error is not None:
            changes = (x.to(self.error) @ self.error.T).float().mul_(g)
            rows = samples if len(x) % samples == 0 else 1  # tokens that were picked out (experts) can't be told apart
            self.change = self.change + changes.view(rows, -1).sum(1)
        g = g.float()
        if self.outputs is None:
            self.outputs = g.new_zeros(g.shape[1], g.shape[1])
        if self.weigh_tokens:
            norms = g.norm(dim=1)
            roots = norms.sqrt()[:, None]
            g = g / roots.clamp(min=torch.finfo(torch.float32).tiny)
            x = x.float() * roots
            if self.inputs is None:
                self.inputs = x.new_zeros(x.shape[1], x.shape[1])
            self.inputs.addmm_(x.T, x)
            self.norms += float(norms.sum())
            self.squares += float(norms.square().sum())
        self.outputs.addmm_(g.T, g)

    def end_batch(self) -> None:
        """Square what has come together over all tokens of a sample and all calls of the layer."""
        self.losses += 0.5 * float(torch.as_tensor(self.change).square().sum())
        self.change = 0.0

    def statistics(self, predictions: int, plain: tuple[torch.Tensor, torch.Tensor] | None) -> Statistics:
        """Divide by the number of predictions; `plain` are H and E|x| of tokens that count alike."""
        assert self.outputs is not None
        h, magnitude = plain or (None, None)
        g = self.outputs.div_(predictions)
        if self.inputs is not None:
            h, g = self.inputs.div_(self.norms), g.mul_(self.squares / self.norms)
        assert h is not None
        return Statistics(h, g, magnitude, None if self.error is None else self.losses / predictions)


def _gradient_sums(
    model: PreTrainedModel,
    samples: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    errors: Mapping[str, torch.Tensor],
    weigh_tokens: bool,
    seed: int,
    bar: Any,
) -> tuple[dict[str, _GradientSums], int]:
    """Return the sums of the layers that the output depends on, and the number of predictions."""
    sums: dict[str, _GradientSums] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if output.requires_grad:
                entered = args[0].detach()
                if name not in sums:
                    sums[name] = _GradientSums(weigh_tokens, errors.get(name))
                output.register_hook(lambda gradient: sums[name].add(entered, gradient, samples_now))

        return hook

    predictions = samples_now = 0
    generator = torch.Generator().manual_seed(seed)
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()] if samples else []
    try:
        with torch.enable_grad(), gradients_of_inputs(model):
            for sample in samples:
                arguments = to_model(sample, model)
                samples_now = len(next(iter(sample.values())))
                for value in arguments.values():
                    if value.is_floating_point():
                        value.requires_grad_(True)
                with mixed_precision(model):
                    output = model(**arguments)
                outputs, gradient = _random_gradient(output, generator)
                with bfloat16_products(model):
                    torch.autograd.backward(outputs, gradient)
                predictions += gradient.shape[:-1].numel()
                for one in sums.values():
                    one.end_batch()
                bar.update()
    finally:
        for handle in handles:
            handle.remove()
    for name, one in sums.items():
        if one.inputs is not None:
            _check_finite(name, one.inputs, model)
    reached = {name: one for name, one in sums.items() if one.outputs is not None and (one.norms or not weigh_tokens)}
    return reached, predictions


def _check_finite(name: str, covariance: torch.Tensor, model: PreTrainedModel) -> None:
    if not torch.isfinite(covariance.diagonal()).all():
        raise ValueError(
            f"the input of {name} is not finite on the calibration data: the original model overflows in "
            f"{model.dtype}; load it in bfloat16 or float32"
        )


def _random_gradient(output: Any, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return outputs `(..., n)` and a random gradient towards them whose covariance is the Fisher information.

    Towards logits that is diag(p) - p p^T, the covariance of the gradient of -log p(y), y drawn from p. The one
    here is v - p sum(v), v_k = +-sqrt(p_k) with random signs, whose covariance is the same. Its norm varies less from
    token to token than that of drawn labels, of which a rare one gives a large gradient by chance. A model without
    logits counts as a normal distribution of unit variance around its normalized hidden states, for which an expected
    -log p of 1/2 |error|^2 is 1 - cosine.
    """
    if "logits" in output:
        p = output.logits.detach().float().flatten(0, -2).softmax(-1)
        words = torch.empty(len(p), -(-p.shape[1] // 64), dtype=torch.int64)
        words.random_(-(2**63), None, generator=generator)  # 64 signs at a time
        bits = np.unpackbits(words.view(torch.uint8).numpy(), axis=1, count=p.shape[1])
        v = p.sqrt().mul_(torch.from_numpy(bits).to(p.device).view(torch.int8).mul_(2).sub_(1))
        v -= p.mul_(v.sum(-1, keepdim=True))
        return output.logits, v.view(output.logits.shape).to(output.logits.dtype)
    states = F.normalize(output.last_hidden_state.float(), dim=-1)
    return states, torch.randn(states.shape, generator=generator).to(states.device)

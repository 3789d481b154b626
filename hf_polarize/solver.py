"""A plan and statistics in, backbone and surrogates out, chosen on held-out data where there is a choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbone import quantize_linear, weight_matrix
from .calibration import Statistics
from .cim.hook import attach_cim, detach_cim
from .compensation import OUTPUT_DAMPING, Compensation, LayerLoss, compensate, damped
from .configuration import ClosedForm
from .deflation import attach_deflation, deflate
from .evaluation import HeldOut
from .models import Batch
from .plan import Plan, surrogate_copy
from .quantizer import release_memory
from .requantization import requantize
from .rounding import Covariance
from .sensitivity import SensitivityReport, allocate_ranks
from .surrogate import SURROGATE, attach_surrogates, factors

logger = logging.get_logger(__name__)

SIDE_BY_SIDE = 4
"""Layers that are solved at a time on a CPU, at most: of the solver's steps, few can use several threads."""


@dataclasses.dataclass
class Solutions:
    """
    The solved surrogates of a model, each with paths for every rank up to its largest.

    Attributes:
        one_sided (`dict[str, Compensation]`): by layer.
        two_sided (`dict[str, Compensation]`): those that weigh output errors as well; empty where not asked for.
        losses (`dict[str, LayerLoss]`): the predicted loss of each layer, where asked for.
        rounded (`dict[str, float]`): the predicted loss of each layer as the format's own rounding leaves it.
    """

    one_sided: dict[str, Compensation]
    two_sided: dict[str, Compensation]
    losses: dict[str, LayerLoss]
    rounded: dict[str, float]


def solve(
    plan: Plan, statistics: Iterable[dict[str, Statistics]], closed_form: ClosedForm, keep_losses: bool = False
) -> Solutions:
    """Quantize each layer that isn't yet, and solve those that get a surrogate as their statistics come in."""
    found = Solutions({}, {}, {}, {})
    targets = {name: plan.layers[name] for name in plan.ranks}
    largest = solved_ranks(plan, closed_form)

    @torch.no_grad()  # holds for one thread
    def finish(name: str, known: Statistics, inputs: Covariance) -> None:
        weight, layer, rank = weight_matrix(plan.layers[name]).detach(), plan.backbone[name], plan.ranks[name]
        h = inputs.matrix
        g = None if known.g is None else damped(known.g, OUTPUT_DAMPING)
        if g is not None and known.loss is not None:
            found.rounded[name] = known.loss
            error = weight.double() - layer.dequantized().double()
            predicted = 0.5 * float((g @ error @ h * error).sum())
            if known.loss > 0 and predicted > 0:
                g *= known.loss / predicted
        config = plan.quantizer.quantization_config
        if closed_form.deflated and (config.cim is None or config.cim.covers(name, plan.original)):
            found.one_sided[name] = deflate(layer, weight, inputs, rank, largest[name], config, closed_form, g)
            bar.update()
            return
        if closed_form.scale_search or closed_form.alternations:
            outputs = Covariance(g) if closed_form.two_sided and g is not None else None
            requantize(layer, weight, inputs, rank, closed_form.alternations, closed_form.scale_search, outputs)
        error = weight.double() - layer.dequantized().double()
        found.one_sided[name] = compensate(weight, error, h, largest[name], g)
        if closed_form.two_sided and g is not None:
            found.two_sided[name] = compensate(weight, error, h, largest[name], g, two_sided=True)
        if keep_losses and g is not None:
            found.losses[name] = LayerLoss(error, h, g)
        bar.update()

    def finish_all(part: Mapping[str, Statistics]) -> None:
        groups: list[list[tuple[str, Statistics]]] = []
        for name, known in part.items():
            if name in targets:
                if not groups or known.h is not groups[-1][0][1].h:
                    groups.append([])
                groups[-1].append((name, known))

        def finish_group(group: list[tuple[str, Statistics]]) -> None:
            inputs = Covariance(damped(group[0][1].h))
            for name, known in group:
                finish(name, known, inputs)

        with _workers(plan.original.device) as pool:
            for _ in pool.map(finish_group, groups):
                pass

    plan.quantized()
    with logging.tqdm(total=len(targets), desc="solving", unit="layer") as bar:
        for part in statistics:
            finish_all(part)
        finish_all({name: Statistics.unseen(targets[name]) for name in targets if name not in found.one_sided})
    for item in dataclasses.fields(found):  # in the order of the model, whichever was ready first
        values = getattr(found, item.name)
        setattr(found, item.name, {name: values[name] for name in targets if name in values})
    return found


@contextmanager
def _workers(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Share the threads of a CPU between layers that are solved side by side inside this context."""
    threads = torch.get_num_threads()
    count = min(threads, SIDE_BY_SIDE) if device.type == "cpu" else 1
    torch.set_num_threads(threads // count)
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


@dataclasses.dataclass
class Outcome:
    """What was attached to a model, its ranks, what was tried on held-out data, and predicted losses."""

    solutions: dict[str, Compensation]
    ranks: dict[str, int]
    trials: list[dict[str, object]]
    losses: dict[str, LayerLoss]
    sensitivity: SensitivityReport


def carry_out(
    model: PreTrainedModel,
    plan: Plan,
    statistics: Iterable[dict[str, Statistics]],
    closed_form: ClosedForm,
    yardstick: HeldOut | None,
    keep_losses: bool = False,
) -> Outcome:
    """Solve, attach, and decide on the yardstick's held-out data where there is a choice."""
    for layer in plan.backbone.values():
        layer.chip = None  # of the values that it held; its new ones make another
    found = solve(plan, statistics, closed_form, keep_losses)
    ranks = dict(plan.ranks)
    install(model, plan, found.one_sided)
    solutions, trials = found.one_sided, list[dict[str, object]]()
    if yardstick is not None:
        solutions, ranks, trials = choose(model, plan, found, closed_form, yardstick)
    return Outcome(solutions, ranks, trials, found.losses, SensitivityReport.of(solutions, ranks, found.rounded))


@contextmanager
def rounded_backbone(model: PreTrainedModel, plan: Plan, data: Iterable[Batch] | None = None) -> Iterator[None]:
    """
    Run an original with the backbone that bitsandbytes makes of it inside this context, without surrogates.

    It runs on the chip of the plan's configuration, if there is one; `data` is what ranges of its ADC are measured on.
    """
    chip = plan.quantizer.quantization_config.cim
    try:
        for name, module in plan.layers.items():
            model.set_submodule(name, quantize_linear(module, plan.quantizer.quantization_config))
        if chip is not None:
            plan.quantizer.mark(model)
            attach_cim(model, chip, data)
        yield
    finally:
        for name, module in plan.layers.items():
            model.set_submodule(name, module)
        if chip is not None:
            plan.quantizer.remove_quantization_config(model)
        release_memory()


def replayed_losses(model: PreTrainedModel, plan: Plan, held_out: HeldOut) -> dict[str, float]:
    """
    Quantize the weight of one layer at a time and measure what that costs, to judge a [`SensitivityReport`] by.

    Args:
        model (`PreTrainedModel`): the original; left as it was.
        plan ([`~hf_polarize.plan.Plan`]): of [`~hf_polarize.plan.make_plan`].
        held_out ([`~hf_polarize.evaluation.HeldOut`]): a few windows do.

    Returns:
        `dict[str, float]`: the distance to the original, KL in nats where there are logits, by layer.
    """
    costs = {}
    with logging.tqdm(total=len(plan.layers), desc="replaying", unit="layer") as bar:
        for name, module in plan.layers.items():
            weight = weight_matrix(module).data
            kept = weight.clone()
            weight.copy_(quantize_linear(module, plan.quantizer.quantization_config).dequantized())
            try:
                costs[name] = held_out.distance(model, name)
            finally:
                weight.copy_(kept)
            bar.update()
    return costs


def solved_ranks(plan: Plan, closed_form: ClosedForm) -> dict[str, int]:
    """Return up to which rank each layer is solved."""
    if closed_form.allocation == "uniform":
        return plan.ranks
    return {
        name: min(max(rank, closed_form.r_max), *weight_matrix(plan.layers[name]).shape)
        for name, rank in plan.ranks.items()
    }


def truncated(solution: Compensation, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of a lower rank."""
    return solution.a[:rank], solution.b[:, :rank]


def install(model: PreTrainedModel, plan: Plan, solutions: Mapping[str, Compensation]) -> None:
    """Put backbone and surrogates in place; if PEFT refuses the model, leave an original as it was."""
    fresh = plan.original is model
    if fresh:
        for name, layer in plan.backbone.items():
            model.set_submodule(name, layer)
        plan.quantizer.mark(model)
    try:
        attach(model, plan, solutions, plan.ranks)
    except Exception:
        model._hf_peft_config_loaded = False
        if fresh:
            for name, module in plan.layers.items():
                model.set_submodule(name, module)
            plan.quantizer.remove_quantization_config(model)
        raise
    plan.layers.clear()
    release_memory()


def attach(
    model: PreTrainedModel, plan: Plan, solutions: Mapping[str, Compensation], ranks: Mapping[str, int]
) -> None:
    """Attach surrogates of these ranks."""
    config = plan.surrogate
    if ranks != plan.ranks:
        others = {name: rank for name, rank in ranks.items() if rank != config.r}
        config = surrogate_copy(config, rank_pattern=others, alpha_pattern=dict(others))
    attach_surrogates(model, config, {name: truncated(s, ranks[name]) for name, s in solutions.items()})
    attach_deflation(model, {name: s.r[:, : ranks[name]] for name, s in solutions.items() if s.r is not None})


def kind(name: str) -> str:
    """Return what kind of layer a name stands for: its last part."""
    return name.rpartition(".")[2]


def choose(
    model: PreTrainedModel, plan: Plan, found: Solutions, closed_form: ClosedForm, held_out: HeldOut
) -> tuple[dict[str, Compensation], dict[str, int], list[dict[str, object]]]:
    """
    Decide on held-out data which kinds of layers are two-sided, and whether allocated ranks are better.

    Each choice is kept if it brings the model nearer to the original, by KL where there are logits; else the simpler
    one stays. A deflated model runs on its chip for that. The model is left with the result attached.

    Returns:
        The solutions and ranks that were chosen, and for each choice what it is, the distances before and with it, and
        whether it was kept.
    """
    chosen, ranks = dict(found.one_sided), dict(plan.ranks)
    trials: list[dict[str, object]] = []
    chip = plan.quantizer.quantization_config.cim if closed_form.deflated else None

    def measure(what: str) -> float:
        if chip is None:
            return held_out.distance(model, what)
        attach_cim(model, chip, held_out.batches)
        try:
            return held_out.distance(model, what)
        finally:
            detach_cim(model)

    best = measure("deflated, uniform ranks" if closed_form.deflated else "one-sided, uniform ranks")

    def judge(what: str, distance: float) -> bool:
        nonlocal best
        kept = distance < best
        trials.append({"choice": what, "before": best, "with": distance, "kept": kept})
        best = min(best, distance)
        return kept

    def fill(values: Mapping[str, Compensation], names: list[str]) -> None:
        pairs = factors(model)
        for name in names:
            for factor, value in zip(pairs[name], truncated(values[name], ranks[name]), strict=True):
                factor.data.copy_(value)

    for one in sorted({kind(name) for name in found.two_sided}):
        names = [name for name in found.two_sided if kind(name) == one]
        fill(found.two_sided, names)
        if judge(f"two-sided {one}", measure(f"two-sided {one}")):
            chosen.update({name: found.two_sided[name] for name in names})
        else:
            fill(found.one_sided, names)

    if closed_form.allocation == "sensitivity":
        report = SensitivityReport.of(chosen, ranks)
        budget = sum(layer.rank * sum(layer.shape) for layer in report.layers)
        allocated = {**ranks, **allocate_ranks(report.layers, budget, closed_form.r_max)}
        model.delete_adapter(SURROGATE)
        attach(model, plan, chosen, allocated)
        if judge("ranks by sensitivity", measure("ranks by sensitivity")):
            ranks = allocated
        else:
            model.delete_adapter(SURROGATE)
            attach(model, plan, chosen, ranks)
    return chosen, ranks, trials

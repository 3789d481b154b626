"""A model and data in, a polarized model out."""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .calibration import MEMORY_LIMIT, layer_statistics
from .cim.hook import attach_cim, cells_of
from .compensation import Compensation
from .configuration import ClosedForm, PolarizeConfig, SurrogateConfig
from .data import calibration_batches, lengths, lines_per_window, spread
from .deflation import check_deflated, deflated_on_chip, fit_to_chip
from .evaluation import HeldOut
from .models import Batch, is_text_model
from .plan import check_original, make_plan
from .solver import carry_out
from .surrogate import core_model

logger = logging.get_logger(__name__)


def polarize(
    model: PreTrainedModel,
    data: Any,
    config: PolarizeConfig | None = None,
    surrogate: SurrogateConfig | None = None,
    closed_form: ClosedForm | None = None,
    *,
    original: PreTrainedModel | None = None,
    processor: Any = None,
    window: int = 512,
    max_tokens: int = 16384,
    batch_size: int = 4,
    seed: int = 0,
    text_column: str | None = None,
    lines: bool = False,
    memory_limit: int = MEMORY_LIMIT,
    held_out: list[Batch] | None = None,
    keep_layer_losses: bool = False,
) -> PreTrainedModel:
    """
    Polarize a model in one call: calibrate, solve, attach.

    The original model is run on the data and the covariance of each layer's input is collected. Each layer's codes
    and scales are chosen for those inputs, inside the format (see [`~hf_polarize.requantization.requantize`]), and
    what is left of its quantization error is compensated by the rank-r path that is best for them (see
    [`~hf_polarize.compensation.compensate`]). The paths are attached as one PEFT adapter named "surrogate".

    Args:
        model (`PreTrainedModel`):
            The original model, which is quantized in place; or one that was loaded with a [`PolarizeConfig`], which
            gets its surrogates in place.
        data: `"self"` (text that the original model writes itself), the path of a text file, a list of strings, a
            `datasets.Dataset` of text, tokens, pixels or images, or a list of batches.
        config ([`PolarizeConfig`], *optional*): for an original model; the default is NF4. A model that has a backbone
            keeps the one it has.
        surrogate ([`SurrogateConfig`], *optional*): the default has rank 8.
        closed_form ([`ClosedForm`], *optional*): the switches of the solver.
        original (`PreTrainedModel`, *optional*): for a model that has a backbone: the model it was made from. Left
            out, it is loaded from `model.name_or_path`, in the dtype of its checkpoint.
        processor (*optional*): tokenizer or image processor of the model, for text or image data. Left out, it is
            loaded from `model.name_or_path` where that names a model.
        window (`int`, defaults to 512): tokens per calibration window.
        max_tokens (`int`, defaults to 16384): calibration tokens, in whole windows spread evenly over the data.
        batch_size (`int`, defaults to 4): windows per batch.
        seed (`int`, defaults to 0): of the text for `"self"` and of random signs; everything else is deterministic.
        text_column (`str`, *optional*): of a data set; the first column of strings if left out.
        lines (`bool`, defaults to `False`): each line of a text, or of the rows of a data set, is an input of its own,
            cut to `window`: for encoders of sentences. Windows per batch and held out then mean as many tokens.
        memory_limit (`int`, defaults to 2 GiB): bytes of covariances at a time. More passes if it is small.
        held_out (`list`, *optional*): batches to choose by, where `closed_form` leaves a choice; kept back from the
            data if left out.
        keep_layer_losses (`bool`, defaults to `False`): leave a [`~hf_polarize.compensation.LayerLoss`] of each layer
            in `model.layer_losses`, for [`PolarizeTrainer`]; they take the memory of all statistics.

    Returns:
        `PreTrainedModel`: the same object, with a backbone and trainable surrogates. How it was made, each layer's
        relative output error before and after, and its predicted loss, are in `model.polarization`.

    Raises:
        ValueError: Before any work, if the model or the data can't be polarized like that.
    """
    started = time.monotonic()
    check_window(window, max_tokens)
    plan = make_plan(model, config, surrogate, original)
    closed_form = closed_form or ClosedForm()
    if closed_form.deflated:
        check_deflated(plan.quantizer.quantization_config)
    processor = processor or load_processor(model)
    training = plan.original.training
    plan.original.eval()
    yardstick: HeldOut | None = None
    held_back = held_out or []
    try:
        batches = calibration_batches(
            plan.original, data, processor, window, max_tokens, batch_size, seed, text_column, lines
        )
        if closed_form.chooses:
            if not held_back:
                per_window = lines_per_window(lengths(batches), window) if lines else 1
                batches, held_back = hold_out(batches, closed_form.held_out * per_window)
            yardstick = HeldOut(plan.original, held_back)
        statistics = layer_statistics(
            plan.original, batches, {name: plan.layers[name] for name in plan.ranks}, memory_limit,
            closed_form.gradients, closed_form.weigh_tokens, seed, plan.quantized(),
        )  # fmt: skip
        chip = plan.quantizer.quantization_config.cim
        done = carry_out(model, plan, statistics, closed_form, yardstick, keep_layer_losses)
        if chip is not None:
            attach_cim(model, chip, batches)
    finally:
        plan.original.train(training)
    model.polarization = {
        "provenance": {
            "base_model": public_name(model.config._name_or_path),
            "method": "closed form",
            "closed_form": dataclasses.asdict(closed_form),
            "choices": done.trials,
            "calibration": {
                **describe_calibration(data, batches, window, lines, seed),
                "held_out_samples": count_samples(held_back),
            },
            "seconds": round(time.monotonic() - started, 1),
            "torch": torch.__version__,
        },
        "layers": {name: layer_record(solution, done.ranks[name]) for name, solution in done.solutions.items()},
    }
    model.sensitivity = done.sensitivity
    model.layer_losses = done.losses
    return model


def calibrate_to_chip(
    model: nn.Module,
    original: PreTrainedModel,
    data: Any,
    closed_form: ClosedForm | None = None,
    *,
    codes: bool = False,
    processor: Any = None,
    window: int = 512,
    max_tokens: int = 16384,
    batch_size: int = 4,
    seed: int = 0,
    text_column: str | None = None,
    lines: bool = False,
    memory_limit: int = MEMORY_LIMIT,
) -> None:
    """
    Fit the surrogates of a deflated model to the one chip that it is attached to, measured.

    It is for a model that [`polarize`] made for any such chip, trained or not; see
    [`~hf_polarize.deflation.fit_to_chip`] for what is solved. Every chip begins with that model: one that was fitted,
    or whose fitting was interrupted, is refused. Inputs are those of the original, whose norms training may have
    changed.

    Args:
        model (`PreTrainedModel` or `PeftModel`): deflated and on a chip; changed in place.
        original (`PreTrainedModel`): the one that it was made from.
        data: as [`polarize`] takes it.
        closed_form ([`ClosedForm`], *optional*): its `gradients`, `weigh_tokens`, `two_sided`; that of [`polarize`]
            if left out.
        codes (`bool`, defaults to `False`): write the array anew as well, as program-and-verify does, for cells that
            were measured one by one. The backbone is right on that chip only then.
        processor, window, max_tokens, batch_size, seed, text_column, lines, memory_limit: as [`polarize`] takes them.

    Raises:
        ValueError: Before any work, if no layer on a chip is deflated, the model was fitted before, the original is
            another model, or the data can't be used like that.
    """
    check_window(window, max_tokens)
    core, layers = core_model(model), deflated_on_chip(model)
    record: dict[str, Any] = getattr(core, "polarization", None) or {}
    provenance: dict[str, Any] = record.setdefault("provenance", {})
    if "chip" in provenance:
        raise ValueError(
            "the model was fitted to a chip already, or its fitting was interrupted: begin with the model that was "
            "made for any chip"
        )
    check_original(original, core, layers)
    names = provenance.get("base_model"), public_name(original.config._name_or_path)
    if None not in names and names[0] != names[1]:
        logger.warning(f"the model was made from {names[0]}, and the original that is given is {names[1]}")
    known = provenance.get("closed_form", {})
    form = closed_form or ClosedForm(
        **{key: known[key] for key in ("gradients", "weigh_tokens", "two_sided") if key in known}, deflated=True
    )
    linear = {name: original.get_submodule(name) for name in layers}
    training = original.training
    original.eval()
    try:
        batches = calibration_batches(
            original, data, processor or load_processor(original), window, max_tokens, batch_size, seed, text_column,
            lines,
        )  # fmt: skip
        gradients = form.gradients and (form.weigh_tokens or form.two_sided)
        parts = layer_statistics(original, batches, linear, memory_limit, gradients, form.weigh_tokens, seed)
        statistics = itertools.chain([next(parts)], parts)  # what can't be measured is refused before a layer changes
        provenance["chip"] = {
            "cim": cells_of(core.config.quantization_config.cim),
            "codes": codes,
            "calibration": describe_calibration(data, batches, window, lines, seed),
        }
        record.pop("results", None)
        record["layers"] = {}
        core.polarization, core.sensitivity, core.layer_losses = record, None, None
        fit_to_chip(model, linear, statistics, batches, form.two_sided, codes)
    finally:
        original.train(training)


def check_window(window: int, max_tokens: int) -> None:
    """Raise if not a single window is to be used."""
    if not 1 <= window <= max_tokens:
        raise ValueError(f"max_tokens must hold at least one window; got window={window}, max_tokens={max_tokens}")


def describe_calibration(data: Any, batches: list[Batch], window: int, lines: bool, seed: int) -> dict[str, Any]:
    """Return what is kept of the data of a calibration."""
    return {
        "source": describe(data),
        "tokens": sum(batch["input_ids"].numel() for batch in batches) if "input_ids" in batches[0] else None,
        "samples": count_samples(batches),
        "window": window,
        "lines": lines,
        "seed": seed,
    }


def layer_record(solution: Compensation, rank: int) -> dict[str, Any]:
    """Return what is kept of a layer's solution."""
    record = {"rank": rank, "error_before": solution.errors[0], "error_after": solution.errors[rank]}
    if solution.gains is None or solution.loss_before is None:
        return record
    after = solution.loss_before - sum(solution.gains[:rank])
    return {**record, "loss_before": solution.loss_before, "loss_after": after}


def count_samples(batches: list[Batch]) -> int:
    return sum(len(next(iter(batch.values()))) for batch in batches)


def hold_out(batches: list[Batch], samples: int) -> tuple[list[Batch], list[Batch]]:
    """
    Keep samples back, spread evenly over the batches.

    Raises:
        ValueError: If that leaves less than half for calibration.
    """
    total = count_samples(batches)
    if total < 2 * samples:
        raise ValueError(
            f"choosing on held-out data keeps {samples} samples back, and the calibration data has {total}: give "
            "more, or a smaller held_out"
        )
    return parted(batches, samples)


def parted(batches: list[Batch], samples: int) -> tuple[list[Batch], list[Batch]]:
    """Return batches without so many samples, spread evenly over them, and batches of these."""
    chosen = set(spread(range(count_samples(batches)), samples))
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    start = 0
    for batch in batches:
        size = len(next(iter(batch.values())))
        rows = torch.tensor([start + i in chosen for i in range(size)])
        for part, mask in zip(parts, (~rows, rows), strict=True):
            if mask.any():
                part.append({key: value[mask] for key, value in batch.items()})
        start += size
    return parts


def public_name(name: str | None) -> str | None:
    """Return a name if it can be a Hub id, and nothing of a local path."""
    if not name or Path(name).exists() or name.startswith("."):
        return None
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def describe(data: Any) -> str:
    """Say in a word what the calibration data was, without a path."""
    if isinstance(data, (str, Path)):
        return Path(data).name
    return f"{type(data).__name__} of {len(data)}" if hasattr(data, "__len__") else type(data).__name__


def load_processor(model: PreTrainedModel) -> Any:
    """Load the tokenizer or image processor beside a model, or return `None` where there is none."""
    name = model.config._name_or_path
    if not name:
        return None
    try:
        return (AutoTokenizer if is_text_model(model) else AutoImageProcessor).from_pretrained(name)
    except (OSError, ValueError):
        return None

"""hf-polarize bench: how long a model takes, polarized or not, on a chip and off it."""

from __future__ import annotations

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbone import quantize_linear
from .checkpoint import write_json
from .cim.array import INTEGERS_ARE_FAST
from .cim.configuration import CIMConfig
from .cim.hook import OnChip, chips, off_chip
from .cim.presets import PRESETS
from .configuration import ClosedForm, PolarizeConfig
from .data import calibration_batches
from .deflation import check_deflated
from .models import Batch, to_model, tokens_per_sample
from .pipeline import load_model
from .plan import make_plan
from .polarization import polarize
from .recipe import Recipe
from .report import markdown_table
from .sources import load_data
from .surrogate import backbone_only

MODEL_ROUNDS, LAYER_ROUNDS = 9, 25
"""Timings of which the median is taken."""
SIZE, TOKENS = 768, 64
"""Of the layer that chips of all kinds are timed on."""

Way = tuple[Callable[[], AbstractContextManager[Any]], Callable[[], object]]


def in_turns(ways: Mapping[str, Way], rounds: int, device: torch.device, desc: str) -> dict[str, float]:
    """
    Time several ways of doing something, one after the other in each round, and return the median of each.

    Args:
        ways (`Mapping[str, tuple[Callable, Callable]]`): by name, a context that is not timed, and what is.
        rounds (`int`): after one that warms up.
        device (`torch.device`): that is waited for.
        desc (`str`): of the progress bar.

    Returns:
        `dict[str, float]`: seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode(), logging.tqdm(total=(rounds + 1) * len(ways), desc=desc, unit="call") as bar:
        for number in range(rounds + 1):
            for name, (context, call) in ways.items():
                with context():
                    _wait(device)
                    started = time.perf_counter()
                    call()
                    _wait(device)
                    if number:
                        seconds[name].append(time.perf_counter() - started)
                bar.update()
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def bench_recipe(recipe: Recipe, command: str = "") -> dict[str, Any]:
    """
    Time a recipe's model and chips of all kinds; leave `bench.json` and `bench.md` in the recipe's folder.

    The model runs one sample of its evaluation data. It is polarized on that sample alone, in the quickest way: its
    values are of no use, its time is that of any.

    Args:
        recipe ([`~hf_polarize.recipe.Recipe`]): with `cim`, the model is timed on that chip as well.
        command (`str`): how to run it again.

    Returns:
        `dict`: the content of `bench.json`, times in seconds.

    Raises:
        ValueError: If the recipe can't be.
    """
    if recipe.deflated:
        check_deflated(recipe.polarize_config())
    folder = Path(recipe.output_dir)
    data = load_data(recipe.evaluation)
    model, processor = load_model(recipe)
    make_plan(model, recipe.polarize_config(), recipe.surrogate_config())
    window = recipe.evaluation_window
    batch = calibration_batches(model, data, processor, window, window, 1, 0, recipe.evaluation_column)[0]
    record = {
        "recipe": asdict(recipe),
        "machine": machine(model.device),
        "tokens": tokens_per_sample(model, next(iter(batch.values())).shape[-1]),
        **time_model(recipe, model, batch),
        "layer": time_layer(recipe.chip(), model.device),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "bench.json", record)
    (folder / "bench.md").write_text(_text(record, recipe, command), encoding="utf-8")
    return record


def machine(device: torch.device) -> str:
    """Return what it runs on, in words."""
    name = f"{torch.get_num_threads()} threads of a CPU with {torch.backends.cpu.get_cpu_capability()}"
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    elif INTEGERS_ARE_FAST:
        name += " and VNNI"
    return f"{name}, torch {torch.__version__}"


def time_model(recipe: Recipe, model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """Return the seconds of a batch for each way to run a recipe's model, and what of it runs exactly on its chip."""
    polarized = copy.deepcopy(model)
    quick = ClosedForm(scale_search=False, alternations=0, gradients=False, deflated=recipe.deflated)
    polarize(polarized, [batch], recipe.polarize_config(), recipe.surrogate_config(), quick)
    given = to_model(batch, model)

    def within(*contexts: Callable[[Any], AbstractContextManager[Any]]) -> Callable[[], ExitStack]:
        def enter() -> ExitStack:
            stack = ExitStack()
            for context in contexts:
                stack.enter_context(context(polarized))
            return stack

        return enter

    ways: dict[str, Way] = {
        "original": (nullcontext, lambda: model(**given)),
        "backbone": (within(off_chip, backbone_only), lambda: polarized(**given)),
        "polarized": (within(off_chip), lambda: polarized(**given)),
    }
    exact = {}
    if recipe.chip() is not None:
        ways["backbone, on the chip"] = (within(backbone_only), lambda: polarized(**given))
        ways["polarized, on the chip"] = (within(), lambda: polarized(**given))
        exact = {name: _why(chip) for name, chip in chips(polarized) if chip.exact}
    return {"model": in_turns(ways, MODEL_ROUNDS, model.device, "timing the model"), "exact_layers": exact}


def _why(chip: OnChip) -> str:
    return "model: exact" if chip.config.model == "exact" else str(chip.reason)


def time_layer(own: CIMConfig | None, device: torch.device) -> dict[str, Any]:
    """Return, for each kind of chip, the seconds of an INT8 layer in both models beside those of torch in float32."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, SIZE, generator=generator).to(device) for n in (SIZE, TOKENS))
    linear = nn.Linear(SIZE, SIZE, bias=False, device=device)
    linear.weight.data.copy_(weight)
    layer = quantize_linear(linear, PolarizeConfig(backbone="int8"))
    kinds = {name: CIMConfig.preset(name) for name in PRESETS}
    if own is not None and own.on_grid and own not in kinds.values():
        kinds["the recipe's own"] = own.replace(adc_range="full", ranges={})
    ways: dict[str, Way] = {"torch": (nullcontext, lambda: linear(x))}
    invalid = {}
    for name, kind in kinds.items():
        for way in ("exact", "fast"):
            try:
                chip = OnChip(layer, name, kind.replace(model=way))
            except ValueError as error:
                invalid[name, way] = str(error)
            else:
                ways[f"{name}, {way}"] = (nullcontext, lambda chip=chip: chip.product(x))  # type: ignore[misc]
    seconds = in_turns(ways, LAYER_ROUNDS, device, "timing a layer")
    found = {
        name: {way: invalid.get((name, way), seconds.get(f"{name}, {way}", 0.0)) for way in ("exact", "fast")}
        for name in kinds
    }
    return {"torch": seconds["torch"], "chips": found}


def _text(record: dict[str, Any], recipe: Recipe, command: str) -> str:
    times, layer = record["model"], record["layer"]
    rows = []
    for name, seconds in times.items():
        on, _, there = name.partition(", on the chip")
        ratios = [f"{seconds / times['original']:.2f}", f"{seconds / times[on]:.2f}" if name != on else there]
        rows.append([name, _milliseconds(seconds), *ratios])
    name = recipe.source()[2].rpartition("/")[2]
    parts = [
        f"# How long {name} takes\n\n`{command}`",
        f"Medians of calls in turns; {record['machine']}, {recipe.dtype}.",
        f"## A sample of {record['tokens']} tokens, {recipe.backbone.upper()}, rank {recipe.r}",
        markdown_table(["", "ms", "times the original", "times itself off the chip"], rows),
    ]
    if recipe.cim is not None:
        exact = Counter(record["exact_layers"].values())
        reasons = "".join(f"; {count} layers run exactly: {why}" for why, count in exact.items())
        parts.append(f"The chip: {recipe.cim}{', deflated' if recipe.deflated else ''}{reasons}.")
    rows = [["torch", _milliseconds(layer["torch"]), "1.0", "", ""]]
    for kind, both in layer["chips"].items():
        cells = [
            cell
            for t in both.values()
            for cell in ((_milliseconds(t), f"{t / layer['torch']:.1f}") if isinstance(t, float) else ("", ""))
        ]
        rows.append([kind, *cells])
    parts += [
        f"## An INT8 layer, {SIZE} x {SIZE}, {TOKENS} tokens, beside torch's linear layer in float32",
        markdown_table(["chip", "exact, ms", "times torch", "fast, ms", "times torch"], rows),
        "With the full range of the ADC; empty where the fast model is not valid.",
    ]
    return "\n\n".join(parts) + "\n"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.{0 if seconds >= 0.1 else 2}f}"

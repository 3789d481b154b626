"""hf-polarize bench: how long a model takes, polarized or not, on a chip and off it."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .backbone import quantize_linear
from .checkpoint import write_json
from .cim.configuration import PRESETS, CIMConfig
from .cim.hook import OnChip, chips, off_chip
from .configuration import ClosedForm, PolarizeConfig
from .data import calibration_batches
from .models import to_model
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


def in_turns(ways: Mapping[str, Way], rounds: int, desc: str) -> dict[str, float]:
    """
    Time several ways of doing something, one after the other in each round, and return the median of each.

    Args:
        ways (`Mapping[str, tuple[Callable, Callable]]`): by name, a context that is not timed, and what is.
        rounds (`int`): after one that warms up.
        desc (`str`): of the progress bar.

    Returns:
        `dict[str, float]`: seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode(), logging.tqdm(total=(rounds + 1) * len(ways), desc=desc, unit="call") as bar:
        for number in range(rounds + 1):
            for name, (context, call) in ways.items():
                with context():
                    _wait()
                    started = time.perf_counter()
                    call()
                    _wait()
                    if number:
                        seconds[name].append(time.perf_counter() - started)
                bar.update()
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def bench_recipe(recipe: Recipe, command: str = "") -> dict[str, Any]:
    """
    Time a recipe's model and chips of all kinds; leave `bench.json` and `bench.md` in the recipe's folder.

    The model runs one window of `evaluation_window` tokens. It is polarized on that window alone, in the quickest way:
    its values are of no use, its time is that of any.

    Args:
        recipe ([`~hf_polarize.recipe.Recipe`]): with `cim`, the model is timed on that chip as well.
        command (`str`): how to run it again.

    Returns:
        `dict`: the content of `bench.json`, times in seconds.
    """
    folder = Path(recipe.output_dir)
    data = load_data(recipe.evaluation)
    model, processor = load_model(recipe)
    make_plan(model, recipe.polarize_config(), recipe.surrogate_config())
    window = recipe.evaluation_window
    batch = calibration_batches(model, data, processor, window, window, 1, 0, recipe.evaluation_column)[0]
    record: dict[str, Any] = {"recipe": asdict(recipe), "machine": machine(model.device)}
    record["layer"] = time_layer(recipe.chip(), model.device)
    record |= time_model(recipe, model, batch)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "bench.json", record)
    (folder / "bench.md").write_text(_text(record, recipe, command), encoding="utf-8")
    return record


def machine(device: torch.device) -> str:
    """Return what it runs on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def time_model(recipe: Recipe, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
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
        exact = {name: chip.reason for name, chip in chips(polarized) if chip.exact}
    return {"model": in_turns(ways, MODEL_ROUNDS, "timing the model"), "exact_layers": exact}


def time_layer(own: CIMConfig | None, device: torch.device) -> dict[str, dict[str, float | str]]:
    """Return, for each kind of chip, the seconds of an INT8 layer in both models beside those of torch in float32."""
    linear = nn.Linear(SIZE, SIZE, bias=False).to(device)
    layer = quantize_linear(linear, PolarizeConfig(backbone="int8"))
    x = torch.randn(TOKENS, SIZE, device=device)
    kinds = {name: CIMConfig.preset(name) for name in PRESETS}
    if own is not None and own.on_grid and own not in kinds.values():
        kinds["the recipe's own"] = own
    ways: dict[str, Way] = {"torch": (nullcontext, lambda: linear(x))}
    invalid = {}
    for name, kind in kinds.items():
        for way in ("exact", "fast"):
            try:
                chip = OnChip(layer, name, kind.replace(model=way, adc_range="full"))
            except ValueError as error:
                invalid[name, way] = str(error)
            else:
                ways[f"{name}, {way}"] = (nullcontext, lambda chip=chip: chip.product(x))  # type: ignore[misc]
    seconds = in_turns(ways, LAYER_ROUNDS, "timing a layer")
    found = {
        name: {way: invalid.get((name, way), seconds.get(f"{name}, {way}", 0.0)) for way in ("exact", "fast")}
        for name in kinds
    }
    return {"torch": {"exact": seconds["torch"], "fast": seconds["torch"]}, **found}


def _text(record: dict[str, Any], recipe: Recipe, command: str) -> str:
    times = record["model"]
    rows = []
    for name, seconds in times.items():
        off = times.get(name.removesuffix(", on the chip")) if name.endswith(", on the chip") else None
        ratios = ["" if one is None else f"{seconds / one:.2f}" for one in (times["original"], off)]
        rows.append([name, f"{1e3 * seconds:.0f}", *ratios])
    name = recipe.source()[2].rpartition("/")[2]
    parts = [
        f"# How long {name} takes\n\n`{command}`",
        f"Medians of calls in turns, {record['machine']}.",
        f"## One window of {recipe.evaluation_window} tokens, {recipe.backbone.upper()}, rank {recipe.r}",
        markdown_table(["", "ms", "times the original", "times itself off the chip"], rows),
    ]
    if record["exact_layers"]:
        count, why = len(record["exact_layers"]), next(iter(record["exact_layers"].values()))
        parts.append(f"{count} layers run exactly" + (f": {why}." if why else "."))
    base = record["layer"]["torch"]["exact"]
    rows = []
    for kind, both in record["layer"].items():
        shown = [[f"{1e3 * t:.2f}", f"{t / base:.1f}"] if isinstance(t, float) else ["", ""] for t in both.values()]
        rows.append([kind, *shown[0], *shown[1]])
    header = ["chip", "exact, ms", "times torch", "fast, ms", "times torch"]
    parts += [
        f"## An INT8 layer, {SIZE} x {SIZE}, {TOKENS} tokens, beside torch's linear layer in float32",
        markdown_table(header, rows),
        "Empty where the fast model is not valid.",
    ]
    return "\n\n".join(parts) + "\n"

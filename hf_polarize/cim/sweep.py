"""hf-polarize cim sweep: what chips of many kinds do to a model, and what its surrogates take back."""

from __future__ import annotations

import copy
import csv
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration import Statistics, layer_statistics
from ..checkpoint import prepare_folder, save_polarized, write_json
from ..configuration import SurrogateConfig
from ..deflation import fit_to_chip
from ..distillation import teacher_dataset
from ..evaluation import HeldOut
from ..models import Batch
from ..pipeline import Evaluator, at_most, load_model, recipe_batches, train
from ..plan import make_plan
from ..recipe import SWEPT, Recipe, resumed
from ..report import markdown_table
from ..solver import carry_out, rounded_backbone
from ..sources import load_data
from .configuration import CIMConfig
from .hook import attach_cim

BACKBONE, CLOSED, DEFLATED, TRAINED, PER_CHIP, TRAINED_PER_CHIP, WRITTEN = SWEPT


def settings(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Yield what differs from the recipe in each setting, `{}` first for the recipe's own."""
    yield {}
    for grid in recipe.sweep:
        for values in itertools.product(*grid.values()):
            yield dict(zip(grid, values, strict=True))


def setting_of(recipe: Recipe, setting: dict[str, Any]) -> tuple[CIMConfig, int]:
    """
    Return the chip and the rank of a setting.

    Raises:
        ValueError: If it names what is not there, or what has no effect.
    """
    changes = dict(setting)
    rank = SurrogateConfig(r=changes.pop("r", recipe.r)).r
    if "chip_seed" in changes:
        raise ValueError("every setting is measured on the same chips: sweep_chips of them, from cim.chip_seed on")
    chip = recipe.chip()
    if chip is None:
        raise ValueError("a sweep needs a chip to start from: name one in the recipe, for instance cim=noisy")
    for message in chip.idle(changes):
        raise ValueError(message)
    values = {item: getattr(chip, item) for item in chip.__dataclass_fields__}
    return CIMConfig.from_dict({**values, "ranges": {}, **changes}), rank


def sweep_recipe(recipe: Recipe, command: str = "") -> dict[str, Any]:
    """
    Measure every method on every chip of every setting; leave tables and plots in the recipe's folder.

    `sweep.json` is written after each chip, tables and plots after each method, and what was trained is kept as a
    checkpoint: the same command goes on where it was interrupted.

    Args:
        recipe ([`~hf_polarize.recipe.Recipe`]): with `cim`.
        command (`str`): how to run it again.

    Returns:
        `dict`: the content of `sweep.json`.

    Raises:
        ValueError: Before any work, if a setting can't be.
    """
    unknown = [method for method in recipe.sweep_methods if method not in SWEPT]
    if unknown or not recipe.sweep_methods:
        raise ValueError(f"sweep_methods takes any of {', '.join(map(repr, SWEPT))}; got {recipe.sweep_methods}")
    wanted = {_label(setting): (setting, *setting_of(recipe, setting)) for setting in settings(recipe)}
    folder = Path(recipe.output_dir)
    path = folder / "sweep.json"
    prepare_folder(folder, recipe.overwrite or path.is_file() or (folder / "energy.json").is_file())
    record = resumed(path, recipe)
    done = {(_label(row["setting"]), row["method"], row["chip_seed"]) for row in record["results"]}
    tasks = [
        (label, method, [s for s in _seeds(recipe) if (label, method, s) not in done])
        for label in wanted
        for method in recipe.sweep_methods
    ]
    if not any(seeds for *_, seeds in tasks):  # tables and plots are what is left to do
        write_sweep(folder, record, recipe, command)
        return record
    training = bool({TRAINED, TRAINED_PER_CHIP} & set(recipe.sweep_methods))
    trained = record.setdefault("trained", training)
    if training and not trained:
        raise ValueError(f'"{path}" was begun without training, on less text: choose another output_dir')
    calibration, evaluation = [load_data(name) for name in recipe.sources], load_data(recipe.evaluation)
    model, processor = load_model(recipe)
    make_plan(model, recipe.polarize_config(), SurrogateConfig(r=max(rank for _, _, rank in wanted.values())))
    recipe = replace(recipe, train=(recipe.train or ["surrogate"]) if trained else None, replay=0)
    batches, held_back = recipe_batches(recipe, model, calibration, processor)
    evaluator = Evaluator(model, recipe, evaluation, processor)
    folder.mkdir(parents=True, exist_ok=True)
    record["original"], record["protocol"] = asdict(evaluator.original), evaluator.protocol
    record["model"] = recipe.source()[2].rpartition("/")[2]
    write_json(path, record)
    with (
        tempfile.TemporaryDirectory(prefix="hf-polarize-") as scratch,
        logging.tqdm(total=sum(len(seeds) for *_, seeds in tasks), desc="sweeping", unit="chip") as bar,
    ):
        means = _Means(recipe, model, batches, held_back, processor, scratch)
        for label, method, seeds in tasks:
            setting, chip, rank = wanted[label]

            def measure(measured: PreTrainedModel, seed: int, what: str = f"{method}, {label}") -> None:
                quality = evaluator.held_out.measure(measured, what)
                row = {"setting": setting, "method": method, "chip_seed": seed, "loss": quality.loss, "kl": quality.kl}  # noqa: B023
                record["results"].append(row)
                write_json(path, record)
                bar.update()

            # what several grids name is measured once, and the backbone alone has no rank
            alike = {_label(s) for s, c, r in wanted.values() if c == chip and (r == rank or method == BACKBONE)}
            known = [row for row in record["results"] if row["method"] == method and _label(row["setting"]) in alike]
            shared = {row["chip_seed"]: {**row, "setting": setting} for row in known if row["chip_seed"] in seeds}
            record["results"] += shared.values()
            write_json(path, record)
            bar.update(len(shared))
            left = [seed for seed in seeds if seed not in shared]
            if left:
                _measure_chips(means, method, chip, rank, left, measure)
            if seeds:
                write_sweep(folder, record, recipe, command)
    return record


@dataclass(eq=False)
class _Means:
    """What methods are made with, each part when it is first asked for."""

    recipe: Recipe
    model: PreTrainedModel
    batches: list[Batch]
    held_back: list[Batch]
    processor: Any
    scratch: str

    @cached_property
    def calibration(self) -> list[Batch]:
        return at_most(self.batches, self.recipe.max_tokens, self.model)

    @cached_property
    def statistics(self) -> dict[str, Statistics]:
        plan = make_plan(self.model, self.recipe.polarize_config(), self.recipe.surrogate_config())
        closed_form = self.recipe.closed_form()
        parts = layer_statistics(
            self.model, self.calibration, plan.layers, 2**62, closed_form.gradients, closed_form.weigh_tokens,
            self.recipe.seed, plan.quantized(),
        )  # fmt: skip
        return {name: known for part in parts for name, known in part.items()}

    @cached_property
    def yardstick(self) -> HeldOut | None:
        return HeldOut(self.model, self.held_back) if self.recipe.closed_form().chooses else None

    @lru_cache(maxsize=1)  # noqa: B019, several methods start from the same one, and settings come one by one
    def polarized(self, chip: CIMConfig, rank: int, deflated: bool) -> PreTrainedModel:
        """The model in closed form, on no chip; what is chosen is chosen on a chip that none is measured on."""
        config = self.recipe.polarize_config()
        config.cim = chip.replace(chip_seed=_other_seed(self.recipe))
        copied = copy.deepcopy(self.model)
        plan = make_plan(copied, config, replace(self.recipe, r=rank, rank_pattern=None).surrogate_config())
        closed_form = replace(self.recipe.closed_form(), deflated=deflated)
        keep_losses = self.recipe.train is not None and bool(self.recipe.layer_weight)
        outcome = carry_out(copied, plan, [self.statistics], closed_form, self.yardstick, keep_losses)
        copied.layer_losses = outcome.losses
        return copied

    def trained(self, chip: CIMConfig, rank: int) -> PreTrainedModel:
        """The deflated model, trained on sampled chips and kept in the folder of the sweep."""
        text = json.dumps([self.recipe.decisive(), chip.to_dict(), rank], sort_keys=True)
        folder = Path(self.recipe.output_dir) / "trained" / hashlib.sha256(text.encode()).hexdigest()[:12]
        if not folder.is_dir():
            model = copy.deepcopy(self.polarized(chip, rank, True))
            attach_cim(model, chip.replace(chip_seed=_other_seed(self.recipe)), self.calibration)
            train(self.recipe, model, *self.lessons, self.scratch)
            whole = save_polarized(model, folder.with_suffix(".new"), self.processor, overwrite=True)
            whole.rename(folder)
        return load_model(replace(self.recipe, model=str(folder), gguf_file=None))[0]

    @cached_property
    def lessons(self) -> tuple[Any, Any]:
        """What the original says, to train on and to stop by."""
        fresh = at_most(self.batches, self.recipe.train_tokens, self.model)
        data, held_out = (teacher_dataset(self.model, part, self.scratch) for part in (fresh, self.held_back))
        return data, held_out


def _measure_chips(means: _Means, method: str, chip: CIMConfig, rank: int, seeds: list[int], measure: Any) -> None:
    """Make the model of a method once, and run it on every chip."""
    recipe, model, batches = means.recipe, means.model, means.calibration
    plan = make_plan(model, recipe.polarize_config(), SurrogateConfig(r=1))
    if method == BACKBONE:
        for seed in seeds:
            plan.quantizer.quantization_config.cim = chip.replace(chip_seed=seed)
            with rounded_backbone(model, plan, batches):
                measure(model, seed)
        return
    if method in (TRAINED, TRAINED_PER_CHIP):
        copied = means.trained(chip, rank)
    else:
        copied = copy.deepcopy(means.polarized(chip, rank, method != CLOSED))
    fitted = method in (PER_CHIP, TRAINED_PER_CHIP, WRITTEN)
    for seed in seeds:
        one = copy.deepcopy(copied) if fitted else copied  # fitting changes it, and each chip begins with the same
        attach_cim(one, chip.replace(chip_seed=seed), batches)
        if fitted:
            fit_to_chip(one, plan.layers, [means.statistics], batches, recipe.two_sided, codes=method == WRITTEN)
        measure(one, seed)
        del one


def _seeds(recipe: Recipe) -> range:
    chip = recipe.chip()
    first = 0 if chip is None else chip.chip_seed
    return range(first, first + recipe.sweep_chips)


def _other_seed(recipe: Recipe) -> int:
    """Return the seed of a chip that no sweep from the same seed on measures."""
    return _seeds(recipe).start ^ 2**31


def _label(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(setting.items())) or "the recipe's own"


def summary(record: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Return mean, standard deviation and worst of the loss, and the mean KL, over chips for each setting and method.

    The share of the gap is `(backbone - method) / (backbone - original)`, of mean losses; for the worst chip it is the
    least of those of single chips, each against the backbone on the same chip.
    """
    original = record["original"]["loss"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in record["results"]:
        groups.setdefault((_label(row["setting"]), row["method"]), []).append(row)
    rows = []
    for (label, method), found in groups.items():
        losses = torch.tensor([row["loss"] for row in found], dtype=torch.float64)
        backbone = {row["chip_seed"]: row["loss"] for row in groups.get((label, BACKBONE), [])}
        shares = [
            (backbone[row["chip_seed"]] - row["loss"]) / (backbone[row["chip_seed"]] - original)
            for row in found
            if method != BACKBONE and backbone.get(row["chip_seed"], original) != original
        ]
        recovered = None
        if shares:
            before = _mean(backbone[row["chip_seed"]] for row in found if row["chip_seed"] in backbone)
            after = _mean(row["loss"] for row in found if row["chip_seed"] in backbone)
            recovered = (before - after) / (before - original)
        rows.append(
            {
                "setting": found[0]["setting"], "label": label, "method": method, "chips": len(found),
                "mean": float(losses.mean()), "std": float(losses.std()) if len(found) > 1 else 0.0,
                "worst": float(losses.max()), "kl": None if found[0]["kl"] is None else _mean(r["kl"] for r in found),
                "recovered": recovered, "recovered_worst": min(shares, default=None),
            }
        )  # fmt: skip
    return rows


def write_sweep(folder: Path, record: dict[str, Any], recipe: Recipe, command: str) -> None:
    """Write sweep.csv, summary.csv, sweep.md and a plot with bands for each swept argument."""
    rows = summary(record)
    swept = sorted({name for row in rows for name in row["setting"]})
    with (folder / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        numbers = ["chips", "mean", "std", "worst", "kl", "recovered", "recovered_worst"]
        writer = csv.writer(file)
        writer.writerow(["method", *swept, *numbers])
        for row in rows:
            values = [
                "null" if row["setting"].get(name, "") is None else row["setting"].get(name, "") for name in swept
            ]
            writer.writerow([row["method"], *values, *(row[number] for number in numbers)])
    with (folder / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "method", "chip_seed", "loss", "kl"])
        for row in record["results"]:
            writer.writerow([_label(row["setting"]), row["method"], row["chip_seed"], row["loss"], row["kl"]])
    table = markdown_table(
        ["setting", "method", "chips", "loss", "± over chips", "worst", "KL", "gap recovered", "on the worst chip"],
        [
            [
                row["label"], row["method"], str(row["chips"]),
                *("" if row[key] is None else f"{row[key]:.4f}" for key in ("mean", "std", "worst", "kl")),
                *("" if row[key] is None else f"{100 * row[key]:.1f} %" for key in ("recovered", "recovered_worst")),
            ]
            for row in rows
        ],
    )  # fmt: skip
    pictures = []
    for grid in recipe.sweep:
        for name in _plots(folder, rows, list(grid), record["original"]["loss"]):
            pictures.append(f"![loss against {', '.join(grid)}]({name})")
    text = f"""# {record["model"]} on chips

Original: loss {record["original"]["loss"]:.4f}. {record["protocol"]}

{table}

{chr(10).join(pictures)}

## How to run this again

```
{command}
```
"""
    (folder / "sweep.md").write_text(text, encoding="utf-8")


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _plots(folder: Path, rows: list[dict[str, Any]], names: list[str], original: float) -> Iterator[str]:
    """Plot the mean loss, a band of one standard deviation, and the worst chip, over the first of these arguments."""
    from matplotlib.figure import Figure

    of_grid = [row for row in rows if sorted(row["setting"]) == sorted(names)]

    def rest_of(row: dict[str, Any]) -> str:
        return ", ".join(f"{name}={row['setting'][name]}" for name in names[1:])

    others = list(dict.fromkeys(map(rest_of, of_grid)))
    values = [row["setting"][names[0]] for row in of_grid]
    labels = list(dict.fromkeys(map(str, values)))
    numbers = all(isinstance(value, (int, float)) for value in values)
    if len(labels) < 2:
        return
    figure = Figure(figsize=(1 + 4.6 * len(others), 4), layout="constrained")
    axes = figure.subplots(1, len(others), sharey=True, squeeze=False)[0]
    for axis, rest in zip(axes, others, strict=True):
        for method in dict.fromkeys(row["method"] for row in of_grid):
            points = sorted(
                (value if numbers else labels.index(str(value)), row["mean"], row["std"], row["worst"])
                for row, value in zip(of_grid, values, strict=True)
                if row["method"] == method and rest_of(row) == rest
            )
            if not points:
                continue
            x, mean, std, worst = (list(values) for values in zip(*points, strict=True))
            (line,) = axis.plot(x, mean, "o-", markersize=4, label=method)
            low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
            axis.fill_between(x, low, high, alpha=0.25, color=line.get_color())
            axis.plot(x, worst, ":", color=line.get_color())
        axis.axhline(original, color="0.0", linestyle="--", label="original")
        axis.set_xlabel(names[0])
        if not numbers:
            axis.set_xticks(range(len(labels)), labels)
        axis.set_title(rest)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss, nats per token (dotted: worst chip)")
    axes[0].legend(fontsize=8)
    name = f"loss_against_{'_'.join(names)}.png"
    figure.savefig(folder / name, dpi=130)
    yield name

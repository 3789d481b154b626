"""hf-polarize energy: the bill of a recipe's model as a table, a file and plots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers.utils import logging

from ..backbone import weight_matrix
from ..checkpoint import read_json, write_json
from ..configuration import SurrogateConfig
from ..pipeline import load_model
from ..plan import make_plan
from ..recipe import Recipe
from ..report import markdown_table
from .configuration import CIMConfig
from .energy import (
    ACTIVITY,
    ADC_EXPONENTIAL,
    ADC_LINEAR,
    ITEMS,
    MAC,
    NODES,
    PAPER_RANK,
    PRESET_NODES,
    SHIFT_ADD,
    Bill,
    Constant,
    EnergyConfig,
    adc_bits,
    adc_energy,
    attention_macs,
    bill_of,
    digital_mac,
    model_shapes,
    paper_section,
)
from .sweep import BACKBONE, DEFLATED

logger = logging.get_logger(__name__)
NODE_CONSTANTS = ("digital MAC, fJ", "ADC, fJ per reading", "shift-add, fJ per reading")
RANKS = (0, 2, 4, 8, 16, 32)
"""Of the table of ranks, as far as the narrowest layer has them."""


def energy_recipe(recipe: Recipe, command: str = "") -> dict[str, Any]:
    """
    Compute the energy bill of a recipe's model and chip; leave `energy.json`, `energy.md` and plots in its folder.

    Args:
        recipe ([`~hf_polarize.recipe.Recipe`]): with `cim`; `energy_node`, `energy_digital` and `energy_context` are
            for this alone.
        command (`str`): how to run it again.

    Returns:
        `dict`: the content of `energy.json`.

    Raises:
        ValueError: If the recipe names no chip.
    """
    chip = recipe.chip()
    if chip is None:
        raise ValueError("the energy of what? Name a chip in the recipe, for instance cim=sram-16nm")
    preset = recipe.cim if isinstance(recipe.cim, str) else (recipe.cim or {}).get("preset")
    node = PRESET_NODES.get(str(preset), EnergyConfig.node) if recipe.energy_node is None else recipe.energy_node
    assumed = EnergyConfig(node, recipe.energy_digital, recipe.energy_context)
    folder = Path(recipe.output_dir)
    model, _ = load_model(recipe)
    plan = make_plan(model, recipe.polarize_config(), recipe.surrogate_config())
    attention = attention_macs(model.config, assumed.context)
    nf4, on_chip = recipe.backbone == "nf4", {name for name in plan.layers if chip.covers(name, model)}
    narrowest = min(min(weight_matrix(layer).shape) for layer in plan.layers.values())

    def bill(energy: EnergyConfig, ranks: dict[str, int], deflated: bool) -> Bill:
        return bill_of(model_shapes(model, on_chip, ranks, deflated), attention, chip, energy, nf4)

    def at(rank: int, deflated: bool = recipe.deflated) -> Bill:
        ranks = make_plan(model, recipe.polarize_config(), SurrogateConfig(r=rank)).ranks if rank else {}
        return bill(assumed, ranks, deflated)

    main = bill(assumed, plan.ranks, recipe.deflated)
    at_rank = {rank: at(rank) for rank in RANKS if rank <= narrowest}
    at_node = {node: bill(replace(assumed, node=node), plan.ranks, recipe.deflated) for node in NODES}
    paper_rank = min(PAPER_RANK, narrowest)
    record = {
        **main.to_dict(),
        "ranks": {str(rank): {"TOPS/W": b.tops_per_watt, "pJ per token": b.total} for rank, b in at_rank.items()},
        "nodes": {
            str(node): {
                "TOPS/W": b.tops_per_watt,
                "totals": b.totals(),
                "digital MAC, fJ": 1e3 * digital_mac(assumed.digital, node).value,
                "ADC, fJ per reading": adc_energy(chip, node),
                "shift-add, fJ per reading": SHIFT_ADD.value * node / 28,
            }
            for node, b in at_node.items()
        },
        "paper": {"rank": paper_rank, **paper_section(at(paper_rank))},
        "constants": [{"name": name, **vars(constant)} for name, constant in _constants(chip, assumed).items()],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "energy.json", record)
    _plot_nodes(at_node, folder / "energy.png")
    pictures = ["![energy per token by node](energy.png)"]
    if (folder / "sweep.json").is_file():
        points = accuracy_against_energy(read_json(folder / "sweep.json"), recipe, at)
        if any(len(line) > 1 for line in points.values()):
            _plot_pareto(points, folder / "pareto.png")
            pictures.append("![loss against energy over rank](pareto.png)")
    (folder / "energy.md").write_text(_text(recipe, main, record, chip, pictures, command), encoding="utf-8")
    return record


def _constants(chip: CIMConfig, assumed: EnergyConfig) -> dict[str, Constant]:
    mac, volts = digital_mac(assumed.digital, assumed.node), f"{chip.v_dd:g} V"
    return {
        f"digital MAC of this bill, {assumed.digital}": mac,
        "cell": Constant(chip.cell_capacitance, "fF", "assumed: the chip's cell_capacitance", "any", volts),
        "ADC, linear": ADC_LINEAR, "ADC, exponential": ADC_EXPONENTIAL, "shift-add": SHIFT_ADD, "activity": ACTIVITY,
        **{f"digital MAC, {kind}, {node} nm": constant for (kind, node), constant in MAC.items()},
    }  # fmt: skip


def accuracy_against_energy(
    sweep: dict[str, Any], recipe: Recipe, at: Callable[[int, bool], Bill]
) -> dict[str, list[tuple[int, float, float, float]]]:
    """
    Return (rank, energy per token, mean loss, its standard deviation over chips) of each method, by rank.

    Nothing, with a warning, if the sweep was of another model or chip.
    """
    now, then = asdict(recipe), sweep["recipe"]
    other = [key for key in ("model", "backbone", "cim", "modules_to_not_convert") if then.get(key) != now[key]]
    if other:
        logger.warning(f"the sweep in {recipe.output_dir} is of another {', '.join(other)}: no losses against energy")
        return {}
    points: dict[str, dict[int, list[float]]] = {}
    for row in sweep["results"]:
        if set(row["setting"]) <= {"r"}:
            rank = 0 if row["method"] == BACKBONE else row["setting"].get("r", sweep["recipe"]["r"])
            points.setdefault(row["method"], {}).setdefault(rank, []).append(row["loss"])
    return {
        method: [
            (rank, at(rank, method.startswith(DEFLATED)).total, fmean(losses), stdev(losses) if losses[1:] else 0.0)
            for rank, losses in sorted(by_rank.items())
        ]
        for method, by_rank in points.items()
    }


def _plot_nodes(at_node: dict[int, Bill], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axis = figure.subplots()
    left, places = [0.0] * len(at_node), range(len(at_node))
    for item in ITEMS:
        sizes = [bill.totals()[item] * 1e-6 for bill in at_node.values()]
        axis.barh(places, sizes, left=left, label=item)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, end, bill in zip(places, left, at_node.values(), strict=True):
        axis.text(end, place, f" {bill.tops_per_watt:.1f} TOPS/W", va="center", fontsize=8)
    axis.set_yticks(places, [f"{node} nm" for node in at_node])
    axis.set_xlim(right=1.25 * max(left))
    axis.set_xlabel("µJ per token")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return those (energy, loss) that no other one equals or beats in both, by energy."""
    front: list[tuple[float, float]] = []
    for energy, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((energy, loss))
    return front


def _plot_pareto(points: dict[str, list[tuple[int, float, float, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axis = figure.subplots()
    for method, line in points.items():
        energies, losses, bars = [1e-6 * x for _, x, *_ in line], [y for *_, y, _ in line], [bar for *_, bar in line]
        axis.errorbar(energies, losses, bars, fmt="o-", label=method, markersize=4, capsize=3)
        for (rank, *_), x, y in zip(line, energies, losses, strict=True):
            axis.annotate(f"r={rank}", (x, y), xytext=(3, 4), textcoords="offset points", fontsize=8)
    front = pareto_front([(1e-6 * x, y) for line in points.values() for _, x, y, _ in line])
    axis.step(*zip(*front, strict=True), where="post", color="0.4", linestyle=":", label="Pareto front")
    axis.set_xlabel("µJ per token")
    axis.set_ylabel("loss, nats per token, ± over chips")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def _adc(chip: CIMConfig) -> str:
    if chip.adc_bits is not None:
        return f"The ADC has {chip.adc_bits} bits."
    return f"The chip has no ADC; one of {adc_bits(chip)} bits is billed, which tells all counts apart."


def _text(
    recipe: Recipe, bill: Bill, record: dict[str, Any], chip: CIMConfig, pictures: list[str], command: str
) -> str:
    totals, total = bill.totals(), bill.total
    items = markdown_table(
        ["item", "µJ per token", "share", "TOPS/W if it alone cost anything"],
        [
            [item, f"{value * 1e-6:.3f}", f"{100 * value / total:.1f} %", f"{bill.caps()[item]:.1f}" if value else ""]
            for item, value in totals.items()
        ],
    )
    ranks = markdown_table(
        ["rank", "µJ per token", "TOPS/W"],
        [[r, f"{one['pJ per token'] * 1e-6:.3f}", f"{one['TOPS/W']:.2f}"] for r, one in record["ranks"].items()],
    )
    layers = markdown_table(
        ["layer", "pJ per token", *ITEMS],
        [
            [name, f"{sum(one.values()):.0f}", *(f"{one[item]:.0f}" for item in ITEMS)]
            for name, one in bill.layers.items()
        ],
    )
    nodes = markdown_table(
        ["node, nm", "µJ per token", "TOPS/W", *(f"{item}, µJ" for item in ITEMS), *NODE_CONSTANTS],
        [
            [
                name, f"{sum(one['totals'].values()) * 1e-6:.2f}", f"{one['TOPS/W']:.2f}",
                *(f"{one['totals'][item] * 1e-6:.2f}" for item in ITEMS),
                *(f"{one[constant]:.1f}" for constant in NODE_CONSTANTS),
            ]
            for name, one in record["nodes"].items()
        ],
    )  # fmt: skip
    paper = record["paper"]
    caps = markdown_table(
        ["arithmetic of the surrogate", "cap, TOPS/W"],
        [[name, f"{value:.0f}"] for name, value in paper["cap of the surrogate alone, TOPS/W"].items()],
    )
    constants = markdown_table(
        ["constant", "value", "unit", "node", "voltage", "source"],
        [[c["name"], f"{c['value']:g}", c["unit"], c["node"], c["voltage"], c["source"]] for c in record["constants"]],
    )
    name = recipe.source()[2].rpartition("/")[2]
    fed = "surrogate MAC that the claim leaves, fJ, everything else"
    return f"""# {name}: energy per token

{bill.tops_per_watt:.2f} TOPS/W, {total * 1e-6:.2f} µJ per token at {bill.energy.node:g} nm, {chip.v_dd:g} V,
{bill.energy.digital} outside the array, attention over {bill.energy.context} tokens. The largest item is
{record["largest item"]}. Two operations per multiply-accumulate of the original model; all items of the table count,
and moving data (weights of digital layers, keys and values, inputs to the rows), norms, softmax and activation
functions are in none of them. The layers on the chip, with their surrogates, come to
{bill.on_chip_tops_per_watt:.2f} TOPS/W, or {bill.one_bit_tops_per_watt:.0f} normalised to 1 bit, for the
{bill.planes} pairs of bit planes that are executed.

{items}

{ranks}

Logic and converters of other nodes, the array (its capacitance and its {chip.v_dd:g} V) as it is:

{nodes}

{chr(10).join(pictures)}

## The paper's claim

arXiv 2411.05845 claims about {paper["claim, TOPS/W"]:g} TOPS/W at rank 8, which is {paper["claim, fJ per MAC"]:.2f} fJ
for each multiply-accumulate. With rank {paper["rank"]} everywhere the layers on the chip come to
{paper["backbone layers here, TOPS/W"]:.1f} TOPS/W under the assumptions here. Surrogates, and what deflates, do
{100 * paper["share of surrogate MACs"]:.2f} % as many multiply-accumulates as the layers. For
the claim to hold here, one of these may cost {paper[f"{fed} free"]:.0f} fJ if everything else is free, and
{paper[f"{fed} as here"]:.0f} fJ if everything else costs what it costs here (below zero: it can't hold).

{caps}

## Layers, pJ per token

{layers}

## Constants

{constants}

Converters, shift-and-add and digital arithmetic between the nodes that were published are scaled, which is an
assumption: the former two with the node, but for the term of the ADC that thermal noise asks for, the latter with the
power of the node that joins 45 and 7 nm. The array and its ADCs have {chip.v_dd:g} V, digital logic the supply of its
node. The array is billed as switched capacitors of {chip.cell_capacitance:g} fF, with half of the input bits and all
values of a weight equally frequent, which is more than real ones switch; a resistive one conducts instead, and needs a
figure of its own. {_adc(chip)}

## How to run this again

```
{command}
```
"""

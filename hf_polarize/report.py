"""Tables and plots: what people look at."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from .inspection import CheckpointInfo

VARIANTS = {
    "original": "original",
    "backbone": "backbone alone",
    "closed_form": "with surrogates in closed form",
    "polarized": "polarized",
}


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def results_rows(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of a run: original, backbone alone, polarized."""
    rows = []
    gap = metrics["backbone"]["loss"] - metrics["original"]["loss"]
    for key, label in VARIANTS.items():
        if key not in metrics:
            continue
        one = metrics[key]
        recovered = metrics["gap_recovered"] if key == "polarized" else None
        if key == "closed_form" and gap:
            recovered = (metrics["backbone"]["loss"] - one["loss"]) / gap
        rows.append(
            [
                label,
                _number(one["loss"], 4),
                _number(one["perplexity"], 3),
                _number(one["kl"], 4),
                "" if recovered is None else f"{100 * recovered:.1f} %",
                _number(one["bits_per_weight"], 2),
                f"{one['bytes']:,}",
                _number(one["seconds"], 1),
            ]
        )
    header = ["", "loss", "perplexity", "KL to original", "gap recovered", "bits per weight", "bytes", "seconds"]
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in used], [[row[i] for i in used] for row in rows]


def results_table(metrics: dict[str, Any]) -> str:
    """Return the Markdown table of a run; its seconds are those of the evaluation."""
    return markdown_table(*results_rows(metrics))


def verdict(metrics: dict[str, Any]) -> str:
    """Return the result of a run in a sentence."""
    gap = metrics["backbone"]["loss"] - metrics["original"]["loss"]
    recovered = metrics["gap_recovered"]
    if recovered is None or gap < 2 * metrics["gap_standard_error"]:
        return (
            f"On this held-out data quantization cost {gap:.4f} (standard error {metrics['gap_standard_error']:.4f}), "
            "too little to tell a share of it that the surrogates recover; compare the KL, or take more windows."
        )
    if recovered < 0:
        return "On this held-out data the surrogates make the loss greater: calibrate on more text, or on other text."
    return f"On held-out data, the surrogates recover {100 * recovered:.1f} % of the loss that quantization cost."


def size_table(info: CheckpointInfo) -> str:
    """Return the Markdown table of what a checkpoint weighs, by part."""
    totals = {
        part: sum(getattr(layer, f"{part}_bytes") for layer in info.layers) for part in ("code", "scale", "surrogate")
    }
    labels = {"code": "backbone codes", "scale": "backbone scales", "surrogate": "surrogates"}
    rows = [[labels[part], f"{info.bits(part):.3f}", f"{size:,}"] for part, size in totals.items()]
    rows.append(["all of the backbone's layers", f"{info.bits_per_weight:.3f}", f"{sum(totals.values()):,}"])
    rows.append(["left in high precision", "", f"{info.other_bytes:,}"])
    rows.append(["total", "", f"{info.bytes:,}"])
    return markdown_table(["part", "bits per weight", "bytes"], rows)


def plot_layer_errors(layers: dict[str, dict[str, Any]], path: Path) -> None:
    """
    Plot the relative output error of each layer before and after its surrogate, one panel per kind of layer.

    Args:
        layers (`dict`): by layer name, with `error_before` and `error_after`, in the order of the model.
        path (`Path`): of the PNG file.
    """
    from matplotlib.figure import Figure

    kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, layer in layers.items():
        parts = [part for part in name.split(".") if not part.isdigit()]
        kinds[".".join(parts[-2:])].append((layer["error_before"], layer["error_after"]))
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.5 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(kinds) :]:
        axis.set_axis_off()
    for axis, (kind, errors) in zip(axes.flat, kinds.items(), strict=False):
        before, after = zip(*errors, strict=True)
        axis.plot(before, color="0.55", marker=".", label="backbone alone")
        axis.plot(after, color="tab:blue", marker=".", label="with surrogate")
        axis.set_title(kind, fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes.flat[0].set_ylim(bottom=0)  # of all: they share the axis
    for axis in axes[:, 0]:
        axis.set_ylabel("relative output error", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("block", fontsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=9)
    figure.savefig(path, dpi=130)


def plot_training(training: dict[str, Any], path: Path) -> None:
    """Plot the losses of a training against its steps, and save the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in training["history"] if key in entry]
        if key == "eval_loss":
            points = [point for point in points if point[0]]
            points.insert(0, (0, training["start"]))
        if points:
            axis.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axis.set_xlabel("step")
    axis.set_ylabel("distance to the original")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=130)


def plot_curves(
    curves: dict[str, list[tuple[int, float]]], original: float, backbone: float, label: str, path: Path
) -> None:
    """Plot the loss of each method against ranks or tokens, between the original's and the backbone's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axis = figure.subplots()
    for name, points in curves.items():
        axis.plot(*zip(*points, strict=True), "o-", label=name, markersize=4)
    axis.axhline(backbone, color="0.4", linestyle=":", label="backbone alone")
    axis.axhline(original, color="0.0", linestyle="--", label="original")
    axis.set_xscale("log", base=2)
    axis.set_xticks(shown := sorted({x for points in curves.values() for x, _ in points}), labels=map(str, shown))
    axis.set_xlabel(label)
    axis.set_ylabel("loss, nats per token")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)


def _choices(provenance: dict[str, Any]) -> str:
    """Return what was decided on held-out data and what training brought there, as Markdown."""
    rows = [
        [trial["choice"], f"{trial['before']:.5f}", f"{trial['with']:.5f}", "kept" if trial["kept"] else "dropped"]
        for trial in provenance.get("choices", [])
    ]
    training = provenance.get("training")
    if training:
        steps = f"training of {', '.join(training['train'])}, {training['steps']} steps"
        rows.append([steps, f"{training['start']:.5f}", f"{training['end']:.5f}", "kept"])
        for part, share in training["shares"].items():
            rows.append([f"of that, {part} alone put back", f"{training['end'] + share:.5f}", "", ""])
    if not rows:
        return ""
    table = markdown_table(["", "distance before", "with it", ""], rows)
    return f"""
## Decided on held-out calibration text

{table}

Distance is the mean KL to the original, in nats, where there are logits.
"""


def markdown_report(
    title: str,
    metrics: dict[str, Any],
    info: CheckpointInfo,
    command: str,
    plots: dict[str, str],
    provenance: dict[str, Any],
    sensitivities: str,
) -> str:
    """Return the report of a run as Markdown."""
    pictures = "\n\n".join(f"## {what}\n\n![{what.lower()}]({name})" for name, what in plots.items())
    return f"""# {title}

{verdict(metrics)}

{results_table(metrics)}

{metrics["protocol"]}

## Size

{size_table(info)}
{_choices(provenance)}
{pictures}

The relative output error of a layer is sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)) on the calibration data, in closed form:
E = W − Q before and E = W − Q − B A after.
{sensitivities}
## How to run this again

```
{command}
```

{metrics["seconds"]:.0f} seconds in all.
"""

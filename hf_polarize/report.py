"""Tables and plots: what people look at."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from .inspection import CheckpointInfo

VARIANTS = {"original": "original", "backbone": "backbone alone", "polarized": "polarized"}


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def results_rows(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of a run: original, backbone alone, polarized."""
    rows = []
    for key, label in VARIANTS.items():
        one = metrics[key]
        recovered = metrics["gap_recovered"] if key == "polarized" else None
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


def markdown_report(title: str, metrics: dict[str, Any], info: CheckpointInfo, command: str, plot: str) -> str:
    """Return the report of a run as Markdown."""
    return f"""# {title}

{verdict(metrics)}

{results_table(metrics)}

{metrics["protocol"]}

## Size

{size_table(info)}

## Error of each layer

sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)) on the calibration data, with E = W − Q before and E = W − Q − B A after.

![relative output error of each layer]({plot})

## How to run this again

```
{command}
```

{metrics["seconds"]:.0f} seconds in all.
"""

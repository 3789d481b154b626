"""Statistics to scores, scores to ranks: where a surrogate wins most."""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .compensation import Compensation
from .report import markdown_table


@dataclass
class LayerSensitivity:
    """
    What quantizing the weight of one layer is predicted to cost.

    Attributes:
        name (`str`): of the layer.
        shape (`tuple[int, int]`): (out_features, in_features).
        rank (`int`): of its surrogate.
        before (`float`): 1/2 tr(G E H E^T), predicted loss increase of the bare backbone, nats per prediction.
        gains (`list[float]`): by how much the first, second, ... path lowers it.
        rounded (`float`, *optional*): predicted loss increase of the layer as bitsandbytes alone rounds it, from whole
            samples (see [`~hf_polarize.calibration.Statistics`]). `before` and `gains` are in proportion to it.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    before: float
    gains: list[float]
    rounded: float | None = None

    @property
    def after(self) -> float:
        """Predicted loss increase with the surrogate."""
        return self.before - sum(self.gains[: self.rank])


@dataclass
class SensitivityReport:
    """
    The predicted loss increase of every layer before and after its surrogate: a table, a JSON file, a heat map.

    The prediction is a second-order expansion around the original model with the Fisher information in the place of
    the Hessian: of whole samples for the layer as bitsandbytes rounds it, and from there on in proportion, by one
    Kronecker factor on each side of a layer (K-FAC, arXiv 1503.05671).

    Attributes:
        layers (`list[LayerSensitivity]`): in the order of the model.
        replayed (`dict[str, float]`, *optional*): what quantizing each layer alone really costs, by name, nats per
            prediction (see [`~hf_polarize.solver.replayed_losses`]), to judge the prediction by.
    """

    layers: list[LayerSensitivity]
    replayed: dict[str, float] | None = None

    def replays(self) -> list[tuple[float, float]]:
        """Return the predicted and the replayed loss of each layer that has both, greater than 0."""
        known = self.replayed or {}
        return [(x.rounded, known[x.name]) for x in self.layers if x.rounded and known.get(x.name, 0.0) > 0]

    def rank_correlation(self) -> float | None:
        """Return Spearman's rank correlation of predicted and replayed losses."""
        from scipy.stats import spearmanr

        pairs = self.replays()
        return float(spearmanr(*zip(*pairs, strict=True)).statistic) if len(pairs) > 2 else None

    @classmethod
    def of(
        cls,
        solutions: Mapping[str, Compensation],
        ranks: Mapping[str, int],
        rounded: Mapping[str, float] | None = None,
    ) -> SensitivityReport:
        """Make the report of solved layers; those without an output covariance are left out."""
        return cls(
            [
                LayerSensitivity(
                    name,
                    (len(s.b), s.a.shape[1]),
                    ranks[name],
                    s.loss_before,
                    list(s.gains),
                    (rounded or {}).get(name),
                )
                for name, s in solutions.items()
                if s.loss_before is not None and s.gains is not None
            ]
        )

    def table(self, top: int | None = None) -> str:
        """Return a Markdown table, the most sensitive layer first, and the sum of all."""
        ordered = sorted(self.layers, key=lambda layer: -layer.before)[:top]
        rows = [[x.name, str(x.rank), f"{x.before:.3e}", f"{x.after:.3e}"] for x in ordered]
        before, after = sum(x.before for x in self.layers), sum(x.after for x in self.layers)
        rows.append([f"all {len(self.layers)} layers", "", f"{before:.3e}", f"{after:.3e}"])
        return markdown_table(["layer", "rank", "predicted loss, backbone", "with surrogate"], rows)

    def save(self, path: str | Path) -> None:
        """Write all numbers as JSON."""
        rows = [
            {**asdict(layer), "after": layer.after, "replayed": (self.replayed or {}).get(layer.name)}
            for layer in self.layers
        ]
        content = {"unit": "nats per prediction", "rank_correlation": self.rank_correlation(), "layers": rows}
        Path(path).write_text(json.dumps(content, indent=1), encoding="utf-8")

    def plot(self, path: str | Path) -> None:
        """Draw a heat map, block by projection, before and after, in one logarithmic scale of colours."""
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        def place(name: str) -> tuple[int, str]:
            parts = name.split(".")
            numbers = [int(part) for part in parts if part.isdigit()]
            kind = ".".join([part for part in parts if not part.isdigit()][-2:])
            return (numbers[0] if numbers else 0), kind

        kinds = list(dict.fromkeys(place(layer.name)[1] for layer in self.layers))
        blocks = 1 + max(place(layer.name)[0] for layer in self.layers)
        titles = ("backbone alone", "with surrogate", "rank")
        maps = {title: torch.full((len(kinds), blocks), torch.nan) for title in titles}
        for layer in self.layers:
            block, kind = place(layer.name)
            row = kinds.index(kind)
            values = (max(layer.before, 1e-12), max(layer.after, 1e-12), float(layer.rank))
            for grid, value in zip(maps.values(), values, strict=True):
                grid[row, block] = value
        norm = LogNorm(
            min(float(grid[~grid.isnan()].min()) for grid in list(maps.values())[:2]),
            max(float(grid[~grid.isnan()].max()) for grid in list(maps.values())[:2]),
        )
        figure = Figure(figsize=(3 + 0.26 * blocks, 1.2 + 0.9 * len(kinds)), layout="constrained")
        axes = figure.subplots(3, 1, sharex=True)
        for axis, (title, grid) in zip(axes, maps.items(), strict=True):
            image = axis.imshow(grid, aspect="auto", norm=None if title == "rank" else norm, cmap="viridis")
            axis.set_title(title if title == "rank" else f"predicted loss increase, {title}", fontsize=9)
            axis.set_yticks(range(len(kinds)), kinds, fontsize=7)
            figure.colorbar(image, ax=axis, label="" if title == "rank" else "nats")
        axes[-1].set_xlabel("block")
        figure.savefig(path, dpi=130)

    def plot_replays(self, path: str | Path) -> None:
        """Draw predicted against replayed losses, a point for each layer."""
        from matplotlib.figure import Figure

        pairs = self.replays()
        figure = Figure(figsize=(5, 4.4), layout="constrained")
        axis = figure.subplots()
        axis.loglog(*zip(*pairs, strict=True), "o", markersize=3, alpha=0.6)
        ends = [min(min(pair) for pair in pairs), max(max(pair) for pair in pairs)]
        axis.loglog(ends, ends, color="0.5", linewidth=1)
        axis.set_xlabel("predicted loss increase, nats")
        axis.set_ylabel("replayed")
        axis.set_title(f"each layer quantized alone; rank correlation {self.rank_correlation():.3f}", fontsize=9)
        figure.savefig(path, dpi=130)


def allocate_ranks(
    layers: Sequence[LayerSensitivity], budget: int, r_max: int, largest: Mapping[str, int] | None = None
) -> dict[str, int]:
    """
    Give each path of a surrogate to the layer where it wins most per parameter, until a budget is spent.

    Args:
        layers (`Sequence[LayerSensitivity]`): with the gains of `r_max` paths each.
        budget (`int`): parameters of all surrogates; a path of a layer takes out + in of them.
        r_max (`int`): largest rank of a layer.
        largest (`Mapping[str, int]`, *optional*): largest ranks of single layers.

    Returns:
        `dict[str, int]`: ranks, each at least 1.

    Raises:
        ValueError: If the budget does not give every layer one path.
    """
    cost = {layer.name: sum(layer.shape) for layer in layers}
    spent = sum(cost.values())
    if spent > budget:
        raise ValueError(f"the budget of {budget} parameters is less than the {spent} of rank 1 for all layers")
    ranks = dict.fromkeys(cost, 1)
    gains = {layer.name: layer.gains for layer in layers}
    limit = {x.name: min(r_max, len(x.gains), (largest or {}).get(x.name, r_max)) for x in layers}
    waiting = [(-gains[name][1] / cost[name], name) for name in cost if limit[name] > 1]
    heapq.heapify(waiting)
    while waiting:
        _, name = heapq.heappop(waiting)
        if spent + cost[name] > budget:
            continue  # a smaller layer may still fit
        spent += cost[name]
        ranks[name] += 1
        if ranks[name] < limit[name]:
            heapq.heappush(waiting, (-gains[name][ranks[name]] / cost[name], name))
    return ranks

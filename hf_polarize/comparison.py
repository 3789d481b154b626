"""The rivals and ours, side by side in one run: same model, same data, same ranks, same evaluation."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .backbone import quantize_linear, weight_matrix
from .calibration import Statistics, layer_statistics
from .checkpoint import prepare_folder, read_json, write_json
from .compensation import compensate, damped
from .configuration import PolarizeConfig
from .distillation import teacher_dataset
from .evaluation import HeldOut, Quality
from .formats import BackboneLayer
from .pipeline import Evaluator, at_most, closed_form, load_model, recipe_batches, train
from .plan import make_plan
from .recipe import COMPARED, Recipe, load_data
from .report import markdown_table, plot_curves
from .requantization import Inputs, requantize

LOFTQ_ROUNDS = 5
"""Alternations of LoftQ, as in its paper."""


@dataclass
class Problem:
    """One layer, as every method gets it: W `(out, in)` float64, its backbone layer, and the statistics."""

    module: nn.Module
    config: PolarizeConfig
    statistics: Statistics

    @property
    def weight(self) -> torch.Tensor:
        return weight_matrix(self.module).detach().double()

    def backbone(self) -> BackboneLayer:
        return quantize_linear(self.module, self.config)


def backbone_alone(problem: Problem, rank: int) -> torch.Tensor:
    """Q, as bitsandbytes rounds it."""
    return problem.backbone().dequantized().double()


def _added(problem: Problem, rank: int, covariance: torch.Tensor) -> torch.Tensor:
    q = backbone_alone(problem, rank)
    return q + _path(problem.weight, problem.weight - q, covariance, rank)


def _path(weight: torch.Tensor, error: torch.Tensor, covariance: torch.Tensor, rank: int) -> torch.Tensor:
    """The best B A for an error, `(out, in)`, float64."""
    solution = compensate(weight, error, covariance, rank)
    return solution.b.double() @ solution.a.double()


def svd(problem: Problem, rank: int) -> torch.Tensor:
    """Truncated SVD of the error (LoRC of ZeroQuant-V2, arXiv 2303.08302; there the factors are 8-bit, here not)."""
    return _added(problem, rank, torch.eye(problem.weight.shape[1], dtype=torch.float64))


def lqer(problem: Problem, rank: int) -> torch.Tensor:
    """Error scaled by the mean magnitude of each input (L²QER, arXiv 2402.02446, equation 11)."""
    magnitude = problem.statistics.magnitude
    assert magnitude is not None
    s = magnitude.double().clamp(min=1e-12)
    s = s / (s.min() * s.max()).sqrt()
    return _added(problem, rank, torch.diag(s.square()))


def qera_approx(problem: Problem, rank: int) -> torch.Tensor:
    """Error scaled by the root mean square of each input (QERA-approx, arXiv 2410.06040, theorem 2)."""
    return _added(problem, rank, torch.diag(problem.statistics.h.diagonal().double().clamp(min=1e-12)))


def qera_exact(problem: Problem, rank: int) -> torch.Tensor:
    """Full input covariance (QERA-exact, arXiv 2410.06040, theorem 1; EoRA, arXiv 2410.21271)."""
    return _added(problem, rank, damped(problem.statistics.h))


def loftq(problem: Problem, rank: int) -> torch.Tensor:
    """
    Alternate Q of W - B A with B A of W - Q (LoftQ, arXiv 2310.08659, algorithm 1).

    Our own lines: the ones of peft 0.21 need CUDA.
    """
    weight = problem.weight
    eye = torch.eye(weight.shape[1], dtype=torch.float64)
    path = torch.zeros_like(weight)
    for _ in range(LOFTQ_ROUNDS):
        rest = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float32, device="meta")
        rest.weight = nn.Parameter((weight - path).float(), requires_grad=False)
        q = quantize_linear(rest, problem.config).dequantized().double()
        path = _path(weight, weight - q, eye, rank)
    return q + path


def ours(problem: Problem, rank: int) -> torch.Tensor:
    """Codes and scales chosen for the surrogate (see [`~hf_polarize.requantization.requantize`]), full covariance."""
    layer, inputs = problem.backbone(), Inputs(damped(problem.statistics.h))
    requantize(layer, problem.weight, inputs, rank)
    q = layer.dequantized().double()
    return q + _path(problem.weight, problem.weight - q, inputs.covariance, rank)


METHODS: dict[str, Callable[[Problem, int], torch.Tensor]] = {
    "backbone alone": backbone_alone,
    "SVD (LoRC)": svd,
    "LoftQ (our implementation)": loftq,
    "LQER": lqer,
    "QERA-approx": qera_approx,
    "QERA-exact = EoRA": qera_exact,
    "ours, closed form": ours,
}
TRAINED = "ours, trained"
BACKBONE = "backbone alone"
UNCALIBRATED = (BACKBONE, "SVD (LoRC)", "LoftQ (our implementation)")


@torch.no_grad()
def with_method(
    model: PreTrainedModel,
    layers: dict[str, nn.Module],
    config: PolarizeConfig,
    statistics: dict[str, Statistics],
    method: str,
    rank: int,
    held_out: HeldOut,
) -> Quality:
    """
    Measure the original with each weight replaced by what a method makes of it, Q + B A in the original's dtype.

    So all methods are computed alike, whatever kernels the machine has. The model is left as it was.
    """
    kept = {name: module.weight.data for name, module in layers.items()}  # type: ignore[union-attr]
    try:
        for name, module in logging.tqdm(layers.items(), desc=f"{method}, rank {rank}", unit="layer"):
            value = METHODS[method](Problem(module, config, statistics.get(name) or _blind(module)), rank)
            matrix = value.T if isinstance(module, Conv1D) else value
            module.weight.data = matrix.to(kept[name]).contiguous()  # type: ignore[union-attr, arg-type]
        return held_out.measure(model, method)
    finally:
        for name, module in layers.items():
            module.weight.data = kept[name]  # type: ignore[union-attr]


def _blind(module: nn.Module) -> Statistics:
    """Return the statistics of a layer that no token reached."""
    width = weight_matrix(module).shape[1]
    return Statistics(torch.eye(width), None, torch.ones(width))


def check_methods(methods: Sequence[str]) -> None:
    unknown = [method for method in methods if method not in COMPARED]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; known are {list(COMPARED)}")


def compare_recipe(recipe: Recipe, command: str = "") -> dict[str, Any]:
    """
    Measure every method on the model of a recipe; leave `comparison.json`, `comparison.md` and plots in its folder.

    Results are written after each measurement: an interruption loses one, and the same command goes on from there.

    Args:
        recipe ([`~hf_polarize.recipe.Recipe`]): what to do; `compare_methods`, `compare_ranks` and `compare_tokens`
            are for this alone.
        command (`str`): how to run it again.

    Returns:
        `dict`: the content of `comparison.json`.
    """
    check_methods(recipe.compare_methods)
    folder = Path(recipe.output_dir)
    prepare_folder(folder, recipe.overwrite or (folder / "comparison.json").is_file())
    calibration, evaluation = load_data(recipe.calibration), load_data(recipe.evaluation)
    model, processor = load_model(recipe)
    config = recipe.polarize_config()
    plan = make_plan(model, config, recipe.surrogate_config())
    layers, config = dict(plan.layers), plan.quantizer.quantization_config
    asked = asdict(recipe)
    record = _resume(folder / "comparison.json", asked)
    longest = max([recipe.max_tokens, *recipe.compare_tokens])
    training = replace(recipe, train=(recipe.train or ["surrogate"]) if TRAINED in recipe.compare_methods else None)
    batches, held_back = recipe_batches(replace(training, max_tokens=longest), model, calibration, processor)
    evaluator = Evaluator(model, recipe, evaluation, processor)
    original = evaluator.original
    results = record["results"]

    def done(method: str, rank: int, tokens: int) -> bool:
        return any((r["method"], r["rank"], r["tokens"]) == (method, rank, tokens) for r in results)

    def keep(method: str, rank: int, tokens: int, quality: Quality) -> None:
        results.append({"method": method, "rank": rank, "tokens": tokens, **asdict(quality)})
        write_json(folder / "comparison.json", record)

    folder.mkdir(parents=True, exist_ok=True)
    record["original"] = asdict(original)
    closed = [method for method in recipe.compare_methods if method != TRAINED]
    wanted = {recipe.max_tokens: list(dict.fromkeys([recipe.r, *recipe.compare_ranks]))}
    for tokens in recipe.compare_tokens:
        wanted.setdefault(tokens, [recipe.r])
    for tokens, ranks in wanted.items():
        todo = [(m, r) for r in ranks for m in closed
                if not done(m, r, tokens) and (m not in UNCALIBRATED or tokens == recipe.max_tokens)
                and (m != BACKBONE or r == recipe.r)]  # fmt: skip
        if not todo:
            continue
        statistics: dict[str, Statistics] = {}
        for part in layer_statistics(model, at_most(batches, tokens, model), layers, memory_limit=2**62):
            statistics.update(part)
        for method, rank in todo:
            quality = with_method(model, layers, config, statistics, method, rank, evaluator.held_out)
            keep(method, rank, tokens, quality)
    if TRAINED in recipe.compare_methods and not done(TRAINED, recipe.r, recipe.max_tokens):
        with tempfile.TemporaryDirectory(prefix="hf-polarize-") as scratch:
            fresh = at_most(batches, recipe.train_tokens, model)
            data, held_out = (teacher_dataset(model, part, scratch) for part in (fresh, held_back))
            first = at_most(batches, recipe.max_tokens, model)
            closed_form(training, model, first, held_back, processor)
            train(training, model, data, held_out, scratch)
        keep(TRAINED, recipe.r, recipe.max_tokens, evaluator.held_out.measure(model, TRAINED))
    write_comparison(folder, record, recipe, evaluator.protocol, command)
    return record


def _resume(path: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the record of an interrupted comparison, if it is of the same recipe."""
    free = {"overwrite", "compare_methods", "compare_ranks", "compare_tokens"}
    if path.is_file():
        record = read_json(path)
        changed = [key for key in recipe if key not in free and record["recipe"].get(key) != recipe[key]]
        if not changed:
            return record
        if not recipe["overwrite"]:
            raise FileExistsError(
                f'"{path}" is of a recipe with other {", ".join(changed)}; choose another output_dir, or '
                "overwrite=true"
            )
    return {"recipe": recipe, "results": []}


def write_comparison(folder: Path, record: dict[str, Any], recipe: Recipe, protocol: str, command: str) -> None:
    """Write the table and the plots of a comparison."""
    rank, tokens = recipe.r, recipe.max_tokens
    original = record["original"]
    found = {(r["method"], r["rank"], r["tokens"]): r for r in record["results"]}
    backbone = found.get((BACKBONE, rank, tokens))
    if backbone is None:
        raise ValueError(f'the comparison needs "{BACKBONE}" among its methods: all others are measured against it')
    rows = [["original", f"{original['loss']:.4f}", "0", "", ""]]
    for method in [*METHODS, TRAINED]:
        one = found.get((method, rank, tokens))
        if one is None:
            continue
        won, error, share, share_error = _won(original, backbone, one)
        gap = "" if method == BACKBONE or share is None else f"{100 * share:.1f} ± {100 * share_error:.1f} %"
        rows.append(
            [method, f"{one['loss']:.4f}", "" if one["kl"] is None else f"{one['kl']:.4f}",
             "" if method == BACKBONE else f"{won:.4f} ± {error:.4f}", gap]
        )  # fmt: skip
    table = markdown_table(["method", "loss", "KL to original", "loss taken back", "gap recovered"], rows)
    pictures = []
    for axis, label in (("rank", "rank"), ("tokens", "calibration tokens")):
        curves: dict[str, list[tuple[int, float]]] = {}
        for (method, r, t), one in sorted(found.items(), key=lambda item: item[0][1:]):
            on_axis = t == tokens if axis == "rank" else (r == rank and method not in UNCALIBRATED)
            if on_axis and method != BACKBONE:
                curves.setdefault(method, []).append((r if axis == "rank" else t, one["loss"]))
        if any(len(points) > 1 for points in curves.values()):
            name = f"loss_against_{axis}.png"
            plot_curves(curves, original["loss"], backbone["loss"], label, folder / name)
            pictures.append(f"![loss against {label}]({name})")
    text = f"""# {recipe.source()[2].rpartition("/")[2]}: {recipe.backbone.upper()}, rank {rank}, side by side

{table}

± is one standard error of the paired difference to the backbone alone, over windows. {protocol} Calibrated on at most
{tokens} tokens of {recipe.calibration.rpartition("/")[2]}. All methods but the trained one are computed as sums
Q + B A in the original's dtype; the trained one with the quantized layers themselves.

{chr(10).join(pictures)}

## How to run this again

```
{command}
```
"""
    (folder / "comparison.md").write_text(text, encoding="utf-8")


def _won(original: dict, backbone: dict, one: dict) -> tuple[float, float, float | None, float]:
    """Return what a method takes back of the backbone's loss, its paired standard error, and both as shares."""
    won = torch.tensor(backbone["window_losses"]) - torch.tensor(one["window_losses"])
    error = float(won.std() / math.sqrt(len(won))) if len(won) > 1 else math.inf
    gap = backbone["loss"] - original["loss"]
    return float(won.mean()), error, float(won.mean()) / gap if gap else None, error / abs(gap) if gap else math.inf

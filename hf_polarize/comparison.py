"""The rivals and ours, side by side in one run: same model, same data, same ranks, same evaluation."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbone import quantize_linear, weight_matrix
from .calibration import Statistics, layer_statistics
from .checkpoint import prepare_folder, write_json
from .compensation import Compensation, compensate, damped
from .configuration import PolarizeConfig, SurrogateConfig
from .distillation import teacher_dataset
from .evaluation import HeldOut
from .formats import BackboneLayer
from .pipeline import Evaluator, at_most, load_model, recipe_batches, train
from .plan import make_plan
from .recipe import COMPARED, Recipe, resumed
from .report import markdown_table, plot_curves
from .solver import carry_out, install, rounded_backbone
from .sources import load_data

LOFTQ_ROUNDS = 5
"""Alternations of LoftQ, as in its paper."""


Solution = tuple[BackboneLayer, Compensation]


@dataclass
class Problem:
    """One layer, as every method gets it: W `(out, in)` float64, its configuration, and the statistics."""

    module: nn.Module
    config: PolarizeConfig
    statistics: Statistics

    @property
    def weight(self) -> torch.Tensor:
        return weight_matrix(self.module).detach().double()


def _path(weight: torch.Tensor, layer: BackboneLayer, covariance: torch.Tensor, rank: int) -> Compensation:
    """The best path beside a backbone layer."""
    return compensate(weight, weight - layer.dequantized().double(), covariance, rank)


def _added(problem: Problem, rank: int, covariance: torch.Tensor) -> Solution:
    layer = quantize_linear(problem.module, problem.config)
    return layer, _path(problem.weight, layer, covariance, rank)


def svd(problem: Problem, rank: int) -> Solution:
    """Truncated SVD of the error (LoRC of ZeroQuant-V2, arXiv 2303.08302; there the factors are 8-bit, here not)."""
    return _added(problem, rank, torch.eye(problem.weight.shape[1], dtype=torch.float64, device=problem.weight.device))


def lqer(problem: Problem, rank: int) -> Solution:
    """Error scaled by the mean magnitude of each input (L²QER, arXiv 2402.02446, equation 11)."""
    magnitude = problem.statistics.magnitude
    assert magnitude is not None
    s = magnitude.double().clamp(min=1e-12)
    s = s / (s.min() * s.max()).sqrt()
    return _added(problem, rank, torch.diag(s.square()))


def qera_approx(problem: Problem, rank: int) -> Solution:
    """Error scaled by the root mean square of each input (QERA-approx, arXiv 2410.06040, theorem 2)."""
    return _added(problem, rank, torch.diag(problem.statistics.h.diagonal().double().clamp(min=1e-12)))


def qera_exact(problem: Problem, rank: int) -> Solution:
    """Full input covariance (QERA-exact, arXiv 2410.06040, theorem 1; EoRA, arXiv 2410.21271)."""
    return _added(problem, rank, damped(problem.statistics.h))


def loftq(problem: Problem, rank: int) -> Solution:
    """
    Alternate Q of W - B A with B A of W - Q (LoftQ, arXiv 2310.08659, algorithm 1).

    Our own lines: the ones of peft 0.21 need CUDA.
    """
    weight, bias = problem.weight, problem.module.bias
    eye = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    rest = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    rest.bias = bias  # type: ignore[assignment]
    path = torch.zeros_like(weight)
    for _ in range(LOFTQ_ROUNDS):
        rest.weight = nn.Parameter((weight - path).to(problem.module.weight), requires_grad=False)  # type: ignore[arg-type]
        layer = quantize_linear(rest, problem.config)
        solution = _path(weight, layer, eye, rank)
        path = solution.b.double() @ solution.a.double()
    return layer, solution


METHODS: dict[str, Callable[[Problem, int], Solution]] = {
    "SVD (LoRC)": svd,
    "LoftQ (our implementation)": loftq,
    "LQER": lqer,
    "QERA-approx": qera_approx,
    "QERA-exact = EoRA": qera_exact,
}
BACKBONE, CLOSED, TRAINED = "backbone alone", "ours, closed form", "ours, trained"
UNCALIBRATED = (BACKBONE, "SVD (LoRC)", "LoftQ (our implementation)")


@torch.no_grad()
def with_method(
    model: PreTrainedModel, recipe: Recipe, statistics: dict[str, Statistics], method: str, rank: int
) -> PreTrainedModel:
    """Return a copy of the original with the backbone and the surrogates of a rival of ours."""
    copied = copy.deepcopy(model)
    plan = make_plan(copied, recipe.polarize_config(), replace(recipe, r=rank).surrogate_config())
    solutions = {}
    for name, module in logging.tqdm(plan.layers.items(), desc=f"{method}, rank {rank}", unit="layer"):
        known = statistics.get(name) or Statistics.unseen(module)
        problem = Problem(module, plan.quantizer.quantization_config, known)
        plan.backbone[name], solutions[name] = METHODS[method](problem, plan.ranks[name])
    install(copied, plan, solutions)
    return copied


def check_methods(methods: Sequence[str]) -> None:
    unknown = [method for method in methods if method not in COMPARED]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; known are {list(COMPARED)}")
    if BACKBONE not in methods:
        raise ValueError(f'compare_methods needs "{BACKBONE}": all others are measured against it')


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
    methods = recipe.compare_methods
    check_methods(methods)
    if recipe.cim is not None or recipe.deflated:
        raise ValueError(
            "compare measures models off any chip: leave cim and deflated out, or see hf-polarize cim sweep"
        )
    folder = Path(recipe.output_dir)
    prepare_folder(folder, recipe.overwrite or (folder / "comparison.json").is_file())
    calibration, evaluation = [load_data(name) for name in recipe.sources], load_data(recipe.evaluation)
    wanted = {recipe.max_tokens: list(dict.fromkeys([recipe.r, *recipe.compare_ranks]))}
    if min(recipe.compare_ranks, default=1) < 1:
        raise ValueError(f"compare_ranks must be at least 1; got {recipe.compare_ranks}")
    for tokens in recipe.compare_tokens:
        if tokens < recipe.window:
            raise ValueError(f"compare_tokens: {tokens} tokens hold no window of {recipe.window}")
        wanted.setdefault(tokens, [recipe.r])
    model, processor = load_model(recipe)
    plan = make_plan(model, recipe.polarize_config(), SurrogateConfig(r=max(wanted[recipe.max_tokens])))
    record = resumed(folder / "comparison.json", recipe)
    training = replace(recipe, train=(recipe.train or ["surrogate"]) if TRAINED in methods else None)
    batches, held_back = recipe_batches(replace(training, max_tokens=max(wanted)), model, calibration, processor)
    evaluator = Evaluator(model, recipe, evaluation, processor)
    results = record["results"]
    folder.mkdir(parents=True, exist_ok=True)
    record["original"] = asdict(evaluator.original)
    closed_form = recipe.closed_form()
    yardstick = HeldOut(model, held_back) if closed_form.chooses else None
    sensitive = {"gradients": closed_form.gradients, "weigh_tokens": closed_form.weigh_tokens}

    def done(method: str, rank: int, tokens: int) -> bool:
        return any((r["method"], r["rank"], r["tokens"]) == (method, rank, tokens) for r in results)

    def keep(method: str, rank: int, tokens: int, measured: PreTrainedModel) -> None:
        quality = evaluator.held_out.measure(measured, f"{method}, rank {rank}, {tokens} tokens")
        results.append({"method": method, "rank": rank, "tokens": tokens, **asdict(quality)})
        write_json(folder / "comparison.json", record)

    @lru_cache(maxsize=1)  # ours of all tokens are wanted once more for other ranks
    def statistics(tokens: int, **options: bool) -> dict[str, Statistics]:
        parts = layer_statistics(
            model,
            at_most(batches, tokens, model),
            plan.layers,
            2**62,
            seed=recipe.seed,
            backbone=plan.quantized(),
            **options,
        )
        return {name: known for part in parts for name, known in part.items()}

    def ours(rank: int, known: dict[str, Statistics]) -> PreTrainedModel:
        copied = copy.deepcopy(model)
        its = make_plan(copied, recipe.polarize_config(), replace(recipe, r=rank).surrogate_config())
        outcome = carry_out(copied, its, [known], closed_form, yardstick, keep_losses=bool(recipe.layer_weight))
        copied.layer_losses = outcome.losses
        return copied

    main = (recipe.r, recipe.max_tokens)
    if TRAINED in methods and not done(TRAINED, *main):
        with tempfile.TemporaryDirectory(prefix="hf-polarize-") as scratch:
            fresh = at_most(batches, recipe.train_tokens, model)
            data, held_out = (teacher_dataset(model, part, scratch) for part in (fresh, held_back))
            student = ours(recipe.r, statistics(recipe.max_tokens, **sensitive))
            if CLOSED in methods and not done(CLOSED, *main):
                keep(CLOSED, *main, student)
            train(training, student, data, held_out, scratch)
        keep(TRAINED, *main, student)
        del student
    for tokens, ranks in wanted.items():
        todo = [(m, r) for r in ranks for m in methods
                if m != TRAINED and not done(m, r, tokens) and (m not in UNCALIBRATED or tokens == recipe.max_tokens)
                and (m != BACKBONE or r == recipe.r)]  # fmt: skip
        known = statistics(tokens, **sensitive) if any(method == CLOSED for method, _ in todo) else {}
        theirs = statistics(tokens) if any(method in METHODS for method, _ in todo) else {}
        for method, rank in todo:
            if method == BACKBONE:
                with rounded_backbone(model, plan):
                    keep(method, rank, tokens, model)
            elif method == CLOSED:
                keep(method, rank, tokens, ours(rank, known))
            else:
                keep(method, rank, tokens, with_method(model, recipe, theirs, method, rank))
    write_comparison(folder, record, recipe, evaluator.protocol, command)
    return record


def write_comparison(folder: Path, record: dict[str, Any], recipe: Recipe, protocol: str, command: str) -> None:
    """Write the table and the plots of a comparison."""
    rank, tokens = recipe.r, recipe.max_tokens
    original = record["original"]
    found = {(r["method"], r["rank"], r["tokens"]): r for r in record["results"]}
    backbone = found[BACKBONE, rank, tokens]
    rows = [["original", f"{original['loss']:.4f}", "0", "", ""]]
    for method in COMPARED:
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
    trained = f", trained on {recipe.train_tokens} of it" if (TRAINED, rank, tokens) in found else ""
    text = f"""# {recipe.source()[2].rpartition("/")[2]}: {recipe.backbone.upper()}, rank {rank}, side by side

{table}

± is one standard error of the paired difference to the backbone alone, over windows. {protocol} Calibrated on at most
{tokens} tokens of {recipe.calibration_name}{trained}. All methods run as quantized layers with a path
beside each.

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

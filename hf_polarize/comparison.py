"""The rivals and ours, side by side in one run: same model, same data, same ranks, same evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .backbone import quantize_linear, weight_matrix
from .calibration import Statistics
from .compensation import compensate, damped, leading_path
from .configuration import PolarizeConfig
from .evaluation import HeldOut, Quality
from .formats import BackboneLayer
from .requantization import requantize

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
    return q + leading_path(problem.weight - q, covariance, rank)[0]


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
        path = leading_path(weight - q, eye, rank)[0]
    return q + path


def ours(problem: Problem, rank: int) -> torch.Tensor:
    """Codes and scales chosen for the surrogate (see [`~hf_polarize.requantization.requantize`]), full covariance."""
    layer, h = problem.backbone(), damped(problem.statistics.h)
    requantize(layer, problem.weight, h, rank)
    q = layer.dequantized().double()
    solution = compensate(problem.weight, problem.weight - q, h, rank)
    return q + solution.b.double() @ solution.a.double()


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
            value = METHODS[method](Problem(module, config, statistics[name]), rank)
            matrix = value.T if isinstance(module, Conv1D) else value
            module.weight.data = matrix.to(kept[name]).contiguous()  # type: ignore[union-attr, arg-type]
        return held_out.measure(model, method)
    finally:
        for name, module in layers.items():
            module.weight.data = kept[name]  # type: ignore[union-attr]


def comparison_rows(original: Quality, backbone: Quality, qualities: dict[str, Quality]) -> Iterator[dict[str, Any]]:
    """Yield, for each method, its measures and the mean and paired standard error over windows of what it wins."""
    gap = backbone.loss - original.loss
    for name, quality in qualities.items():
        won = torch.tensor(backbone.window_losses) - torch.tensor(quality.window_losses)
        error = float(won.std() / math.sqrt(len(won))) if len(won) > 1 else math.inf
        yield {
            "method": name,
            "loss": quality.loss,
            "kl": quality.kl,
            "won": float(won.mean()),
            "won_standard_error": error,
            "gap_recovered": (backbone.loss - quality.loss) / gap if gap else None,
            "gap_recovered_standard_error": error / abs(gap) if gap else None,
        }


def check_methods(methods: Sequence[str]) -> None:
    unknown = [method for method in methods if method not in (*METHODS, TRAINED)]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; known are {[*METHODS, TRAINED]}")

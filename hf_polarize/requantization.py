"""Better values inside the backbone's formats: block scales and codes chosen for the inputs that a layer sees.

The codebook of a format is fixed, its scales and codes are free, and better ones cost nothing at run time. Tensors
only, no model. A weight is `(out, in)`; its scales stand for blocks of neighbouring weights in row-major order.
"""

from __future__ import annotations

from functools import cached_property

import torch

from .compensation import leading_path
from .formats import BackboneLayer

FEEDBACK_BLOCK = 64
"""Columns that are rounded before their errors reach all later columns in one product."""

SEARCHED = (0.9,)
"""
Scales that are tried for a block before the first round, as multiples of the format's own. The rounds refit them; with
31 tries from 0.6 to 1.05, fifteen layers of SmolLM2 ended with 2 % more squared error, in nearly twice the time.
"""


def spread(scales: torch.Tensor, shape: torch.Size, block_size: int) -> torch.Tensor:
    """Return the scale of every weight, `(out, in)`."""
    return scales.repeat_interleave(block_size)[: shape.numel()].view(shape)


def nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest level of each value; `levels` ascend."""
    return torch.bucketize(values.contiguous(), (levels[1:] + levels[:-1]) / 2)


def search_scales(
    weight: torch.Tensor,
    scales: torch.Tensor,
    candidates: torch.Tensor,
    levels: torch.Tensor,
    block_size: int,
    importance: torch.Tensor,
) -> torch.Tensor:
    """
    Choose the scale of each block that rounds its weights best for the inputs that they meet.

    The scale s of a block minimises sum_j h_j (w_j - s level(w_j / s))^2, h the diagonal of the input covariance.

    Args:
        weight (`torch.Tensor` of shape `(out, in)`): W, float32; `in` is a multiple of the block size.
        scales (`torch.Tensor` of shape `(blocks,)`): those of the format's own rounding, kept where none is better.
        candidates (`torch.Tensor` of shape `(n, blocks)`): as they would be stored.
        levels (`torch.Tensor`): ascending, of the format, in -1..1.
        block_size (`int`): weights per scale.
        importance (`torch.Tensor` of shape `(in,)`): h.

    Returns:
        `torch.Tensor` of shape `(blocks,)`.
    """
    w = weight.reshape(-1, block_size)
    h = importance.to(w).expand_as(weight).reshape(-1, block_size)
    best, least = scales, torch.full_like(scales, torch.inf)
    for candidate in (scales, *candidates):
        s = torch.where(candidate == 0, 1.0, candidate)[:, None]
        error = ((levels[nearest(w / s, levels)] * s - w).square() * h).sum(1)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


class Inputs:
    """
    What the solvers need of a layer's inputs, computed once for all layers that have the same.

    Args:
        covariance (`torch.Tensor` of shape `(in, in)`): H = E[x x^T], [`~hf_polarize.compensation.damped`], float64.
    """

    def __init__(self, covariance: torch.Tensor) -> None:
        self.covariance = covariance

    @cached_property
    def root(self) -> torch.Tensor:
        """L of H = L L^T, float32."""
        return torch.linalg.cholesky(self.covariance).float()  # type: ignore[no-any-return]

    @cached_property
    def feedback(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The order of the columns, most important first, and the upper factor U of H^(-1) = U^T U in that order."""
        order = torch.argsort(self.covariance.diagonal(), descending=True, stable=True)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.covariance[order][:, order]))
        return order, torch.linalg.cholesky(inverse, upper=True).float()


def round_with_feedback(
    weight: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, order: torch.Tensor, upper: torch.Tensor
) -> torch.Tensor:
    """
    Round a weight column by column, and let the columns to come make up for the error of each.

    After column j the others move by -(w_j - q_j) U_jk / U_jj, which is the best answer to its error for
    tr((W - Q) H (W - Q)^T) (GPTQ, arXiv 2210.17323, section 3).

    Args:
        weight (`torch.Tensor` of shape `(out, in)`): float32.
        scales (`torch.Tensor` of shape `(out, in)`): of every weight, see [`spread`].
        levels (`torch.Tensor`): ascending, of the format, in -1..1.
        order, upper (`torch.Tensor`): [`Inputs.feedback`].

    Returns:
        `torch.Tensor` of shape `(out, in)`: indices of levels.
    """
    s = torch.where(scales == 0, 1.0, scales)[:, order].T.contiguous()
    w = weight[:, order].T.contiguous()
    diagonal, middles, inverse = upper.diagonal().tolist(), (levels[1:] + levels[:-1]) / 2, 1 / s
    codes = torch.empty_like(w, dtype=torch.int64)
    for start in range(0, len(w), FEEDBACK_BLOCK):
        end = min(start + FEEDBACK_BLOCK, len(w))
        errors = torch.empty_like(w[start:end])
        for j in range(start, end):
            torch.bucketize(w[j] * inverse[j], middles, out=codes[j])
            error = torch.sub(w[j], levels[codes[j]] * s[j], out=errors[j - start]).div_(diagonal[j])
            w[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
        w[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def refit_scales(
    target: torch.Tensor, units: torch.Tensor, scales: torch.Tensor, covariance: torch.Tensor, block_size: int
) -> torch.Tensor:
    """
    Choose the scales that are best for given codes and all inputs at once.

    Row by row, least squares of (t - s U) H (t - s U)^T over the scales s of the row's blocks, where row b of U holds
    the levels of block b and zeros elsewhere: (U H U^T) s = U H t. A hundredth of the diagonal pulls towards the old
    scales, which stay where a block has no level but zero.

    Args:
        target (`torch.Tensor` of shape `(out, in)`): what the scaled levels shall come near.
        units (`torch.Tensor` of shape `(out, in)`): the level of each weight.
        scales (`torch.Tensor` of shape `(blocks,)`): the old ones.
        covariance (`torch.Tensor` of shape `(in, in)`): H.
        block_size (`int`): weights per scale; `in` is a multiple of it.

    Returns:
        `torch.Tensor` of shape `(blocks,)`, float32.
    """
    out_features, in_features = target.shape
    blocks = in_features // block_size
    h = covariance.to(target)
    right = (units * (target @ h)).view(out_features, blocks, block_size).sum(-1)
    normal = target.new_empty(out_features, blocks, blocks)
    for b in range(blocks):
        start = b * block_size
        seen = units[:, start : start + block_size] @ h[start : start + block_size, start:]  # row b of U, times H
        products = seen.mul_(units[:, start:]).view(out_features, blocks - b, block_size).sum(-1)
        normal[:, b, b:] = normal[:, b:, b] = products
    pull = 0.01 * normal.diagonal(dim1=1, dim2=2)
    pull = torch.where(pull > 0, pull, 1.0)
    normal += torch.diag_embed(pull)
    right += pull * scales.view(out_features, blocks)
    return torch.linalg.solve(normal, right).reshape(-1)  # type: ignore[no-any-return]


def requantize(
    layer: BackboneLayer,
    weight: torch.Tensor,
    inputs: Inputs,
    rank: int,
    rounds: int = 3,
    scale_search: bool = True,
    output_root: torch.Tensor | None = None,
) -> None:
    """
    Give a backbone layer the codes and scales that suit a rank-r path beside it, and the path that suits them.

    Coordinate descent on tr((W - Q - B A) H (W - Q - B A)^T): scales by [`search_scales`], then in each round the
    codes of W - B A by [`round_with_feedback`], the scales by [`refit_scales`], and B A by
    [`~hf_polarize.compensation.leading_path`]. The best iterate is kept, and nothing is written if that is the layer
    as it was. With G = C C^T the paths and the choice of the iterate go by tr(G X H X^T); codes and scales, row by
    row, by H alone. Everything is evaluated on the values as they are stored, double quantization included. A layer
    whose rows are no whole blocks is left as it is.

    Args:
        layer ([`BackboneLayer`]): holds W, quantized; changed in place.
        weight (`torch.Tensor` of shape `(out, in)`): W.
        inputs ([`Inputs`]): with H.
        rank (`int`): r.
        rounds (`int`): of alternation; with 0 the scales alone are searched.
        scale_search (`bool`): whether scales are chosen at all, or stay those of the format's own rounding.
        output_root (`torch.Tensor` of shape `(out, out)`, *optional*): C, lower triangular, float32.
    """
    w = weight.float()
    levels, block = layer.levels(), layer.block_size
    if w.shape[1] % block:
        # blocks run on from row to row, and bitsandbytes 0.50.2 reads them by row on CPUs (backends/cpu/ops.py:175)
        return
    scales = layer.block_scales()

    def left(quantized: torch.Tensor) -> tuple[torch.Tensor, float]:
        if output_root is None:
            return leading_path(w - quantized, inputs.root, rank)
        path, remaining = leading_path(output_root.T @ (w - quantized), inputs.root, rank)
        return torch.linalg.solve_triangular(output_root.T, path, upper=True), remaining

    path, least = left(layer.dequantized())
    best = None
    if scale_search:
        candidates = torch.stack([layer.storable(scales * factor) for factor in SEARCHED])
        searched = search_scales(w, scales, candidates, levels, block, inputs.covariance.diagonal())
        codes = nearest(w / spread(torch.where(searched == 0, 1.0, searched), w.shape, block), levels)
        new_path, remaining = left(levels[codes] * spread(searched, w.shape, block))
        if remaining < least:
            least, best, path, scales = remaining, (codes, searched), new_path, searched
    for _ in range(rounds):
        target = w - path
        codes = round_with_feedback(target, spread(scales, w.shape, block), levels, *inputs.feedback)
        units = levels[codes]
        if scale_search:
            scales = layer.storable(refit_scales(target, units, scales, inputs.covariance, block))
        path, remaining = left(units * spread(scales, w.shape, block))
        if remaining < least:
            least, best = remaining, (codes, scales)
    if best is not None:
        layer.store(*best)

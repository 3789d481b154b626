"""Codes of a weight, chosen together: what the error of each does to the output is made up for by the others.

The scales stay as they are. Tensors only, no model. A weight is `(out, in)`; its scales stand for blocks of
neighbouring weights in row-major order.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numba
import torch

TILE = 64
"""Rows and columns that are rounded before their errors reach all later ones in one product."""

SWEEPS = 3
"""Times that [`descend`] goes over a weight: of the predicted loss of ten layers of SmolLM2, one took 4 %, two 5 %."""


def spread(scales: torch.Tensor, shape: torch.Size, block_size: int) -> torch.Tensor:
    """Return the scale of every weight, `(out, in)`."""
    return scales.repeat_interleave(block_size)[: shape.numel()].view(shape)


def nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest level of each value; `levels` ascend."""
    middles, values = (levels[1:] + levels[:-1]) / 2, values.contiguous()
    if values.device.type != "cpu" or values.dtype != torch.float32 or middles.dtype != torch.float32:
        return torch.bucketize(values, middles)
    codes = torch.empty(values.shape, dtype=torch.int64)
    _find_levels(values.numpy().reshape(-1), middles.numpy(), codes.numpy().reshape(-1))
    return codes


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _level(value, middles):  # type: ignore[no-untyped-def]
    """Count the middles below a value: several at a time, and no branch to guess, unlike a binary search."""
    code = 0
    for middle in middles:
        code += value > middle
    return code


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _find_levels(values, middles, codes):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        codes[i] = _level(values[i], middles)


class Covariance:
    """
    A covariance, and its factor and inverse, computed once for all layers that share it.

    Args:
        matrix (`torch.Tensor` of shape `(n, n)`): H or G, [`~hf_polarize.compensation.damped`], float64.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self._factor: torch.Tensor | None = None
        self._inverse: torch.Tensor | None = None

    # no cached_property: before Python 3.12 all instances share its lock, and layers are solved side by side
    @property
    def factor(self) -> torch.Tensor:
        """L of H = L L^T, float64."""
        if self._factor is None:
            self._factor = torch.linalg.cholesky(self.matrix)
        return self._factor

    @property
    def inverse(self) -> torch.Tensor:
        """H^(-1), float64."""
        if self._inverse is None:
            self._inverse = torch.cholesky_inverse(self.factor)
        return self._inverse

    def freed(self, directions: torch.Tensor, share: float) -> Covariance:
        """
        Return that under which errors in some directions cost a share only: L (I - (1 - share) V V^T) L^T.

        Args:
            directions (`torch.Tensor` of shape `(n, r)`): V, orthonormal.
            share (`float`): above 0, so that the result has an inverse, H^(-1) + (1/share - 1) L^(-T) V V^T L^(-1).
        """
        v = directions.double()
        seen, back = self.factor @ v, torch.linalg.solve_triangular(self.factor.T, v, upper=True)
        result = Covariance(torch.addmm(self.matrix, seen, seen.T, alpha=share - 1))
        result._inverse = torch.addmm(self.inverse, back, back.T, alpha=1 / share - 1)
        return result

    def feedback(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the order to round in, most important first, and what the error of each does to those that come later.

        With H^(-1) = U^T U in that order, U upper triangular, it is U_jk / U_jj: float32, with ones on the diagonal.
        """
        order = torch.argsort(self.matrix.diagonal(), descending=True, stable=True)
        upper = torch.linalg.cholesky(self.inverse[order][:, order], upper=True)
        return order, (upper / upper.diagonal()[:, None]).float().contiguous()


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _round_tile(top, bottom, start, stop, rows, w, base, s, levels, middles, upper, codes, errors, left):  # type: ignore[no-untyped-def]
    """
    Round a tile row by row, each from left to right; `w` and `base` are the targets with and without column feedback.

    With `rows`, the factor of G, each row makes up for what is left of those above it in the tile.
    """
    for i in range(top, bottom):
        for k in range(top, i if len(rows) else top):
            for j in range(start, stop):
                moved = rows[k, i] * left[k, j]
                w[i, j] -= moved
                base[i, j] -= moved
        for j in range(start, stop):
            code = _level(w[i, j] / s[i, j], middles)
            rounded = levels[code] * s[i, j]
            error = w[i, j] - rounded
            codes[i, j], errors[i, j], left[i, j] = code, error, base[i, j] - rounded
            for k in range(j + 1, stop):
                w[i, k] -= error * upper[j, k]


def round_with_feedback(
    weight: torch.Tensor,
    scales: torch.Tensor,
    levels: torch.Tensor,
    inputs: Covariance,
    outputs: Covariance | None = None,
) -> torch.Tensor:
    """
    Round a weight value by value, and let those to come make up for the error of each.

    Once column j of a row is rounded, its later columns move by -(w_j - q_j) U_jk / U_jj, which is the best answer to
    that error for tr((W - Q) H (W - Q)^T) (GPTQ, arXiv 2210.17323, section 3). With G as well, for
    tr(G (W - Q) H (W - Q)^T), a finished row i moves the whole of each later row k by -(w_i - q_i) V_ik / V_ii, V the
    same of G: GPTQ for the Kronecker product of G and H, whose inverse has the factor of V and U. It goes tile by
    tile, on a CPU.

    Args:
        weight (`torch.Tensor` of shape `(out, in)`): float32.
        scales (`torch.Tensor` of shape `(out, in)`): of every weight, see [`spread`].
        levels (`torch.Tensor`): ascending, of the format, in -1..1.
        inputs ([`Covariance`]): H.
        outputs ([`Covariance`], *optional*): G.

    Returns:
        `torch.Tensor` of shape `(out, in)`: indices of levels.
    """
    (order, upper), device = inputs.feedback(), weight.device
    row_order, rows = (torch.arange(len(weight)), torch.empty(0, 0)) if outputs is None else outputs.feedback()
    picked = row_order.to(device)[:, None], order
    s = torch.where(scales == 0, 1.0, scales)[picked]
    w, s, levels, upper, rows = (
        tensor.to("cpu", torch.float32).contiguous() for tensor in (weight[picked], s, levels, upper, rows)
    )
    base, errors, left = w.clone(), torch.empty_like(w), torch.empty_like(w)
    codes = torch.empty(w.shape, dtype=torch.int64)
    tensors = (rows, w, base, s, levels, (levels[1:] + levels[:-1]) / 2, upper, codes, errors, left)
    arrays = [tensor.numpy() for tensor in tensors]  # the same memory

    def band(top: int, height: int) -> None:
        bottom = min(top + height, len(w))
        if len(rows) and top:
            moved = rows[:top, top:bottom].T @ left[:top]
            w[top:bottom] -= moved
            base[top:bottom] -= moved
        for start in range(0, w.shape[1], TILE):
            stop = min(start + TILE, w.shape[1])
            _round_tile(top, bottom, start, stop, *arrays)
            w[top:bottom, stop:].addmm_(errors[top:bottom, start:stop], upper[start:stop, stop:], alpha=-1)

    threads, height = _bands(len(w), outputs is None)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(band, range(0, len(w), height), itertools.repeat(height)))
    result = torch.empty_like(codes, device=device)
    result[picked] = codes.to(device)
    return result


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _descend_tile(top, bottom, rows, h, s, levels, middles, codes, pull, moved):  # type: ignore[no-untyped-def]
    """
    Give each value of a tile of whole rows the level that is best as long as all others stay as they are.

    `pull` is G X H of the tile as it was when the tile began, `moved` what has been added to X H since.
    """
    for i in range(top, bottom):
        row = i - top
        own = rows[row, i] if len(rows) else 1.0
        for k in range(row if len(rows) else 0):
            for j in range(h.shape[0]):
                pull[row, j] += rows[row, top + k] * moved[k, j]
        for j in range(h.shape[0]):
            old = codes[i, j]
            wanted = levels[old] + (pull[row, j] + own * moved[row, j]) / (own * h[j, j] * s[i, j])
            if (old == 0 or wanted > middles[old - 1]) and (old == len(middles) or wanted <= middles[old]):
                continue
            codes[i, j] = _level(wanted, middles)
            step = (levels[codes[i, j]] - levels[old]) * s[i, j]
            for k in range(h.shape[0]):
                moved[row, k] -= step * h[j, k]


def descend(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    levels: torch.Tensor,
    inputs: Covariance,
    outputs: Covariance | None = None,
) -> torch.Tensor:
    """
    Improve codes one at a time: cyclic coordinate descent on tr(G X H X^T), X = W - Q.

    A change of q_ij by d changes it by -2 d (G X H)_ij + d^2 G_ii H_jj, so the best level is the one nearest to
    q_ij + (G X H)_ij / (G_ii H_jj) (QuantEase, arXiv 2309.01885, section 3, there without G). It never gets worse
    where no scale is zero; a zero counts as 1. It goes over the weight `SWEEPS` times, row by row, on a CPU.

    Args:
        weight (`torch.Tensor` of shape `(out, in)`): float32.
        codes (`torch.Tensor` of shape `(out, in)`): indices of levels, for instance of [`round_with_feedback`].
        scales (`torch.Tensor` of shape `(out, in)`): of every weight, see [`spread`].
        levels (`torch.Tensor`): ascending, of the format, in -1..1.
        inputs ([`Covariance`]): H.
        outputs ([`Covariance`], *optional*): G.

    Returns:
        `torch.Tensor` of shape `(out, in)`: indices of levels.
    """
    device = weight.device
    w, s, levels, h = (
        tensor.to("cpu", torch.float32).contiguous()
        for tensor in (weight, torch.where(scales == 0, 1.0, scales), levels, inputs.matrix)
    )
    g = torch.empty(0, 0) if outputs is None else outputs.matrix.to("cpu", torch.float32)
    codes = codes.to("cpu", copy=True).contiguous()
    seen = (w - levels[codes] * s) @ h  # X H
    arrays = [tensor.numpy() for tensor in (h, s, levels, (levels[1:] + levels[:-1]) / 2, codes)]  # the same memory

    def band(top: int, height: int) -> None:
        bottom = min(top + height, len(w))
        rows = g[top:bottom].contiguous()
        pull = rows @ seen if len(rows) else seen[top:bottom].clone()
        moved = torch.zeros_like(pull)
        _descend_tile(top, bottom, rows.numpy(), *arrays, pull.numpy(), moved.numpy())
        seen[top:bottom] += moved

    threads, height = _bands(len(w), outputs is None)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(SWEEPS):
            list(pool.map(band, range(0, len(w), height), itertools.repeat(height)))
    return codes.to(device)


def _bands(rows: int, independent: bool) -> tuple[int, int]:
    """Return how many threads work on bands of rows, and how many rows a band has."""
    threads = torch.get_num_threads() if independent else 1  # rows that know nothing of each other go side by side
    return threads, -(-rows // threads) if independent else TILE

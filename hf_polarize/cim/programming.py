"""Writing a layer for the one chip that it is on: codes that make up for what its cells are."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch

from ..formats import BackboneLayer
from ..rounding import Covariance
from .chip import fabricate_plane
from .configuration import CIMConfig
from .planes import group_scales, weight_code

BAND = 64
"""Rows at a time."""


def codes_for_cells(
    layer: BackboneLayer, name: str, weight: torch.Tensor, inputs: Covariance, config: CIMConfig
) -> torch.Tensor:
    """
    Round a weight to what the cells of one chip make of each code, and let later cells make up for earlier ones.

    As in [`~hf_polarize.rounding.round_with_feedback`], with a codebook of its own for every weight: the sum of its
    cells, measured one by one, for each of the format's values. Block scales stay as they are.

    Args:
        layer ([`~hf_polarize.formats.BackboneLayer`]): the backbone's.
        name (`str`): of the layer; its cells depend on it.
        weight (`torch.Tensor` of shape `(out, in)`): W.
        inputs ([`~hf_polarize.rounding.Covariance`]): H of what the array sees.
        config ([`CIMConfig`]): of the chip.

    Returns:
        `torch.Tensor` of shape `(out, in)`: indices of levels, int64.
    """
    levels = layer.levels().cpu()
    code = weight_code(config, levels)
    group, share = group_scales(layer.block_scales().cpu(), layer.block_size, weight.shape, config)
    group = group / config.drift
    grid = code.unit if config.on_grid else 0.0
    # what each cell holds if -1, 0 or 1 is written into it
    made = [
        [fabricate_plane(torch.full(share.shape, float(value)), config, name, p, significance) for value in (-1, 0, 1)]
        for p, significance in enumerate(code.significance.tolist())
    ]
    order, upper = (tensor.cpu() for tensor in inputs.feedback())
    upper = upper.float().contiguous()
    rest = weight.float().cpu()[:, order]
    chosen = torch.empty(weight.shape, dtype=torch.int64)

    def in_order(values: torch.Tensor) -> torch.Tensor:
        """Take `(..., rows, groups, rows of a group)` to `(..., rows, in)`, contiguous."""
        return values.flatten(-2)[..., order].contiguous()

    def choose(top: int) -> None:
        band = slice(top, top + BAND)
        held = []
        for planes in made:
            one = torch.stack([plane.cells[band].float() for plane in planes]) * (planes[0].unit / code.unit)
            gain = group[band] if planes[0].gain is None else group[band] * planes[0].gain.T[band]
            held.append(in_order(one * (planes[0].significance * gain)[..., None]))
        _choose(
            torch.stack(held).numpy(), code.cells.numpy(), levels.numpy(), grid, in_order(share[band]).numpy(),
            rest[band].numpy(), upper.numpy(), chosen[band].numpy(),
        )  # fmt: skip

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(choose, range(0, len(weight), BAND)))
    codes = torch.empty_like(chosen)
    codes[:, order] = chosen
    return codes.to(weight.device)


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _choose(held, cells, levels, grid, share, w, upper, codes):  # type: ignore[no-untyped-def]
    """
    Fill `codes` (rows, in) for targets `w` (rows, in), which end as rubbish.

    `held` (planes, 3, rows, in): what a cell adds to its weight if -1, 0 or 1 is written into it. `cells` (values,
    planes): what is written for each value of the array, which is that of a level, or that of the nearest number of
    a grid of `grid` steps to a `share` (rows, in) of it. All but `codes` and `cells` is float32.
    """
    planes, features = held.shape[0], w.shape[1]
    for i in range(w.shape[0]):
        for j in range(features):
            best, least, value = 0, np.float32(np.inf), np.float32(0)
            for k in range(len(levels)):
                index = int(np.rint(levels[k] * share[i, j] * np.float32(grid)) + grid) if grid else k
                made = np.float32(0)
                for p in range(planes):
                    made += held[p, 1 + cells[index, p], i, j]
                distance = abs(w[i, j] - made)
                if distance < least:
                    best, least, value = k, distance, made
            codes[i, j] = best
            error = (w[i, j] - value) / upper[j, j]
            for m in range(j + 1, features):
                w[i, m] -= error * upper[j, m]

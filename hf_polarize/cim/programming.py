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

CHUNK = 2**24
"""Values of all codes at a time."""


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
    # what each cell holds if -1, 0 or 1 is written into it
    made = []
    for p in range(len(code.significance)):
        planes = [
            fabricate_plane(torch.full(share.shape, float(value)), config, name, p, float(code.significance[p]))
            for value in (-1, 0, 1)
        ]
        gain = 1 if planes[0].gain is None else planes[0].gain.T[..., None]
        made.append(torch.stack([plane.cells.float() * plane.unit * gain for plane in planes]))
    order, upper = (tensor.cpu() for tensor in inputs.feedback())
    upper = upper.float().contiguous()
    rest = weight.float().cpu()[:, order]
    chosen = torch.empty(weight.shape, dtype=torch.int64)
    height = max(1, CHUNK // (len(levels) * share[0].numel()))

    def choose(top: int) -> None:
        band = slice(top, top + height)
        values = torch.zeros(len(levels), *share[band].shape)
        index = torch.arange(len(levels)).view(-1, 1, 1, 1).expand(values.shape)
        if config.mapping == "grid":
            index = (levels.view(-1, 1, 1, 1) * share[band] * code.unit).round().long() + int(code.unit)
        for p, cells in enumerate(made):
            written = code.cells[:, p][index]
            low, none, high = cells[:, band]
            held = torch.where(written > 0, high, torch.where(written < 0, low, none))
            values.add_(held, alpha=float(code.significance[p]))
        values = (values * (group[band] / code.unit)[..., None]).flatten(2)[..., order]
        _choose(values.numpy(), rest[band].numpy(), upper.numpy(), chosen[band].numpy())

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(choose, range(0, len(weight), height)))
    codes = torch.empty_like(chosen)
    codes[:, order] = chosen
    return codes.to(weight.device)


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _choose(values, w, upper, codes):  # type: ignore[no-untyped-def]
    """Fill `codes` (rows, in) from `values` (levels, rows, in) and targets `w` (rows, in), which end as rubbish."""
    features = w.shape[1]
    for i in range(w.shape[0]):
        for j in range(features):
            best, least = 0, np.inf
            for k in range(values.shape[0]):
                distance = abs(w[i, j] - values[k, i, j])
                if distance < least:
                    best, least = k, distance
            codes[i, j] = best
            error = (w[i, j] - values[best, i, j]) / upper[j, j]
            for m in range(j + 1, features):
                w[i, m] -= error * upper[j, m]

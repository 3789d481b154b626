"""Numbers as bit planes: integers of inputs and weights, and the 16 values of NF4, as what cells and drivers hold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch

from .configuration import CIMConfig

LEARNED_SIGNIFICANCES = {
    4: (-0.661421, -0.297891, 0.456953, 0.561608),
    5: (-1.260835, -0.175614, 0.250635, 0.614644, 0.732513),
    6: (-0.525090, -0.476048, -0.276396, -0.173525, 0.080845, 1.089613),
    7: (-0.527063, -0.472771, -0.224026, -0.094569, -0.044445, 0.606068, 0.912384),
}
"""
Real significances of binary planes whose sums come nearest to the 16 values of NF4, on Gaussian weights.

Least squares, alternating between the nearest sum for each value and the significances for these sums, the values
weighed by how often and with which scales they occur; the best of 20000 random starts.
"""


def integer_planes(values: torch.Tensor, bits: int, encoding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Take integers apart into planes: `values = sum_i coefficients[i] * planes[i]`, exactly.

    Args:
        values (`torch.Tensor`): integers within `±(2^(bits-1) - 1)`, any dtype; `bits` is at most 8.
        bits (`int`): with the sign.
        encoding (`str`): `"twos_complement"`: `bits` planes of 0 and 1, the last one counts `-2^(bits-1)`.
            `"sign_magnitude"`: `bits - 1` planes of -1, 0 and 1.

    Returns:
        The planes, `(planes, *values.shape)`, int8, and their coefficients, `(planes,)`, float64.
    """
    signed = encoding == "sign_magnitude"
    count = bits - 1 if signed else bits
    coefficients = 2.0 ** torch.arange(count, dtype=torch.float64, device=values.device)
    whole = values.to(torch.int8)
    magnitude = whole.abs() if signed else whole
    planes = torch.stack([(magnitude >> i) & 1 for i in range(count)])
    if signed:
        return planes * whole.sign(), coefficients
    coefficients[-1] *= -1
    return planes, coefficients


def quantized_inputs(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Round each token to signed integers: `q = round(x / s)`, `s = max |x| / (2^(bits-1) - 1)`.

    Args:
        x (`torch.Tensor` of shape `(tokens, features)`): floating point.
        bits (`int`): with the sign.

    Returns:
        q, float32, and s, `(tokens, 1)`, float32; 0 for a token of zeros, not finite for one that isn't.
    """
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / scale.masked_fill(scale == 0, 1.0)).round_(), scale


@dataclass(frozen=True)
class WeightCode:
    """
    What the cells hold for each value that a weight can have.

    Attributes:
        cells (`torch.Tensor` of shape `(values, planes)`): int8, 0 and 1, or -1, 0 and 1.
        significance (`torch.Tensor` of shape `(planes,)`): float64; a value is executed as `cells @ significance`.
        unit (`float`): the value 1 of the format, in those terms.
    """

    cells: torch.Tensor
    significance: torch.Tensor
    unit: float

    @property
    def executed(self) -> torch.Tensor:
        """The values as the array executes them, in -1..1 of the format, `(values,)`, float64."""
        return self.cells.double() @ self.significance / self.unit


@lru_cache(maxsize=32)
def _grid_code(bits: int, encoding: str, cell_variance: float = 0.0) -> WeightCode:
    """
    Give each integer n its cells, or those of another one, k, if that is expected to err less.

    The least (n - k)^2 + cell_variance * sum of the squared significances of the cells of k that are not 0.
    """
    largest = 2 ** (bits - 1) - 1
    integers = torch.arange(-largest, largest + 1)
    planes, significance = integer_planes(integers, bits, encoding)
    noise = cell_variance * (significance.square() @ planes.double().square())
    distance = (integers[:, None] - integers).double().square()
    return WeightCode(planes[:, (distance + noise).argmin(1)].T.contiguous(), significance, float(largest))


def _learned_code(levels: torch.Tensor, count: int) -> WeightCode:
    """Give each level the nearest sum of some of the learned significances."""
    significance = torch.tensor(LEARNED_SIGNIFICANCES[count], dtype=torch.float64)
    choices = torch.tensor(list(product((0, 1), repeat=count)), dtype=torch.float64)
    nearest = (levels.double()[:, None] - choices @ significance).abs().argmin(1)
    return WeightCode(choices[nearest].to(torch.int8), significance, 1.0)


def _one_hot_code(levels: torch.Tensor) -> WeightCode:
    planes = torch.nonzero(levels).flatten()
    cells = (torch.arange(len(levels))[:, None] == planes).to(torch.int8)
    return WeightCode(cells, levels.double()[planes], 1.0)


def weight_code(config: CIMConfig, levels: torch.Tensor) -> WeightCode:
    """
    Return the code of a format's values on this chip.

    Args:
        config ([`CIMConfig`]): of the chip.
        levels (`torch.Tensor` of shape `(values,)`): of the format, ascending in -1..1. The mappings `"grid"` and
            `"quiet"` have integers of their own instead, -largest..largest.
    """
    if config.on_grid:
        # an active cell errs by its spread and where it is stuck at 0; stuck at 1 it is right, and one that is 0 isn't
        stuck = config.stuck_at_zero + (config.stuck_at_one if config.signed else -config.stuck_at_one)
        variance = config.cell_variance + stuck if config.mapping == "quiet" else 0.0
        return _grid_code(config.weight_bits, config.encoding, variance)
    levels = levels.cpu()
    if len(levels) != 16:
        raise ValueError(f'cim: mapping="{config.mapping}" is of the 16 values of NF4; an INT8 backbone takes "grid"')
    return _learned_code(levels, config.weight_bits) if config.mapping == "learned" else _one_hot_code(levels)


def group_scales(
    scales: torch.Tensor, block_size: int, shape: torch.Size, config: CIMConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the scale of each group of rows, the largest of its blocks, and the share of it that each weight has.

    The scale of a group of zeros is 0: whatever its columns read, nothing is added.

    Args:
        scales (`torch.Tensor` of shape `(blocks,)`): of each `block_size` neighbours in row-major order.
        block_size (`int`): of the format.
        shape (`torch.Size`): of the weight, `(out, in)`.
        config ([`CIMConfig`]): of the chip.

    Returns:
        `(out, groups)` and `(out, groups, rows)`, float32.
    """
    out_features, in_features = shape
    groups = -(-in_features // config.rows)
    each = scales.float().repeat_interleave(block_size)[: shape.numel()].view(shape)
    each = torch.nn.functional.pad(each, (0, groups * config.rows - in_features))
    each = each.view(out_features, groups, config.rows)
    group = each.gather(-1, each.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return group, each / torch.where(group != 0, group, 1.0)[..., None]


def grouped_weights(
    units: torch.Tensor, scales: torch.Tensor, block_size: int, config: CIMConfig, levels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cut a weight into groups of rows with one digital scale per output, and code it.

    Args:
        units (`torch.Tensor` of shape `(out, in)`): values of the codes in -1..1.
        scales (`torch.Tensor` of shape `(blocks,)`): of each `block_size` neighbours in row-major order.
        block_size (`int`): of the format.
        config ([`CIMConfig`]): of the chip.
        levels (`torch.Tensor` of shape `(values,)`): of the format.

    Returns:
        Indices into the values of [`weight_code`], `(out, groups, rows)`, int16, padded with the index of zero; and
        the scale of each group for a count of 1, `(out, groups)`, float32.

    Raises:
        ValueError: If a mapping to other values than a grid meets groups that blocks do not line up with.
    """
    in_features = units.shape[1]
    group, share = group_scales(scales, block_size, units.shape, config)
    units = torch.nn.functional.pad(units.float(), (0, share[0].numel() - in_features)).view(share.shape)
    code = weight_code(config, levels)
    if config.on_grid:
        indices = (units * share * code.unit).round() + code.unit
    else:
        if bool(((share != 1) & (share != 0)).any()):
            raise ValueError(
                f'cim: mapping="{config.mapping}" needs groups of rows with one scale: blocks of {block_size} weights '
                f'do not line up with rows={config.rows} of {in_features} inputs; use the mapping "grid"'
            )
        nearest = torch.bucketize(units, (levels[1:] + levels[:-1]).to(units) / 2)
        indices = nearest.float()
    return indices.to(torch.int16), group / code.unit

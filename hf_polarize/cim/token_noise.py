"""How loud the noise of a token is: by the rows that the bit planes of its integers drive."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numba
import numpy as np
import torch

LANE = 255
"""Largest count of eight bits."""


@dataclass
class TokenNoise:
    """
    The noise of a token relative to that of a typical one, from the rows that the planes of its integers drive.

    Attributes:
        share (`torch.Tensor` of shape `(groups, planes, rows + 1)`): what a plane that drives so many rows of a group
            adds to the variance, float32.
        copies (`torch.Tensor` of shape `(planes - 1, rows + 1)`, *optional*): in two's complement, the part of the
            variance of the last plane that goes again with a plane that differs from it in so many rows, float32.
    """

    share: torch.Tensor
    copies: torch.Tensor | None

    def __call__(self, q: torch.Tensor) -> torch.Tensor:
        """Return the standard deviation for integers `(tokens, in)`, `(tokens, 1)`, float32."""
        fits = q.device.type == "cpu" and self.share.shape[2] <= 8 * LANE
        variance = self._variance_on_cpu(q) if fits else self._variance(q)
        return variance.sqrt_()[:, None]

    def _variance_on_cpu(self, q: torch.Tensor) -> torch.Tensor:
        """Do what [`_variance`] does, in one pass."""
        variance = self.share.new_empty(len(q))
        copies = None if self.copies is None else self.copies.numpy()
        _add_variances(q.to(torch.int8).numpy(), self.share.numpy(), copies, variance.numpy())
        return variance

    def _variance(self, q: torch.Tensor) -> torch.Tensor:
        groups, planes, numbers = self.share.shape
        kind = "magnitude" if self.copies is None else "bits"  # without an ADC both add the same
        share = _looked_up(self.share, driven_rows(q, groups, numbers - 1, planes, kind))
        variance = share.sum(-1)
        if self.copies is not None:
            differing = driven_rows(q, groups, numbers - 1, planes - 1, "flips")
            gone = share[..., -1] * _looked_up(self.copies[None], differing).sum(-1)
            variance = torch.maximum(variance - gone, share[..., -1] / 4 ** (planes - 1))
        return variance.sum(1)

    def to(self, device: torch.device) -> TokenNoise:
        return TokenNoise(self.share.to(device), None if self.copies is None else self.copies.to(device))


def _looked_up(table: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Return `table[g, p, at[..., g, p]]`; a table of one group is that of all."""
    groups, planes, numbers = table.shape
    first = torch.arange(groups * planes, device=at.device).view(groups, planes) * numbers
    return table.flatten()[at + first]


@lru_cache(maxsize=8)
def _spread_bits(planes: int, kind: str, device: torch.device) -> torch.Tensor:
    """Return the bits of the integers -128..127, eight bits apart in one int64 each."""
    values = torch.arange(-128, 128)
    values = {"magnitude": values.abs(), "bits": values, "flips": torch.where(values < 0, ~values, values)}[kind]
    return sum(((values >> i) & 1) << (8 * i) for i in range(planes)).to(device)  # type: ignore[union-attr]


def driven_rows(q: torch.Tensor, groups: int, rows: int, planes: int, kind: str) -> torch.Tensor:
    """
    Count the rows of each group that each plane of the inputs drives.

    Args:
        q (`torch.Tensor` of shape `(tokens, in)`): integers of [`~hf_polarize.cim.planes.quantized_inputs`].
        groups, rows (`int`): of the array; rows that fill the last group are not driven.
        planes (`int`): of the inputs.
        kind (`str`): `"magnitude"` for the planes of sign-magnitude, `"bits"` for those of two's complement, `"flips"`
            for where these differ from the sign.

    Returns:
        `torch.Tensor` of shape `(tokens, groups, planes)`, int64.
    """
    bits = _spread_bits(planes, kind, q.device)
    spread = bits[q.nan_to_num().clamp(-128, 127).int() + 128]
    spread = torch.nn.functional.pad(spread, (0, groups * rows - q.shape[1])).view(len(q), groups, rows)
    lanes = 8 * torch.arange(planes, device=q.device)
    pieces = spread.split(LANE, dim=-1)
    return sum((piece.sum(-1, keepdim=True) >> lanes) & LANE for piece in pieces)  # type: ignore[no-any-return]


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _count_bits(words, bit):  # type: ignore[no-untyped-def]
    """Count in how many of the bytes of `words`, uint64, a bit is set; there are at most [`LANE`] words."""
    lanes = np.uint64(0)
    for k in range(len(words)):
        lanes += (words[k] >> bit) & np.uint64(0x0101010101010101)
    pairs = np.uint64(0x00FF00FF00FF00FF)
    return (((lanes & pairs) + ((lanes >> np.uint64(8)) & pairs)) * np.uint64(0x0001000100010001)) >> np.uint64(48)


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _add_variances(q, share, copies, variance):  # type: ignore[no-untyped-def]
    """Fill `variance` (tokens,) in for `q` (tokens, in), int8, with the tables of [`TokenNoise`]."""
    groups, planes, numbers = share.shape
    rows = numbers - 1
    held = np.zeros(8 * -(-rows // 8), np.uint8)
    words = held.view(np.uint64)
    for t in range(q.shape[0]):
        total = np.float32(0)
        for g in range(groups):
            row = q[t, g * rows : min((g + 1) * rows, q.shape[1])]
            if len(row) < rows:
                held[:] = 0
            for k in range(len(row)):
                held[k] = abs(row[k]) if copies is None else row[k]
            own = np.float32(0)
            for i in range(planes):
                last = share[g, i, _count_bits(words, np.uint64(i))]
                own += last
            if copies is not None:
                for k in range(len(row)):
                    held[k] = row[k] ^ (row[k] >> 7)  # the bits that differ from the sign
                gone = np.float32(0)
                for i in range(planes - 1):
                    gone += copies[i, _count_bits(words, np.uint64(i))]
                own = max(own - last * gone, last / np.float32(4 ** (planes - 1)))
            total += own
        variance[t] = total

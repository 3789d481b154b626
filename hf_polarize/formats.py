"""The two formats of the backbone: bitsandbytes' own layers, made safe, and open to other values."""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, get_4bit_type
from torch import nn

NF4_BLOCK = 64
"""Weights per NF4 scale, as in every bitsandbytes checkpoint on the Hub."""


def fake_quantize(x: torch.Tensor, kind: str) -> torch.Tensor:
    """
    Round each token to a low-precision grid and return it in its own dtype.

    A token is a row along the last dimension and has one scale, s = max |x|. `"int8"`: round(127 x / s) s / 127.
    `"nf4"`: the nearest of the 16 values of the NF4 codebook (QLoRA, arXiv 2305.14314, appendix E) times s. The
    gradient passes straight through (arXiv 1308.3432).

    Args:
        x (`torch.Tensor` of shape `(..., features)`): floating point.
        kind (`str`): `"int8"` or `"nf4"`.

    Returns:
        `torch.Tensor` of the shape and dtype of `x`.
    """
    with torch.no_grad():
        scale = x.abs().amax(dim=-1, keepdim=True).float()
        unit = x.float() / torch.where(scale > 0, scale, 1.0)
        if kind == "int8":
            rounded = (unit * 127.0).round() / 127.0
        else:
            code = get_4bit_type("nf4", device=x.device)
            rounded = code[torch.bucketize(unit.contiguous(), (code[1:] + code[:-1]) / 2)]
        error = (rounded * scale).to(x.dtype) - x
    return x + error


class BackboneLayer(nn.Module):
    """What the two formats have in common: the class that stood here before, and the rounding of the input."""

    source_cls: type[nn.Module]
    activations: str | None = None
    chip: Any = None
    """The simulated array that takes the place of the product; [`~hf_polarize.cim.hook.attach_cim`] sets it."""
    deflation: Any = None
    """What the surrogate takes out of the input first; [`~hf_polarize.deflation.attach_deflation`] sets it."""
    in_features: int
    out_features: int
    weight: Any
    bias: nn.Parameter | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:  # an expert without a token; bitsandbytes' CPU kernel would end the process
            return x.new_zeros(*x.shape[:-1], self.out_features)
        if self.deflation is not None and (self.chip is not None or self.activations is not None):
            return self.deflation(self, x)  # type: ignore[no-any-return]
        return self.executed(x)

    def executed(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply as this layer is set to run: on a chip, with rounded inputs, or plainly."""
        x = x.contiguous()  # bitsandbytes' CPU kernel takes rows at their first stride
        if self.chip is not None:
            return self.chip(x, self.bias, self.training)  # type: ignore[no-any-return]
        return self.product(x if self.activations is None else fake_quantize(x, self.activations))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply with bitsandbytes: `(..., in_features)` to `(..., out_features)`."""
        return super().forward(x)  # type: ignore[no-any-return, misc]

    @abstractmethod
    def dequantized(self) -> torch.Tensor:
        """Return the weight, `(out_features, in_features)`, that the codes and scales as stored stand for."""

    @abstractmethod
    def scales(self) -> list[torch.Tensor]:
        """Return the floating-point scales that the format holds."""

    block_size: int
    """Weights per scale, neighbours in row-major order."""

    @abstractmethod
    def units(self) -> torch.Tensor:
        """Return the values of the codes in -1..1, `(out_features, in_features)`, float32: weights without scales."""

    @abstractmethod
    def levels(self) -> torch.Tensor:
        """Return the values that a code can stand for, ascending in -1..1, float32."""

    @abstractmethod
    def block_scales(self) -> torch.Tensor:
        """Return the scale of every block as the stored ones stand for it, `(blocks,)`, float32."""

    @abstractmethod
    def storable(self, scales: torch.Tensor) -> torch.Tensor:
        """Return what the layer would store for these scales, `(blocks,)` or any number of such rows."""

    @abstractmethod
    def store(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """
        Put other values in place.

        Args:
            codes (`torch.Tensor` of shape `(out_features, in_features)`): indices of [`levels`].
            scales (`torch.Tensor` of shape `(blocks,)`): float32, [`storable`].
        """


class _PackedProduct(torch.autograd.Function):
    """The product of a repacked NF4 layer, with the gradient towards its input that bitsandbytes leaves out."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: BackboneLinear4bit) -> torch.Tensor:
        ctx.layer = layer
        return bnb.nn.Linear4bit.forward(layer, x.detach())  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = grad_outputs
        return gradient @ ctx.layer.dequantized().to(gradient.dtype), None


class _ScaledProduct(torch.autograd.Function):
    """The product with an NF4 layer whose block scales are trained: with U the levels, dL/ds = sum (g^T x) U."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scales: torch.Tensor, layer: BackboneLinear4bit) -> torch.Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, scales)
        return x @ layer._scaled(scales).to(x.dtype).T  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, scales = ctx.saved_tensors
        (gradient,) = grad_outputs
        towards_x = gradient @ ctx.layer._scaled(scales).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return towards_x, None, None
        outer = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).float() * ctx.layer._scaled(torch.ones_like(scales))
        padded = torch.nn.functional.pad(outer.reshape(-1), (0, -outer.numel() % NF4_BLOCK))
        return towards_x, padded.view(-1, NF4_BLOCK).sum(1), None


class BackboneLinear4bit(BackboneLayer, bnb.nn.Linear4bit):
    """
    bitsandbytes' NF4 layer, made safe to save, train and move after it has run on a CPU with AVX512-BF16.

    There bitsandbytes repacks the weights at the first inference and rounds the scales to bfloat16, in place
    (functional.py:1676 of 0.50.2). Its way back re-quantizes nested scales and leaves plain ones transposed, and a
    repacked layer has no gradient. This class keeps the scales as stored and goes by them whenever the layer is saved,
    moved, trained or dequantized. What it computes in evaluation mode is bit for bit what bitsandbytes computes for an
    inference, whether gradients are asked for or not.
    """

    support_avx512bf16_for_cpu: bool
    _stored_state: bnb.functional.QuantState | None = None
    """The quantization state as stored, while the weights are repacked."""

    free: nn.Parameter | None
    """The block scales while they are trained, `(blocks,)`, float32."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_parameter("free", None)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if self.free is not None or (self.training and torch.is_autocast_enabled(x.device.type)):
            return self._trained_product(x)
        if self.training or x.device.type != "cpu":
            self.unpack()
        elif self.support_avx512bf16_for_cpu and (self.out_features % 32 or self.in_features % NF4_BLOCK):
            # the repacking only knows whole tiles; bitsandbytes alone fails here
            self.support_avx512bf16_for_cpu = False
        elif self.support_avx512bf16_for_cpu:
            if self._stored_state is None:
                self._stored_state = copy.copy(self.weight.quant_state)
            if x.requires_grad:
                return _PackedProduct.apply(x, self)  # type: ignore[no-any-return]
        return super().product(x)

    def _trained_product(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply with trained scales, or in autocast's dtype, which bitsandbytes leaves out of its backward pass."""
        self.unpack()
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else (self.compute_dtype or x.dtype)
        scales = self.free if self.free is not None else self.block_scales()
        result: torch.Tensor = _ScaledProduct.apply(x.to(dtype), scales, self)  # type: ignore[arg-type]
        if self.bias is not None:
            result = result + self.bias.to(result.dtype)
        return result if autocast else result.to(x.dtype)

    def _stored(self) -> tuple[torch.Tensor, bnb.functional.QuantState]:
        """Return the codes and the quantization state as stored, without a change to the layer."""
        state = self.weight.quant_state
        if self._stored_state is None:
            return self.weight.data, state
        if not getattr(state, "packing_format_for_cpu", False):
            return self.weight.data, self._stored_state
        codes, _ = _convert_weight_packed_for_cpu_inverse(self.weight.data, copy.copy(state))
        return codes, self._stored_state

    def unpack(self) -> None:
        """Put the stored codes and scales back if bitsandbytes has repacked them for this CPU."""
        if self._stored_state is not None:
            self.weight.data, state = self._stored()
            self.weight.quant_state = self.quant_state = state
            self._stored_state = None

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        self.unpack()
        if self.free is not None:  # what is saved is the format, with the scales that have been reached
            self._set_scales(self.free.detach())
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}free", None)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.unpack()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def dequantized(self) -> torch.Tensor:
        if self.free is not None:
            return self._scaled(self.free)
        codes, state = self._stored()
        return bnb.functional.dequantize_4bit(codes, state)  # type: ignore[no-any-return]

    def scales(self) -> list[torch.Tensor]:
        _, state = self._stored()
        return [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]

    block_size = NF4_BLOCK

    def levels(self) -> torch.Tensor:
        return get_4bit_type("nf4", device=self.weight.device)  # type: ignore[no-any-return]

    def units(self) -> torch.Tensor:
        self.unpack()
        return self._scaled(torch.ones_like(self.block_scales()))

    def block_scales(self) -> torch.Tensor:
        _, state = self._stored()
        if not state.nested:
            return state.absmax.float()  # type: ignore[no-any-return]
        return self._nested(state.absmax)

    def _nested(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the scales that the 8-bit codes of double quantization stand for."""
        _, state = self._stored()
        inner = state.state2
        steps = inner.absmax.repeat_interleave(inner.blocksize)[: codes.shape[-1]]
        return (inner.code[codes.long()] * steps + state.offset).float()  # type: ignore[no-any-return]

    def _nested_codes(self, scales: torch.Tensor) -> torch.Tensor:
        _, state = self._stored()
        inner = state.state2
        steps = inner.absmax.repeat_interleave(inner.blocksize)[: scales.shape[-1]]
        unit = (scales - state.offset) / torch.where(steps == 0, 1.0, steps)
        return torch.bucketize(unit, (inner.code[1:] + inner.code[:-1]) / 2).to(torch.uint8)

    def storable(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales of double quantization lie on the grid that its mean and its own scales, which stay, span."""
        return self._nested(self._nested_codes(scales)) if self._stored()[1].nested else scales

    def free_scales(self) -> nn.Parameter:
        """Make the block scales a parameter, `(blocks,)`, float32, that can be trained until [`fix_scales`]."""
        if self.chip is not None:
            raise ValueError("block scales are part of the chip that is attached; train them after detach_cim(model)")
        if self.free is None:
            self.unpack()
            self.free = nn.Parameter(self.block_scales().clone())
        return self.free

    def fix_scales(self) -> None:
        """Put trained block scales back into the format; with double quantization they are rounded to its grid."""
        if self.free is not None:
            trained, self.free = self.free.detach(), None
            self._set_scales(trained)
            if self.deflation is not None:
                self.deflation.refresh(self)

    def _scaled(self, scales: torch.Tensor) -> torch.Tensor:
        """Return the weight with other block scales, float32."""
        weight = self.weight
        return bnb.functional.dequantize_4bit(  # type: ignore[no-any-return]
            weight.data,
            bnb.functional.QuantState(
                absmax=scales.detach().float(), shape=weight.quant_state.shape, code=weight.quant_state.code,
                blocksize=NF4_BLOCK, quant_type="nf4", dtype=torch.float32,
            ),
        )  # fmt: skip

    def _set_scales(self, scales: torch.Tensor) -> None:
        state = copy.copy(self.weight.quant_state)
        state.absmax = self._nested_codes(scales) if state.nested else scales.to(state.absmax)
        self.weight.quant_state = self.quant_state = state

    def store(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        self.unpack()
        flat = codes.to(self.weight.device, torch.uint8).reshape(-1)
        if len(flat) % 2:
            flat = torch.cat([flat, flat.new_zeros(1)])
        packed = (flat[::2] << 4) | flat[1::2]  # the first of two neighbours in the high half
        self.weight.data = packed.view(self.weight.dtype).view(self.weight.shape)
        self._set_scales(scales.to(self.weight.device))


class BackboneLinear8bit(BackboneLayer, bnb.nn.Linear8bitLt):
    """bitsandbytes' INT8 layer with outlier threshold 0: weights per row, inputs per token, product in INT32."""

    state: bnb.MatmulLtState

    def scales(self) -> list[torch.Tensor]:
        # the largest magnitude of each row, (out_features,); bitsandbytes moves it at the first forward pass
        scale: torch.Tensor = self.weight.SCB if self.weight.SCB is not None else self.state.SCB
        return [scale]

    def dequantized(self) -> torch.Tensor:
        return bnb.functional.int8_vectorwise_dequant(self.weight.data, self.scales()[0])  # type: ignore[no-any-return]

    @property
    def block_size(self) -> int:  # type: ignore[override]
        return self.in_features

    def levels(self) -> torch.Tensor:
        return torch.arange(-127, 128, device=self.weight.device) / 127.0

    def units(self) -> torch.Tensor:
        units: torch.Tensor = self.weight.data.float() / 127.0
        return units

    def block_scales(self) -> torch.Tensor:
        return self.scales()[0].float()

    def storable(self, scales: torch.Tensor) -> torch.Tensor:
        return scales

    def store(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        self.weight.data = (codes - 127).to(self.weight.device, torch.int8)
        for holder in (self.weight, self.state):  # bitsandbytes moves its second name for the codes like the scales
            if holder.CB is not None:
                holder.CB = self.weight.data
        self.scales()[0].copy_(scales)


class _Once(logging.Filter):
    """Let a message of bitsandbytes through once; it repeats this one at every layer of every forward pass."""

    seen = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "inputs will be cast from" not in record.msg:
            return True
        first, self.seen = not self.seen, True
        return first


logging.getLogger("bitsandbytes.autograd._functions").addFilter(_Once())

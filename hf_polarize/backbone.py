"""The low-precision backbone: bitsandbytes' own layers and formats."""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from accelerate.hooks import add_hook_to_module
from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, get_4bit_type
from torch import nn
from transformers.pytorch_utils import Conv1D

from .configuration import PolarizeConfig

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
    in_features: int
    out_features: int
    weight: Any
    bias: nn.Parameter | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:  # an expert without a token; bitsandbytes' CPU kernel would end the process
            return x.new_zeros(*x.shape[:-1], self.out_features)
        x = x.contiguous()  # that kernel takes rows at their first stride
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

    def product(self, x: torch.Tensor) -> torch.Tensor:
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
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.unpack()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def dequantized(self) -> torch.Tensor:
        codes, state = self._stored()
        return bnb.functional.dequantize_4bit(codes, state)  # type: ignore[no-any-return]

    def scales(self) -> list[torch.Tensor]:
        _, state = self._stored()
        return [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]


class BackboneLinear8bit(BackboneLayer, bnb.nn.Linear8bitLt):
    """bitsandbytes' INT8 layer with outlier threshold 0: weights per row, inputs per token, product in INT32."""

    state: bnb.MatmulLtState

    def scales(self) -> list[torch.Tensor]:
        # the largest magnitude of each row, (out_features,); bitsandbytes moves it at the first forward pass
        scale: torch.Tensor = self.weight.SCB if self.weight.SCB is not None else self.state.SCB
        return [scale]

    def dequantized(self) -> torch.Tensor:
        return bnb.functional.int8_vectorwise_dequant(self.weight.data, self.scales()[0])  # type: ignore[no-any-return]


class _Once(logging.Filter):
    """Let a message of bitsandbytes through once; it repeats this one at every layer of every forward pass."""

    seen = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "inputs will be cast from" not in record.msg:
            return True
        first, self.seen = not self.seen, True
        return first


logging.getLogger("bitsandbytes.autograd._functions").addFilter(_Once())


def is_convertible(module: nn.Module) -> bool:
    """Tell whether a module is of a class that bitsandbytes (through transformers) replaces."""
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def weight_matrix(module: nn.Module) -> torch.Tensor:
    """Return the weight of a Linear or a Conv1D as `(out_features, in_features)`."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def new_layer(module: nn.Module, config: PolarizeConfig, pre_quantized: bool = False) -> BackboneLayer:
    """Make the empty backbone layer, on the meta device, that takes the place of a Linear or a Conv1D."""
    out_features, in_features = weight_matrix(module).shape
    has_bias = module.bias is not None
    layer: BackboneLayer
    with torch.device("meta"):
        if config.backbone == "nf4":
            layer = BackboneLinear4bit(
                in_features,
                out_features,
                has_bias,
                config.bnb_4bit_compute_dtype,
                compress_statistics=config.double_quant,
                quant_type="nf4",
            )
            if pre_quantized:
                layer.weight.data = layer.weight.data.to(torch.uint8)
        else:
            layer = BackboneLinear8bit(in_features, out_features, has_bias, has_fp16_weights=False, threshold=0.0)
            if pre_quantized:
                layer.weight.data = layer.weight.data.to(torch.int8)
    layer.source_cls = type(module)
    layer.activations = config.activations
    layer.requires_grad_(False)
    return layer


def quantize_linear(module: nn.Module, config: PolarizeConfig) -> BackboneLayer:
    """Make the backbone layer of a Linear or a Conv1D that is in memory; the module itself is left as it is."""
    layer = new_layer(module, config)
    weight = weight_matrix(module).detach()
    empty = layer.weight.__dict__
    if config.backbone == "nf4":
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **empty).to(weight.device)
    else:
        layer.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False).to("cpu").to(weight.device)
    if module.bias is not None:
        layer.bias = nn.Parameter(module.bias.detach(), requires_grad=False)  # type: ignore
    copy_hook(module, layer)
    return layer.train(module.training)


def backbone_layers(model: nn.Module) -> Iterator[tuple[str, BackboneLayer]]:
    """Yield the name, as in the checkpoint, and the layer of the whole backbone, through any adapters."""
    for name, module in model.named_modules():
        if isinstance(module, BackboneLayer):
            yield name.removesuffix(".base_layer"), module


def copy_hook(source: nn.Module, target: nn.Module) -> None:
    """Give a layer the hook with which accelerate places the one that stood here before."""
    if hasattr(source, "_hf_hook"):
        add_hook_to_module(target, copy.copy(source._hf_hook))


def plain_layer(layer: nn.Module, dtype: torch.dtype, delta: torch.Tensor | None = None) -> nn.Module:
    """
    Make the Linear (or the Conv1D, where one stood) with the weight that a backbone layer multiplies with.

    Args:
        layer (`BackboneLayer`, or a Linear or Conv1D that one was dequantized to): `(out_features, in_features)`.
        dtype (`torch.dtype`): of the new layer.
        delta (`torch.Tensor` of shape `(out_features, in_features)`, *optional*): added in float32, before rounding.
    """
    if isinstance(layer, BackboneLayer):
        weight, conv = layer.dequantized(), issubclass(layer.source_cls, Conv1D)
    else:
        weight, conv = weight_matrix(layer).detach(), isinstance(layer, Conv1D)
    if delta is not None:
        weight = weight.float() + delta.float()
    weight = weight.to(dtype)
    out_features, in_features = weight.shape
    with torch.device("meta"):
        plain: nn.Module = (
            Conv1D(out_features, in_features)
            if conv
            else nn.Linear(in_features, out_features, bias=layer.bias is not None)
        )
    plain.weight = nn.Parameter(weight.T.contiguous() if conv else weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)  # type: ignore[operator]
    copy_hook(layer, plain)
    return plain.train(layer.training)

"""The low-precision backbone of a model: which layers, and one for another."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import bitsandbytes as bnb
import torch
from accelerate.hooks import add_hook_to_module
from torch import nn
from transformers.pytorch_utils import Conv1D

from .configuration import PolarizeConfig
from .formats import BackboneLayer, BackboneLinear4bit, BackboneLinear8bit


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

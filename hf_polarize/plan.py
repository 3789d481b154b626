"""What will be done to a model, checked before any of it is done."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationMethod

from .backbone import backbone_layers, quantize_linear, weight_matrix
from .checkpoint import PolarizeHfQuantizer
from .configuration import PolarizeConfig, SurrogateConfig
from .formats import BackboneLayer

logger = logging.get_logger(__name__)

LARGEST_ERROR = 0.5
"""Relative error above which a backbone is of other weights; NF4's own is 0.1, that of unrelated weights 1.4."""


@dataclass
class Plan:
    """
    What will be done to a model, checked.

    Attributes:
        original (`PreTrainedModel`): the model in 16 or 32 bits; the one to polarize itself, if that has no backbone.
        layers (`dict[str, nn.Module]`): the original's layers that the backbone takes the place of.
        backbone (`dict[str, BackboneLayer]`): those of them that are quantized already; the others are added.
        quantizer ([`PolarizeHfQuantizer`]): with the configuration of the backbone.
        surrogate ([`SurrogateConfig`]): a copy of the user's.
        ranks (`dict[str, int]`): of the layers that get a surrogate.
    """

    original: PreTrainedModel
    layers: dict[str, nn.Module]
    backbone: dict[str, BackboneLayer]
    quantizer: PolarizeHfQuantizer
    surrogate: SurrogateConfig
    ranks: dict[str, int]

    def quantized(self) -> dict[str, BackboneLayer]:
        """Quantize those layers that aren't yet, and return the backbone."""
        for name, module in self.layers.items():
            if name not in self.backbone:
                self.backbone[name] = quantize_linear(module, self.quantizer.quantization_config)
        return self.backbone


def make_plan(
    model: PreTrainedModel,
    config: PolarizeConfig | None = None,
    surrogate: SurrogateConfig | None = None,
    original: PreTrainedModel | None = None,
) -> Plan:
    """
    Check what [`polarize`] is asked to do, without a change to the model.

    Raises:
        TypeError: If a configuration is of another class.
        ValueError: If the model can't be polarized like that.
    """
    for value, kind in ((config, PolarizeConfig), (surrogate, SurrogateConfig)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"expected a {kind.__name__}, got {type(value).__name__}")
    if getattr(model, "peft_config", None):
        raise ValueError(f"the model has adapters {sorted(model.peft_config)}; polarize a model without any")
    chosen = surrogate_copy(surrogate or SurrogateConfig())
    backbone = dict(backbone_layers(model))
    if backbone:
        if config is not None:
            raise ValueError(
                "the model has a backbone already; config is for an original model. Leave one of them out"
            )
        source = original if original is not None else load_original(model)
        check_original(source, model, backbone)
        quantizer = model.hf_quantizer
        layers = {name: source.get_submodule(name) for name in backbone}
    else:
        if original is not None:
            raise ValueError("original is for a model that was loaded with a PolarizeConfig; this one is an original")
        source = model
        forget_gguf(model)
        check_unquantized(model)
        quantizer = PolarizeHfQuantizer(config or PolarizeConfig(), pre_quantized=False)
        quantizer.update_dtype(model.dtype)
        layers = quantizer.modules_to_convert(model)
    check_chip(quantizer.quantization_config, layers, source)
    return Plan(source, layers, backbone, quantizer, chosen, surrogate_ranks(layers, chosen))


def check_chip(config: PolarizeConfig, layers: Mapping[str, nn.Module], model: PreTrainedModel) -> None:
    """Raise if a chip can't take these layers of a model, as far as names, formats and shapes tell."""
    chip = config.cim
    if chip is None:
        return
    if not any(chip.covers(name, model) for name in layers):
        raise ValueError(f"cim: none of the {len(layers)} layers has a name that layers={chip.layers} finds")
    if config.backbone == "int8" and not chip.on_grid:
        raise ValueError(f'cim: mapping="{chip.mapping}" is of the 16 values of NF4; an INT8 backbone takes "grid"')
    for name, module in layers.items():
        inputs = weight_matrix(module).shape[1]
        if chip.covers(name, model) and not chip.on_grid and inputs % chip.rows:
            raise ValueError(
                f'cim: mapping="{chip.mapping}" needs groups of rows inside blocks of 64 weights; the {inputs} inputs '
                f'of {name} are no multiple of rows={chip.rows}. Use mapping="grid", or leave it off the chip'
            )


def surrogate_copy(config: SurrogateConfig, **changes: Any) -> SurrogateConfig:
    return dataclasses.replace(config, **{"init_lora_weights": True, "start": "zero", **changes})  # type: ignore[arg-type]


def check_unquantized(model: PreTrainedModel) -> None:
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None):
        raise ValueError(
            f"the model is quantized already ({getattr(model, 'quantization_method', 'unknown method')}); give the "
            "original in 16 or 32 bits"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("a part of the original is offloaded to disk; polarize needs all of its weights in memory")


def check_original(original: PreTrainedModel, model: PreTrainedModel, backbone: dict[str, BackboneLayer]) -> None:
    """Raise if a model is not the one that a backbone was made from, as far as classes, shapes and weights tell."""
    check_unquantized(original)
    if type(original) is not type(model):
        raise ValueError(f"the original is a {type(original).__name__}, the model a {type(model).__name__}")
    modules = dict(original.named_modules())
    for name, layer in backbone.items():
        if name not in modules:
            raise ValueError(f"the original has no {name}: that is another model")
        shape = tuple(weight_matrix(modules[name]).shape)
        if shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"{name} is {layer.out_features} x {layer.in_features} in the model and {shape[0]} x {shape[1]} in "
                "its original: that is another model"
            )
        if modules[name].weight.device != layer.weight.device:
            raise ValueError(
                f"{name} is on {layer.weight.device} in the model and on {modules[name].weight.device} "
                "in its original: move the original there"
            )
        weight = weight_matrix(modules[name]).detach().float()
        error = float((weight - layer.dequantized().float()).norm() / weight.norm().clamp(min=1e-30))
        if not error <= LARGEST_ERROR:
            raise ValueError(
                f"{name} of the model is {100 * error:.0f} % off that of the original: that is another model, or one "
                "whose codes were written for a chip of bad cells"
            )


def surrogate_ranks(layers: dict[str, nn.Module], surrogate: SurrogateConfig) -> dict[str, int]:
    """Return the ranks of the layers that get a surrogate, by PEFT's own rules for names and patterns."""
    everywhere = surrogate.target_modules == "all-linear" and not surrogate.exclude_modules
    names = [name for name in layers if everywhere or _is_target(surrogate, name)]
    if not names:
        raise ValueError(f"target_modules={surrogate.target_modules!r} matches none of the {len(layers)} layers")
    pattern = surrogate.rank_pattern or {}
    ranks = {name: pattern.get(get_pattern_key(pattern, name), surrogate.r) for name in names}
    for name, rank in ranks.items():
        limit = min(weight_matrix(layers[name]).shape)
        if rank > limit:
            raise ValueError(
                f"rank must be in 1..min(in, out) = 1..{limit} for {name}; got {rank}. Give that layer another with "
                "rank_pattern, or name it in modules_to_not_convert."
            )
    return ranks


def _is_target(surrogate: SurrogateConfig, name: str) -> bool:
    if surrogate.target_modules == "all-linear":
        surrogate = surrogate_copy(surrogate, target_modules=".*")
    match = check_target_module_exists(surrogate, name)  # an excluded module is a true object of its own
    return match is True or isinstance(match, re.Match)


def forget_gguf(model: PreTrainedModel) -> None:
    """Clear the marks of GGUF quantization, which transformers leaves on a model that it has dequantized."""
    if getattr(model, "quantization_method", None) == QuantizationMethod.GGUF:
        model.hf_quantizer.remove_quantization_config(model)
        model.config._is_quantized = False


def load_original(model: PreTrainedModel) -> PreTrainedModel:
    """Load the model that a backbone was made from, from the name it was loaded by."""
    name = model.config._name_or_path
    if not name:
        raise ValueError("polarize needs the original weights: pass original=..., this model names no source")
    logger.info("loading the original weights from %s", name)
    return type(model).from_pretrained(name, dtype="auto").to(model.device)  # type: ignore[no-any-return]

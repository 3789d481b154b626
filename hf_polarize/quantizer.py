"""The quantizer: how a backbone speaks to transformers' loader."""

from __future__ import annotations

import copy
import ctypes
import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationMethod

from .backbone import is_convertible, new_layer, plain_layer, weight_matrix
from .cim.hook import attach_cim
from .configuration import PolarizeConfig
from .formats import NF4_BLOCK, BackboneLayer

logger = logging.get_logger(__name__)


def default_modules_to_not_convert(model: PreTrainedModel) -> list[str]:
    """
    Name the modules that stay in high precision when the user names none.

    They are the output embedding and all tied layers, as bitsandbytes does it, and every head: a linear layer outside
    the base model, which is small, often new, and decides the output directly.
    """
    names = {name.removesuffix(".bias") for name in get_keys_to_not_convert(model)}
    linears = {name for name, module in model.named_modules() if is_convertible(module)}
    if model.base_model is not model:
        names |= {name for name in linears if not name.startswith(f"{model.base_model_prefix}.")}
    else:
        # the last module that bitsandbytes leaves alone is the head; a bare encoder has none
        names -= {name for name in names if name in linears and model.get_output_embeddings() is None}
    return sorted(names | tied_modules(model))


def tied_modules(model: PreTrainedModel) -> set[str]:
    """Name the modules whose weight is another one's as well."""
    return {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}


class _QuantizeAndRelease(ConversionOps):
    """bitsandbytes' conversion of one tensor, after which the memory that it took goes back to the system."""

    def __init__(self, operation: ConversionOps) -> None:
        self.operation = operation
        self.hf_quantizer = operation.hf_quantizer

    def convert(self, *args: Any, **kwargs: Any) -> Any:
        result = self.operation.convert(*args, **kwargs)
        release_memory()
        return result


class BackboneHfQuantizer(HfQuantizer):
    """
    Quantize a model while it loads, one tensor at a time, or load it quantized.

    The conversions are bitsandbytes' own, through transformers' quantizers for its two formats. This class chooses
    the layers, puts in the ones of this library, and speaks to the loader.
    """

    requires_calibration = False
    quantization_config: PolarizeConfig

    def __init__(self, quantization_config: PolarizeConfig, **kwargs: Any) -> None:
        # a copy: the names of the layers left alone and the dtype of this model are written into it
        quantization_config = copy.deepcopy(quantization_config)
        super().__init__(quantization_config, **kwargs)
        bnb_quantizer = Bnb4BitHfQuantizer if quantization_config.backbone == "nf4" else Bnb8BitHfQuantizer
        self.bnb = bnb_quantizer(quantization_config, pre_quantized=self.pre_quantized)
        self.serialized_names = self.bnb.serialized_names

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in map(str, device_map.values()):
            raise ValueError(
                "device_map puts a part of the model on disk. "
                + (
                    "bitsandbytes' layers can't be offloaded to disk: give the model more memory or smaller limits on "
                    "other devices (max_memory)."
                    if self.pre_quantized
                    else "A model can't be quantized and offloaded to disk in one go: accelerate would keep the "
                    "original tensors there and the layers would fail later. Quantize where the backbone fits in "
                    "memory (a quarter of the bf16 size for NF4)."
                )
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.quantization_config.resolve(dtype)
        return dtype

    def update_device_map(self, device_map: Any) -> Any:
        return self.bnb.update_device_map(device_map)

    def adjust_max_memory(self, max_memory: dict) -> dict:
        return self.bnb.adjust_max_memory(max_memory)  # type: ignore[no-any-return]

    @property
    def quantized_element_size(self) -> float:
        return self.bnb.quantized_element_size  # type: ignore[no-any-return]

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self.bnb.param_needs_quantization(model, param_name, **kwargs)  # type: ignore[no-any-return]

    def get_quantize_ops(self) -> Any:
        return _QuantizeAndRelease(self.bnb.get_quantize_ops())

    def get_load_operations(self) -> dict:
        return self.bnb.get_load_operations()  # type: ignore[no-any-return]

    def modules_to_convert(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Choose the layers of the backbone and write the names of all others into the configuration."""
        config = self.quantization_config
        linears = {name: module for name, module in model.named_modules() if is_convertible(module)}
        if config.llm_int8_skip_modules is None:
            config.llm_int8_skip_modules = default_modules_to_not_convert(model)
        else:
            # a tied weight can't be quantized in one place and not in the other
            tied = tied_modules(model) & set(linears) - set(config.llm_int8_skip_modules)
            config.llm_int8_skip_modules += sorted(tied)
        skip = [*config.llm_int8_skip_modules, *(model._keep_in_fp32_modules or [])]
        chosen = {name: module for name, module in linears.items() if should_convert_module(name, skip)}
        if not chosen:
            raise ValueError(
                f"{type(model).__name__} has no layer to quantize: of its {len(linears)} layers of the classes "
                f"torch.nn.Linear and Conv1D, modules_to_not_convert={skip} covers all"
            )
        if not self.pre_quantized:
            self._warn(model, chosen)
        return chosen

    def _warn(self, model: PreTrainedModel, chosen: dict[str, nn.Module]) -> None:
        """Say what the user may not expect: layers that some readers can't run, and large parts left as they are."""
        odd = [
            name
            for name, module in chosen.items()
            if self.quantization_config.backbone == "nf4"
            and (weight_matrix(module).shape[0] % 32 or weight_matrix(module).shape[1] % NF4_BLOCK)
        ]
        if odd:
            logger.warning(
                "%d layers (%s, ...) have shapes that bitsandbytes can't run on a CPU with AVX512-BF16 (out_features "
                "a multiple of 32, in_features of %d); without hf_polarize this model fails there. Name them in "
                "modules_to_not_convert to keep them out.",
                len(odd),
                odd[0],
                NF4_BLOCK,
            )
        quantized = sum(weight_matrix(module).numel() for module in chosen.values())
        stacked = sum(p.numel() for p in model.parameters() if p.dim() > 2)
        if stacked > quantized:
            logger.warning(
                "%.0f %% of this model's weights are stacked in tensors that are no linear layers (the experts of a "
                "mixture, or convolutions) and stay in high precision",
                100 * stacked / sum(p.numel() for p in model.parameters()),
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, module in self.modules_to_convert(model).items():
            model.set_submodule(name, new_layer(module, self.quantization_config, self.pre_quantized))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.mark(model)
        if self.quantization_config.cim is not None:
            attach_cim(model, self.quantization_config.cim)
        if hasattr(model, "_weight_conversions"):
            # transformers 5.23 can't run these backwards: saving a loaded bitsandbytes model would raise
            model._weight_conversions = [
                converter
                for converter in model._weight_conversions or []
                if not any(getattr(op, "hf_quantizer", None) for op in getattr(converter, "operations", ()))
            ]
        release_memory()
        return model

    def mark(self, model: PreTrainedModel) -> None:
        """Set what transformers, Trainer and PEFT look for on a model with a bitsandbytes backbone."""
        model.hf_quantizer = self
        model.config.quantization_config = self.quantization_config
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = True
        model.is_quantized = True
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        model.is_loaded_in_4bit = self.quantization_config.backbone == "nf4"
        model.is_loaded_in_8bit = self.quantization_config.backbone == "int8"

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        super().remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        target = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, layer in list(model.named_modules()):
            if isinstance(layer, BackboneLayer):
                model.set_submodule(name, plain_layer(layer, target or torch.float32))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def release_memory() -> None:
    """Give freed memory back to the system; glibc would keep what the original tensors took."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            logger.debug("no glibc here: freed memory stays with the process until it needs it")

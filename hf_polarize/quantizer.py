"""The quantizer: how a backbone speaks to transformers' loader."""

from __future__ import annotations

import ctypes
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationMethod

from .backbone import BackboneLayer, is_convertible, new_layer, plain_layer
from .configuration import PolarizeConfig

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
    names |= {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
    return sorted(names)


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
        super().__init__(quantization_config, **kwargs)
        bnb_quantizer = Bnb4BitHfQuantizer if quantization_config.backbone == "nf4" else Bnb8BitHfQuantizer
        self.bnb = bnb_quantizer(quantization_config, pre_quantized=self.pre_quantized)
        self.serialized_names = self.bnb.serialized_names

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in map(str, device_map.values()) and not self.pre_quantized:
            raise ValueError(
                "device_map puts a part of the model on disk, and a model can't be quantized and offloaded to disk in "
                "one go: accelerate would keep the original tensors there and the layers would fail later. Quantize "
                "with enough memory (a quarter of the bf16 size for NF4), call save_polarized or save_pretrained, and "
                "load that checkpoint with the device_map."
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
        if config.llm_int8_skip_modules is None:
            config.llm_int8_skip_modules = default_modules_to_not_convert(model)
        skip = [*config.llm_int8_skip_modules, *(model._keep_in_fp32_modules or [])]
        chosen = {
            name: module
            for name, module in model.named_modules()
            if is_convertible(module) and should_convert_module(name, skip)
        }
        if not chosen:
            raise ValueError(
                f"no linear layer of {type(model).__name__} is left to quantize: modules_to_not_convert={skip} covers "
                "all of them"
            )
        return chosen

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, module in self.modules_to_convert(model).items():
            model.set_submodule(name, new_layer(module, self.quantization_config, self.pre_quantized))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.mark(model)
        if hasattr(model, "_weight_conversions"):
            # transformers 5.24 can't run these backwards: saving a loaded bitsandbytes model would raise
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
        model.save_pretrained = types.MethodType(_save_for_trainer, model)

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        super().remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
        model.__dict__.pop("save_pretrained", None)

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


def _save_for_trainer(
    model: PreTrainedModel, save_directory: str, is_main_process: bool = True, **kwargs: Any
) -> None:
    """
    Save as transformers does and, for adapters, add the file from which Trainer can resume.

    Of a model with adapters transformers writes the adapter alone, and Trainer then reads it back only into a
    `PeftModel` (trainer.py:3701 of 5.23); for any other it wants model.safetensors, which it loads by parameter name.
    """
    type(model).save_pretrained(model, save_directory, is_main_process=is_main_process, **kwargs)
    if getattr(model, "_hf_peft_config_loaded", False) and is_main_process:
        logger.warning_once(
            "save_pretrained writes the adapter of this model alone, as for any model with adapters; "
            "hf_polarize.save_polarized writes a checkpoint that loads by itself"
        )
        trained = {name: p.detach().cpu() for name, p in model.named_parameters() if ".lora_" in name}
        save_file(trained, Path(save_directory) / "model.safetensors", metadata={"format": "pt"})


def release_memory() -> None:
    """Give freed memory back to the system; glibc would keep what the original tensors took."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            logger.debug("no glibc here: freed memory stays with the process until it needs it")

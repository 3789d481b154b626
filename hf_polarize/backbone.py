"""The low-precision backbone: bitsandbytes' own layers and formats, filled while a model loads."""

from __future__ import annotations

import copy
import ctypes
import logging
import sys
import types
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, get_4bit_type
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging as hf_logging
from transformers.utils.quantization_config import QuantizationMethod

from .configuration import PolarizeConfig

logger = hf_logging.get_logger(__name__)

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
        return self.product(x if self.activations is None else fake_quantize(x, self.activations))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply with bitsandbytes: `(..., in_features)` to `(..., out_features)`."""
        return super().forward(x)  # type: ignore[no-any-return, misc]

    @abstractmethod
    def dequantized(self) -> torch.Tensor:
        """Return the weight that this layer multiplies with, `(out_features, in_features)`."""

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
    return layer.train(module.training)


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


def backbone_layers(model: nn.Module) -> Iterator[tuple[str, BackboneLayer]]:
    """Yield the name, as in the checkpoint, and the layer of the whole backbone, through any adapters."""
    for name, module in model.named_modules():
        if isinstance(module, BackboneLayer):
            yield name.removesuffix(".base_layer"), module


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


def plain_layer(layer: BackboneLayer, dtype: torch.dtype, delta: torch.Tensor | None = None) -> nn.Module:
    """
    Make the Linear (or the Conv1D, where one stood) with the weight that a backbone layer multiplies with.

    Args:
        layer (`BackboneLayer`): of `(out_features, in_features)`.
        dtype (`torch.dtype`): of the new layer.
        delta (`torch.Tensor` of shape `(out_features, in_features)`, *optional*): added before rounding to `dtype`.
    """
    weight = layer.dequantized()
    if delta is not None:
        weight = weight.to(delta.dtype) + delta
    weight = weight.to(dtype)
    conv = issubclass(layer.source_cls, Conv1D)
    with torch.device("meta"):
        plain = (
            Conv1D(layer.out_features, layer.in_features)
            if conv
            else nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        )
    plain.weight = nn.Parameter(weight.T.contiguous() if conv else weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    if hasattr(layer, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(plain, copy.copy(layer._hf_hook))
    return plain.train(layer.training)


def release_memory() -> None:
    """Give freed memory back to the system; glibc would keep what the original tensors took."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            logger.debug("no glibc here: freed memory stays with the process until it needs it")

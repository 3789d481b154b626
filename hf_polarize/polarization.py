"""A model and data in, a polarized model out."""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationMethod

from .backbone import BackboneLayer, backbone_layers, quantize_linear, weight_matrix
from .calibration import MEMORY_LIMIT, input_covariances
from .checkpoint import PolarizeHfQuantizer
from .compensation import compensate, damped
from .configuration import PolarizeConfig, SurrogateConfig
from .data import calibration_batches, is_text_model
from .quantizer import release_memory
from .surrogate import attach_surrogates

logger = logging.get_logger(__name__)


@dataclass
class Solution:
    """What the closed form gave for one layer: its backbone, its factors, and its relative output error."""

    layer: BackboneLayer
    a: torch.Tensor
    b: torch.Tensor
    error_before: float
    error_after: float


def polarize(
    model: PreTrainedModel,
    data: Any,
    config: PolarizeConfig | None = None,
    surrogate: SurrogateConfig | None = None,
    *,
    original: PreTrainedModel | None = None,
    processor: Any = None,
    window: int = 512,
    max_tokens: int = 16384,
    batch_size: int = 4,
    seed: int = 0,
    text_column: str | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> PreTrainedModel:
    """
    Polarize a model in one call: calibrate, solve, attach.

    The original model is run on the data and the covariance of each layer's input is collected; each layer's
    quantization error is compensated by the rank-r path that is best for those inputs (see
    [`~hf_polarize.compensation.compensate`]); the paths are attached as one PEFT adapter named "surrogate".

    Args:
        model (`PreTrainedModel`):
            The original model, which is quantized in place; or one that was loaded with a [`PolarizeConfig`], which
            gets its surrogates in place.
        data: `"self"` (text that the original model writes itself), the path of a text file, a list of strings, a
            `datasets.Dataset` of text, tokens, pixels or images, or a list of batches.
        config ([`PolarizeConfig`], *optional*): for an original model; the default is NF4. A model that has a backbone
            keeps the one it has.
        surrogate ([`SurrogateConfig`], *optional*): the default has rank 8.
        original (`PreTrainedModel`, *optional*): for a model that has a backbone: the model it was made from. Left
            out, it is loaded from `model.name_or_path`, in the dtype of its checkpoint.
        processor (*optional*): tokenizer or image processor of the model, for text or image data. Left out, it is
            loaded from `model.name_or_path` where that names a model.
        window (`int`, defaults to 512): tokens per calibration window.
        max_tokens (`int`, defaults to 16384): calibration tokens, in whole windows spread evenly over the data.
        batch_size (`int`, defaults to 4): windows per batch.
        seed (`int`, defaults to 0): of the text for `"self"`; everything else is deterministic.
        text_column (`str`, *optional*): of a data set; the first column of strings if left out.
        memory_limit (`int`, defaults to 2 GiB): bytes of covariances at a time. More passes if it is small.

    Returns:
        `PreTrainedModel`: the same object, with a backbone and trainable surrogates. How it was made, and each layer's
        relative output error before and after, are in `model.polarization`.

    Raises:
        ValueError: Before any work, if the model or the data can't be polarized like that.
    """
    started = time.monotonic()
    surrogate = dataclasses.replace(surrogate, start="zero") if surrogate is not None else SurrogateConfig()
    has_backbone = any(True for _ in backbone_layers(model))
    if getattr(model, "peft_config", None):
        raise ValueError(f"the model has adapters {sorted(model.peft_config)}; polarize a model without any")
    if has_backbone and config is not None:
        raise ValueError("the model has a backbone already; config is for an original model. Leave one of them out")
    if original is not None and not has_backbone:
        raise ValueError(
            "original is for a model that was loaded with a PolarizeConfig; this one is itself an original"
        )
    if not 1 <= window <= max_tokens:
        raise ValueError(f"max_tokens must hold at least one window; got window={window}, max_tokens={max_tokens}")
    if not has_backbone:
        forget_gguf(model)
        if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None):
            raise ValueError(
                f"the model is quantized already ({getattr(model, 'quantization_method', 'unknown method')}); "
                "give the original in 16 or 32 bits"
            )
        quantizer, layers = plan(model, config)
        original = model
    else:
        quantizer = model.hf_quantizer
        original = original or load_original(model)
        layers = {name: original.get_submodule(name) for name, _ in backbone_layers(model)}
    ranks = layer_ranks(layers, surrogate)
    processor = processor or load_processor(model)
    batches = calibration_batches(original, data, processor, window, max_tokens, batch_size, seed, text_column)

    given = dict(backbone_layers(model))
    solutions = solve(original, batches, layers, quantizer.quantization_config, ranks, given, memory_limit)
    if not has_backbone:
        for name, solution in solutions.items():
            model.set_submodule(name, solution.layer)
        quantizer.mark(model)
    del original, layers
    attach_surrogates(model, surrogate, {name: (s.a, s.b) for name, s in solutions.items()})
    release_memory()
    model.polarization = {
        "provenance": {
            "base_model": public_name(model.config._name_or_path),
            "method": "closed form with the full input covariance",
            "calibration": {
                "source": describe(data),
                "tokens": sum(next(iter(batch.values())).shape[:2].numel() for batch in batches)
                if "input_ids" in batches[0]
                else None,
                "samples": sum(len(next(iter(batch.values()))) for batch in batches),
                "window": window,
                "seed": seed,
            },
            "seconds": round(time.monotonic() - started, 1),
            "torch": torch.__version__,
        },
        "layers": {
            name: {"rank": len(s.a), "error_before": s.error_before, "error_after": s.error_after}
            for name, s in solutions.items()
        },
    }
    return model


def plan(model: PreTrainedModel, config: PolarizeConfig | None) -> tuple[PolarizeHfQuantizer, dict[str, nn.Module]]:
    """Return the quantizer of an original model and the layers that it will convert."""
    quantizer = PolarizeHfQuantizer(copy_config(config), pre_quantized=False)
    quantizer.update_dtype(model.dtype)
    return quantizer, quantizer.modules_to_convert(model)


def check_plan(model: PreTrainedModel, config: PolarizeConfig, surrogate: SurrogateConfig) -> None:
    """Raise what [`polarize`] would raise of these configurations, without a change to the model."""
    layer_ranks(plan(model, config)[1], surrogate)


def forget_gguf(model: PreTrainedModel) -> None:
    """Clear the marks of GGUF quantization, which transformers leaves on a model that it has dequantized."""
    if getattr(model, "quantization_method", None) == QuantizationMethod.GGUF:
        model.hf_quantizer.remove_quantization_config(model)
        model.config._is_quantized = False


def copy_config(config: PolarizeConfig | None) -> PolarizeConfig:
    """Copy a configuration, since the names of the layers left alone are written into it."""
    return copy.deepcopy(config) if config is not None else PolarizeConfig()


def public_name(name: str | None) -> str:
    """Return a model's Hub id, or the last part of a local path."""
    return Path(name).name if name and Path(name).exists() else name or ""


def describe(data: Any) -> str:
    """Say in a word what the calibration data was, without a path."""
    if isinstance(data, (str, Path)):
        return Path(data).name
    return f"{type(data).__name__} of {len(data)}" if hasattr(data, "__len__") else type(data).__name__


def layer_ranks(layers: dict[str, nn.Module], surrogate: SurrogateConfig) -> dict[str, int]:
    """Return the rank of each layer, as PEFT resolves `rank_pattern`; raise if one is too large for its layer."""
    pattern = surrogate.rank_pattern or {}
    ranks = {name: pattern.get(get_pattern_key(pattern, name), surrogate.r) for name in layers}
    for name, rank in ranks.items():
        limit = min(weight_matrix(layers[name]).shape)
        if rank > limit:
            raise ValueError(f"rank must be in 1..min(in, out) = 1..{limit} for {name}; got {rank}")
    return ranks


def load_original(model: PreTrainedModel) -> PreTrainedModel:
    """Load the model that a backbone was made from, from the name it was loaded by."""
    name = model.config._name_or_path
    if not name:
        raise ValueError("polarize needs the original weights: pass original=..., this model names no source")
    logger.info("loading the original weights from %s", name)
    return type(model).from_pretrained(name, dtype="auto").to(model.device)  # type: ignore[no-any-return]


def load_processor(model: PreTrainedModel) -> Any:
    """Load the tokenizer or image processor beside a model, or return `None` where there is none."""
    name = model.config._name_or_path
    if not name:
        return None
    try:
        return (AutoTokenizer if is_text_model(model) else AutoImageProcessor).from_pretrained(name)
    except (OSError, ValueError):
        return None


def solve(
    original: PreTrainedModel,
    batches: list[dict[str, torch.Tensor]],
    layers: dict[str, nn.Module],
    config: PolarizeConfig,
    ranks: dict[str, int],
    given: dict[str, BackboneLayer],
    memory_limit: int,
) -> dict[str, Solution]:
    """Quantize each layer (unless its backbone is given) and compensate it on the calibration data."""
    solutions: dict[str, Solution] = {}
    with logging.tqdm(total=len(layers), desc="solving", unit="layer") as bar:

        def finish(names: Any, covariances: dict[str, torch.Tensor]) -> None:
            last: torch.Tensor | None = None
            for name in names:
                weight = weight_matrix(layers[name]).detach()
                layer = given.get(name) or quantize_linear(layers[name], config)
                if name not in covariances:
                    h = damped(torch.eye(weight.shape[1], device=weight.device))
                elif covariances[name] is not last:
                    last = covariances[name]
                    h = damped(last)
                error = weight.double() - layer.dequantized().double()
                result = compensate(weight, error, h, ranks[name])
                solutions[name] = Solution(layer, result.a, result.b, result.error_before, result.error_after)
                bar.update()

        for covariances in input_covariances(original, batches, layers, memory_limit):
            finish(list(covariances), covariances)
            covariances.clear()
        finish([name for name in layers if name not in solutions], {})
    return {name: solutions[name] for name in layers}

"""A model and data in, a polarized model out."""

from __future__ import annotations

import dataclasses
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationMethod

from .backbone import BackboneLayer, backbone_layers, quantize_linear, weight_matrix
from .calibration import MEMORY_LIMIT, input_covariances
from .checkpoint import PolarizeHfQuantizer
from .compensation import Compensation, compensate, damped
from .configuration import PolarizeConfig, SurrogateConfig
from .data import calibration_batches, is_text_model
from .quantizer import release_memory
from .surrogate import attach_surrogates

logger = logging.get_logger(__name__)


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
    if not 1 <= window <= max_tokens:
        raise ValueError(f"max_tokens must hold at least one window; got window={window}, max_tokens={max_tokens}")
    plan = make_plan(model, config, surrogate, original)
    processor = processor or load_processor(model)
    training = plan.original.training
    plan.original.eval()
    try:
        batches = calibration_batches(
            plan.original, data, processor, window, max_tokens, batch_size, seed, text_column
        )
        solutions = solve(plan, batches, memory_limit)
    finally:
        plan.original.train(training)
    install(model, plan, solutions)
    model.polarization = {
        "provenance": {
            "base_model": public_name(model.config._name_or_path),
            "method": "closed form with the full input covariance",
            "calibration": {
                "source": describe(data),
                "tokens": sum(batch["input_ids"].numel() for batch in batches) if "input_ids" in batches[0] else None,
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
    return Plan(source, layers, backbone, quantizer, chosen, surrogate_ranks(layers, chosen))


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
    """Raise if a model is not the one that a backbone was made from, as far as classes and shapes tell."""
    check_unquantized(original)
    if type(original) is not type(model):
        raise ValueError(f"the original is a {type(original).__name__}, the model a {type(model).__name__}")
    for name, layer in backbone.items():
        shape = tuple(weight_matrix(original.get_submodule(name)).shape)
        if shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"{name} is {layer.out_features} x {layer.in_features} in the model and {shape[0]} x {shape[1]} in "
                "its original: that is another model"
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


def install(model: PreTrainedModel, plan: Plan, solutions: dict[str, Compensation]) -> None:
    """Put backbone and surrogates in place; if PEFT refuses the model, leave it as it was."""
    fresh = plan.original is model
    if fresh:
        for name, layer in plan.backbone.items():
            model.set_submodule(name, layer)
        plan.quantizer.mark(model)
    try:
        attach_surrogates(model, plan.surrogate, {name: (s.a, s.b) for name, s in solutions.items()})
    except Exception:
        model._hf_peft_config_loaded = False
        if fresh:
            for name, module in plan.layers.items():
                model.set_submodule(name, module)
            plan.quantizer.remove_quantization_config(model)
        raise
    plan.layers.clear()
    release_memory()


def forget_gguf(model: PreTrainedModel) -> None:
    """Clear the marks of GGUF quantization, which transformers leaves on a model that it has dequantized."""
    if getattr(model, "quantization_method", None) == QuantizationMethod.GGUF:
        model.hf_quantizer.remove_quantization_config(model)
        model.config._is_quantized = False


def public_name(name: str | None) -> str | None:
    """Return a name if it can be a Hub id, and nothing of a local path."""
    if not name or Path(name).exists() or name.startswith("."):
        return None
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def describe(data: Any) -> str:
    """Say in a word what the calibration data was, without a path."""
    if isinstance(data, (str, Path)):
        return Path(data).name
    return f"{type(data).__name__} of {len(data)}" if hasattr(data, "__len__") else type(data).__name__


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


def solve(plan: Plan, batches: list[dict[str, torch.Tensor]], memory_limit: int) -> dict[str, Compensation]:
    """Quantize each layer that isn't yet, and compensate those that get a surrogate on the calibration data."""
    solutions: dict[str, Compensation] = {}
    targets = {name: plan.layers[name] for name in plan.ranks}
    with logging.tqdm(total=len(targets), desc="solving", unit="layer") as bar:

        def finish(name: str, h: torch.Tensor) -> None:
            weight = weight_matrix(plan.layers[name]).detach()
            quantized = plan.backbone[name].dequantized().to(weight.device)
            solutions[name] = compensate(weight, weight.double() - quantized.double(), h, plan.ranks[name])
            bar.update()

        for name, module in plan.layers.items():
            if name not in plan.backbone:
                plan.backbone[name] = quantize_linear(module, plan.quantizer.quantization_config)
        for covariances in input_covariances(plan.original, batches, targets, memory_limit):
            last = None
            for name, covariance in covariances.items():
                if covariance is not last:
                    last, h = covariance, damped(covariance)
                finish(name, h)
        for name in set(targets) - set(solutions):  # those that no token reached
            weight = weight_matrix(targets[name])
            finish(name, damped(torch.eye(weight.shape[1], device=weight.device)))
    return {name: solutions[name] for name in targets}

"""The surrogate: a rank-r high-precision path beside a backbone layer. To PEFT it is a LoRA layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import bnb as lora_bnb
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .backbone import backbone_layers, plain_layer
from .configuration import SURROGATE_LAYERS, SurrogateConfig
from .formats import BackboneLayer, BackboneLinear4bit, BackboneLinear8bit

logger = logging.get_logger(__name__)

SURROGATE = "surrogate"
"""Name of the adapter in memory. A user's own `get_peft_model(model, LoraConfig())` would overwrite a "default"."""


class SurrogateLayer:
    """
    A LoRA layer of PEFT in which adapters that came with a [`SurrogateConfig`] belong to the model.

    `y = backbone(x) + B (A x) + (what the user stacked on top)(x)`

    Such an adapter stays in the forward pass whichever adapter a user activates. It is frozen once a user's adapter
    stands beside it, and trainable again when the user names it (`model.set_adapter("surrogate")`). With a user's
    adapter on top, *disable* switches off only that one: the reference model of a preference loss is the polarized
    model and not its bare backbone. With no other adapter, *disable* leaves the backbone alone; [`backbone_only`]
    always does.
    """

    in_features: int
    out_features: int
    _active_adapter: str | list[str]

    def __init__(self, *args: Any, target_name: str = "", **kwargs: Any) -> None:
        self._surrogates: list[str] = []
        self._target_name = target_name
        self._user_adapters_off = False
        super().__init__(*args, target_name=target_name, **kwargs)  # type: ignore[call-arg]

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        is_surrogate = isinstance(config, SurrogateConfig)
        limit = min(self.in_features, self.out_features)
        if is_surrogate and r > limit:
            raise ValueError(
                f"rank must be in 1..min(in_features, out_features) = 1..{limit} for {self._target_name} "
                f"({self.in_features} -> {self.out_features}); got {r}. rank_pattern gives single layers another rank."
            )
        if adapter_name in self._surrogates and not is_surrogate:
            raise ValueError(
                f'"{adapter_name}" is the name of this model\'s surrogate, and a new adapter of that name would '
                f"overwrite it; give the new one another name (adapter_name=...)"
            )
        if is_surrogate and adapter_name not in self._surrogates:
            self._surrogates.append(adapter_name)
        named = self._active_adapter
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)  # type: ignore[misc]
        self.set_adapter(named, inference_mode=config.inference_mode)

    @property
    def active_adapters(self) -> list[str]:
        """All adapters of the forward pass: the surrogates first, then those that the user activated."""
        named = [self._active_adapter] if isinstance(self._active_adapter, str) else list(self._active_adapter)
        stacked = [] if self._user_adapters_off else [name for name in named if name not in self._surrogates]
        return [*self._surrogates, *stacked]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        self._user_adapters_off = False
        super().set_adapter(adapter_names, inference_mode=inference_mode)  # type: ignore[misc]
        named = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for name in set(self._surrogates) - named:
            for factor in (self.lora_A[name], self.lora_B[name]):  # type: ignore[attr-defined]
                # frozen in a new parameter: get_peft_model remembers those that it found, and restores their
                # requires_grad after it has added an adapter (tuners_utils.py:885 of peft 0.21.2)
                factor.weight = nn.Parameter(factor.weight.data, requires_grad=False)

    def enable_adapters(self, enabled: bool) -> None:
        if enabled:
            self._disable_adapters = False
            self.set_adapter(self._active_adapter)
        else:
            stacked = len(self.active_adapters) > len(self._surrogates)
            super().enable_adapters(False)  # type: ignore[misc]
            self._disable_adapters = not stacked
            self._user_adapters_off = stacked

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self._surrogates:
            self._surrogates.remove(adapter_name)
            self.get_base_layer().deflation = None  # type: ignore[attr-defined]
        super().delete_adapter(adapter_name)  # type: ignore[misc]

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """Give every row the surrogates and its own adapter of the user's; `"__base__"` is none of those."""
        rows = ["__base__" if name in self._surrogates else name for name in adapter_names]
        result: torch.Tensor = super()._mixed_batch_forward(x, *args, adapter_names=rows, **kwargs)  # type: ignore[misc]
        for name in self._surrogates:
            lora_a, lora_b = self.lora_A[name], self.lora_B[name]  # type: ignore[attr-defined]
            result = result + lora_b(lora_a(x.to(lora_a.weight.dtype))).to(result.dtype)
        return result

    def scale_layer(self, scale: float) -> None:
        super().scale_layer(scale)  # type: ignore[misc]
        self._restore_unit_scale()

    def unscale_layer(self, scale: float | None = None) -> None:
        super().unscale_layer(scale)  # type: ignore[misc]
        self._restore_unit_scale()

    @property
    def scaling(self) -> dict[str, float]:
        """Scale of each adapter. PEFT's helpers set it for all at once; that of a surrogate stays 1."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: dict[str, float]) -> None:
        self._scaling = value
        self._restore_unit_scale()

    def _restore_unit_scale(self) -> None:
        self._scaling.update(dict.fromkeys(self._surrogates, 1.0))

    def unload_and_optionally_merge_module(self, merge: bool, **kwargs: Any) -> nn.Module:
        """Give PEFT's `unload` the bare backbone; refuse its merge, and to unload what is stacked on surrogates."""
        if merge:
            self.merge()
        stacked = sorted(set(self.lora_A) - set(self._surrogates))  # type: ignore[attr-defined]
        if stacked:
            raise ValueError(
                f"unloading all adapters would take the surrogates with it; delete your own: delete_adapter({stacked})"
            )
        base: BackboneLayer = self.get_base_layer()  # type: ignore[attr-defined]
        base.deflation = None
        return base

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "merging into a quantized backbone rounds the result to the backbone's grid again, which undoes the "
            "surrogate. Use hf_polarize.merge_surrogates(model): it dequantizes first and merges then."
        )


class SurrogateLinear4bit(SurrogateLayer, lora_bnb.Linear4bit):
    """A surrogate beside an NF4 layer."""


class SurrogateLinear8bit(SurrogateLayer, lora_bnb.Linear8bitLt):
    """A surrogate beside an INT8 layer."""


def _left_alone(target: nn.Module, adapter_name: str, target_name: str = "", **kwargs: Any) -> nn.Module:
    """Give a layer that isn't quantized no surrogate; "all-linear" means those too."""
    if isinstance(target, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
        raise ValueError(
            f"{target_name} was quantized by bitsandbytes alone; load the model with "
            "quantization_config=PolarizeConfig(...) to give it surrogates"
        )
    logger.info("%s is not quantized and gets no surrogate", target_name)
    return target


SURROGATE_LAYERS.update(
    {
        BackboneLinear4bit: SurrogateLinear4bit,
        BackboneLinear8bit: SurrogateLinear8bit,
        nn.Linear: _left_alone,  # after its subclasses
        Conv1D: _left_alone,
    }
)


def core_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def surrogates(model: nn.Module) -> Iterator[tuple[str, LoraLayer, str]]:
    """Yield the name of the layer as in the base model, the layer, and the adapter's name, for all surrogates."""
    for name, module in core_model(model).named_modules():
        if isinstance(module, SurrogateLayer):
            for adapter in module._surrogates:
                yield name, module, adapter  # type: ignore[misc]


def surrogate_adapter(model: nn.Module) -> str:
    """
    Return the name of the one adapter that holds the surrogates.

    Raises:
        ValueError: If there is none, or more than one.
    """
    names = {adapter for _, _, adapter in surrogates(model)}
    if len(names) != 1:
        others = sorted(getattr(core_model(model), "peft_config", {}) or {})
        raise ValueError(
            f"expected one adapter made with a SurrogateConfig, found {sorted(names) or 'none'} (adapters of the "
            f"model: {others or 'none'}). Attach one with polarize(model, data) or "
            "get_peft_model(model, SurrogateConfig(r=8))."
        )
    return names.pop()


def factors(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Return A `(r, in_features)` and B `(out_features, r)` of every layer, by the layer's name in the base model."""
    return {
        name: (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)  # type: ignore[misc]
        for name, layer, adapter in surrogates(model)
    }


def target_modules(model: nn.Module, names: set[str]) -> list[str]:
    """Return the shortest names by which PEFT finds these layers and no other module: last parts, or full names."""
    short = {name.rpartition(".")[2] for name in names}
    found = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short and ".lora_" not in name}
    return sorted(short if found == names else names)


def factor_dtype(layer: nn.Module) -> torch.dtype:
    """
    Return the dtype in which transformers and PEFT load the factors of a layer, whatever the file holds.

    It is the compute dtype of an NF4 layer (tuners_utils.py:2163 of peft 0.21.2), by default that of the model, and
    float32 beside an INT8 layer.
    """
    dtype: torch.dtype | None = getattr(layer.get_base_layer(), "compute_dtype", None)  # type: ignore[operator]
    return dtype or torch.float32


def attach_surrogates(
    model: PreTrainedModel,
    config: SurrogateConfig,
    values: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    trainable: bool = True,
) -> PreTrainedModel:
    """
    Attach the surrogates to a model with a backbone and fill in their factors.

    Args:
        model (`PreTrainedModel`): with a backbone.
        config (`SurrogateConfig`): its `target_modules` are set to the layers of `values`.
        values (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`):
            A `(r, in_features)` and B `(out_features, r)` by layer name, kept in [`factor_dtype`].
        trainable (`bool`, defaults to `True`): whether the factors ask for gradients.

    Returns:
        The same model.
    """
    config.target_modules = target_modules(model, set(values))
    model.add_adapter(config, SURROGATE)
    for name, pair in factors(model).items():
        for factor, value in zip(pair, values[name], strict=True):
            factor.data.copy_(value)
            factor.requires_grad_(trainable)
    return model


@contextmanager
def backbone_only(model: nn.Module) -> Iterator[nn.Module]:
    """Run the bare backbone inside this context: no surrogate, nothing deflated and no adapter on top of it."""
    layers = [layer for _, layer, _ in surrogates(model)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield model
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag


def merge_surrogates(model: nn.Module) -> PreTrainedModel:
    """
    Merge the surrogates the way that keeps what they won: dequantize each layer first, then add B A.

    The result is a plain model without adapters or quantization, of the original's size. Each weight is
    `dequantize(Q) + B A`, added in float32 and rounded once to the dtype of the model.

    Args:
        model (`PreTrainedModel` or `PeftModel`): polarized; it is changed in place.

    Returns:
        The transformers model, ready for `save_pretrained`.

    Raises:
        ValueError: If there is no surrogate, or another adapter is stacked on top; delete that one first.
    """
    core, adapter = core_model(model), surrogate_adapter(model)
    others = sorted({name for _, layer, _ in surrogates(model) for name in layer.lora_A} - {adapter})
    if others:
        raise ValueError(f"adapters {others} are stacked on the surrogate; delete them before merging")
    dtype = core.dtype
    for name, (a, b) in factors(model).items():
        base = core.get_submodule(name).base_layer
        delta = (b.float() @ a.float()).detach()
        core.set_submodule(name, plain_layer(base, dtype, delta))  # type: ignore[arg-type]
    for name, layer in list(backbone_layers(core)):
        core.set_submodule(name, plain_layer(layer, dtype))
    if getattr(core, "hf_quantizer", None) is not None:  # not after model.dequantize()
        core.hf_quantizer.remove_quantization_config(core)
    for name in ("save_pretrained", "push_to_hub"):  # those of a polarized model
        core.__dict__.pop(name, None)
    core._hf_peft_config_loaded = False
    if hasattr(core, "peft_config"):
        del core.peft_config
    return core

"""The hook: backbone layers run on a simulated chip, and come off it again without a trace."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..backbone import backbone_layers
from ..formats import BackboneLayer
from ..models import Batch, full_name
from ..surrogate import core_model
from .array import Converter, exact_product
from .chip import fabricate, generator_for
from .configuration import CIMConfig
from .fast import FastArray, fast_array
from .planes import grouped_weights, quantized_inputs, weight_code
from .ranges import measured_ranges

if TYPE_CHECKING:
    from .variation import ChipMoments

logger = logging.get_logger(__name__)


class OnChip:
    """
    A backbone layer on one chip.

    Args:
        layer ([`~hf_polarize.formats.BackboneLayer`]): its codes and scales are read once.
        name (`str`): of the layer, its [`~hf_polarize.models.full_name`]; the cells depend on it.
        config ([`CIMConfig`]): of the chip.

    Attributes:
        reason (`str`, *optional*): why the fast model is not valid here, in words.
        exact (`bool`): whether the layer runs plane by plane.

    Raises:
        ValueError: If `config.model` is `"fast"` and that is not valid here.
    """

    def __init__(self, layer: BackboneLayer, name: str, config: CIMConfig) -> None:
        self.name, self.config = name, config
        levels = layer.levels()
        indices, scale = grouped_weights(layer.units(), layer.block_scales(), layer.block_size, config, levels)
        self.scale = scale / config.drift
        self.converter = Converter.of(config, config.largest_count(name))
        self.in_features = layer.in_features
        planes = list(fabricate(indices, weight_code(config, levels), config, name))
        self.fast, self.reason = fast_array(planes, self.scale, self.converter, config, self.in_features)
        if config.measured and self.reason is None:
            self.reason = f"adc_range={config.adc_range!r} may cut large counts"
        if config.model == "fast" and self.reason:
            raise ValueError(
                f'cim: the fast model is not valid for {name}: {self.reason}; model="auto" runs such layers exactly'
            )
        self.exact = config.model == "exact" or self.reason is not None
        self.planes = planes if self.exact else None
        self.fast = self.fast.to(self.scale.device)
        self.varied: FastArray | None = None
        self.reset()

    def vary(self, moments: ChipMoments, generator: torch.Generator) -> None:
        """
        Take the weights and the offsets of a chip that nobody made, by the fast model, until [`restore`].

        Args:
            moments ([`~hf_polarize.cim.variation.ChipMoments`]): of this layer.
            generator (`torch.Generator`): draws the chip; on the CPU.
        """
        self.move(moments.mean.device)

        def draw(mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
            return torch.addcmul(mean, variance.sqrt(), noise)

        weight = draw(moments.mean, moments.variance).to(self.fast.weight.dtype)
        self.varied = dataclasses.replace(self.fast, weight=weight, offset=draw(self.fast.bias, moments.offset))

    def restore(self) -> None:
        """Take those of the own chip again."""
        self.varied = None

    def reset(self) -> None:
        """Begin the noise of readings anew."""
        self._reads = generator_for(self.config.read_seed, "reads", self.name)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, training: bool = False) -> torch.Tensor:
        """
        Multiply `(..., in)` with the weight of this chip: `(..., out)` in the dtype of the input.

        While training, readings have the noise that torch's own generator says, like dropout: gradient checkpointing
        and a Trainer that resumes know how to draw it again.
        """
        reads = self._reads
        if training:
            reads = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        y: torch.Tensor = _OnChipProduct.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, self.in_features), self, reads
        )
        if bias is not None:
            y = y + bias
        return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)

    def product(self, x: torch.Tensor, reads: torch.Generator | None = None) -> torch.Tensor:
        """
        Return `(tokens, out)`, float32, without the bias. Autocast has no say in what an array computes.

        Args:
            x (`torch.Tensor` of shape `(tokens, in)`): the inputs.
            reads (`torch.Generator`, *optional*): of the noise of readings; that of `read_seed` by default.
        """
        reads = reads or self._reads
        self.move(x.device)
        with torch.autocast(x.device.type, enabled=False):
            q, scale = quantized_inputs(x, self.config.input_bits)
            if self.varied is not None:
                return self.varied(q, scale, reads)
            if self.planes is None:
                return self.fast(q, scale, reads)
            y = exact_product(q, self.planes, self.scale, self.config, self.converter, reads)
            return y.float().mul_(scale)

    def move(self, device: torch.device) -> None:
        """Take the chip to where its layer is."""
        if self.scale.device != device:
            self.scale = self.scale.to(device)
            self.fast = self.fast.to(device)
            self.varied = None if self.varied is None else self.varied.to(device)
            self.planes = None if self.planes is None else [plane.to(device) for plane in self.planes]


class _OnChipProduct(torch.autograd.Function):
    """The product on a chip, with the gradient of its weight, straight through rounding (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, chip: OnChip, reads: torch.Generator) -> torch.Tensor:
        y = chip.product(x, reads)
        ctx.fast = chip.varied or chip.fast
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = grad_outputs
        weight = ctx.fast.weight
        return (gradient.to(weight.dtype) @ weight).to(gradient.dtype), None, None


def attach_cim(model: nn.Module, config: CIMConfig, data: Iterable[Batch] | None = None) -> nn.Module:
    """
    Run the backbone of a model on a simulated chip. Surrogates and all other layers stay digital.

    The configuration becomes part of the model's: `save_polarized` and `save_pretrained` keep it, and loading makes
    the same chip again. A chip that is attached already is taken off first.

    Args:
        model (`PreTrainedModel` or `PeftModel`): with a backbone.
        config ([`CIMConfig`]): of the chip.
        data (`Iterable[dict[str, torch.Tensor]]`, *optional*): batches on which ranges of the ADC are measured; only
            for an `adc_range` other than `"full"`, and where the configuration does not have them yet.

    Returns:
        The same model.

    Raises:
        TypeError: If `config` is no [`CIMConfig`].
        ValueError: If the model has no backbone, `config.layers` finds none of it, a layer can't be mapped, or ranges
            are to be measured and there is no data.
    """
    if not isinstance(config, CIMConfig):
        raise TypeError(f"attach_cim takes a CIMConfig; got {type(config).__name__}")
    core = core_model(model)
    chosen = _chosen(core, config)
    if any(layer.deflation is not None for layer in chosen.values()):
        config = config.quietly()
    if config.measured and not set(chosen) <= set(config.ranges):
        if data is None:
            raise ValueError(
                f"cim: adc_range={config.adc_range!r} is measured: give batches, attach_cim(model, config, data=...)"
            )
        with off_chip(core):
            config = config.replace(ranges=measured_ranges(core, chosen, config, data))
    made = {}
    with logging.tqdm(total=len(chosen), desc="making the chip", unit="layer") as bar:
        for name, layer in chosen.items():
            made[name] = OnChip(layer, name, config)
            bar.update()
    slow = Counter(re.sub(r"[-+]?\d[\d.]*", "…", chip.reason) for chip in made.values() if chip.reason)
    if slow and config.model == "auto":
        logger.warning_once(
            f"cim: {slow.total()} of {len(made)} layers run plane by plane, which takes tens of times as long, since "
            f"the fast model is not valid there: {'; '.join(sorted(slow))}"
        )
    detach_cim(model)
    for name, layer in chosen.items():
        layer.chip = made[name]
    core.config.quantization_config.cim = config
    warn_if_fitted(core)
    return model


def cells_of(config: CIMConfig) -> dict[str, Any]:
    """Return what a chip is by itself, as JSON can hold it: not how it is read and simulated."""
    return config.replace(read_seed=0, model="auto", layers=None, ranges={}).to_dict()


def warn_if_fitted(core: nn.Module) -> None:
    """Warn of a model that was fitted to another chip than the one it is on."""
    fitted = (getattr(core, "polarization", None) or {}).get("provenance", {}).get("chip")
    chip: CIMConfig | None = core.config.quantization_config.cim  # type: ignore[union-attr, assignment]
    if not fitted or chip is None:
        return
    own, this = CIMConfig.from_dict(fitted["cim"]), CIMConfig.from_dict(cells_of(chip))
    differs = [
        item.name for item in dataclasses.fields(CIMConfig) if getattr(own, item.name) != getattr(this, item.name)
    ]
    if differs:
        how = ", ".join(f"{name} {getattr(this, name)!r} instead of {getattr(own, name)!r}" for name in differs)
        logger.warning(f"cim: the model was fitted to one chip, and is the worse for it on this one, with {how}")


def detach_cim(model: nn.Module) -> nn.Module:
    """Take a model off its chip: from here on it computes, bit for bit, what it computed before."""
    core = core_model(model)
    for _, layer in backbone_layers(core):
        layer.chip = None
    quantization = getattr(core.config, "quantization_config", None)
    if quantization is not None:
        quantization.cim = None
    return model


@contextmanager
def off_chip(model: nn.Module) -> Iterator[nn.Module]:
    """
    Run a model off its chip inside this context.

    Args:
        model (`PreTrainedModel` or `PeftModel`): on a chip, or on none.
    """
    taken = {layer: layer.chip for _, layer in backbone_layers(core_model(model))}
    for layer in taken:
        layer.chip = None
    try:
        yield model
    finally:
        for layer, chip in taken.items():
            layer.chip = chip


def _chosen(core: PreTrainedModel, config: CIMConfig) -> dict[str, BackboneLayer]:
    layers = dict(backbone_layers(core))
    if not layers:
        raise ValueError(
            "cim: the model has no backbone to put on a chip; load it with quantization_config=PolarizeConfig(...)"
        )
    chosen = {full_name(core, name): layer for name, layer in layers.items() if config.covers(name, core)}
    if not chosen:
        raise ValueError(f"cim: none of the {len(layers)} layers has a name that layers={config.layers} finds")
    for name, layer in chosen.items():
        if layer.weight.device.type == "meta":
            raise ValueError(f"cim: {name} is offloaded; a chip takes layers that are in memory")
    return chosen


def chips(model: nn.Module) -> Iterator[tuple[str, OnChip]]:
    """Yield the name and the chip of every layer that runs on one."""
    for name, layer in backbone_layers(core_model(model)):
        if layer.chip is not None:
            yield name, layer.chip


def reset_reads(model: nn.Module) -> None:
    """
    Begin the noise of all readings anew, so that the same inputs read the same.

    In training it is torch's own generator that says what is read: `torch.manual_seed` begins that anew.

    Args:
        model (`PreTrainedModel` or `PeftModel`): on a chip.
    """
    for _, chip in chips(model):
        chip.reset()

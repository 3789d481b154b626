"""
Deflated execution: what a surrogate computes anyway is taken out of the backbone's input.

    z = A x,   y = backbone(x - R z) + Q R z + B z,   B = (W - Q) R

On an exact backbone this is Q x + B A x, for any R: every reader may leave R out. On a noisy one it is not the same:
the array, or the rounding of its inputs, never sees the few directions that carry most of the input's energy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .backbone import backbone_layers, weight_matrix
from .calibration import Statistics
from .cim.configuration import CIMConfig
from .cim.fast import FastArray
from .cim.hook import OnChip, attach_cim
from .cim.programming import codes_for_cells
from .cim.variation import chip_moments
from .compensation import OUTPUT_DAMPING, Compensation, damped
from .configuration import ClosedForm, PolarizeConfig
from .formats import BackboneLayer
from .models import Batch
from .requantization import requantize
from .rounding import Covariance
from .surrogate import core_model, factors, surrogate_adapter, surrogates

logger = logging.get_logger(__name__)

CREST = 6.0
"""Largest magnitude of a deflated token by its root mean square, for the noise that is proportional to it."""
ACTIVATION_STEPS = {"int8": 1 / 127, "nf4": 1 / 7.5}
"""Mean distance of neighbouring levels of rounded activations, as a share of the largest."""


class Deflation:
    """
    Run a backbone layer deflated by the surrogate beside it, unless that is disabled.

    Args:
        layer ([`~hf_polarize.formats.BackboneLayer`]): the backbone's.
        surrogate ([`peft.tuners.lora.LoraLayer`]): beside it.
        adapter (`str`): the surrogate's name there; its A is `(r, in)`.
        r (`torch.Tensor` of shape `(in, r)`): R, float32.
    """

    def __init__(self, layer: BackboneLayer, surrogate: Any, adapter: str, r: torch.Tensor) -> None:
        self.surrogate, self.adapter, self.r = surrogate, adapter, r
        self.refresh(layer)

    def refresh(self, layer: BackboneLayer) -> None:
        """Compute Q R `(out, r)` from what the layer holds now."""
        weight = layer.dequantized().float()
        self.r = self.r.to(weight).contiguous()  # strides change the last bits of a product on some CPUs
        self.qr = weight @ self.r

    @property
    def active(self) -> bool:
        """Whether the surrogate computes z."""
        return not self.surrogate.disable_adapters

    def rest(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x - R z in the dtype of x, and z, float32."""
        weight: torch.Tensor = self.surrogate.lora_A[self.adapter].weight
        if self.r.device != x.device:
            self.r, self.qr = self.r.to(x.device), self.qr.to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            z = x.float() @ weight.float().T
            return (x.float() - z @ self.r.T).to(x.dtype), z

    def __call__(self, layer: BackboneLayer, x: torch.Tensor) -> torch.Tensor:
        if not self.active:
            return layer.executed(x)
        rest, z = self.rest(x)
        with torch.autocast(x.device.type, enabled=False):
            back = z @ self.qr.T
        return layer.executed(rest) + back.to(x.dtype)


def attach_deflation(core: nn.Module, removed: Mapping[str, torch.Tensor]) -> None:
    """
    Let layers run deflated, wherever they run on a chip or with rounded activations.

    Args:
        core (`PreTrainedModel`): with one surrogate beside each of the layers.
        removed (`Mapping[str, torch.Tensor]`): R `(in, r)` by layer name.

    Raises:
        ValueError: If a layer has no surrogate of that rank.
    """
    found = {name: (layer, adapter) for name, layer, adapter in surrogates(core)}
    for name, r in removed.items():
        layer, adapter = found.get(name, (None, ""))
        if layer is None or layer.lora_A[adapter].weight.shape != r.T.shape:
            raise ValueError(f"no surrogate of rank {r.shape[1]} stands beside {name}: it can't run deflated")
        base: BackboneLayer = layer.get_base_layer()  # type: ignore[assignment]
        base.deflation = Deflation(base, layer, adapter, r)
    chip = next((layer.chip.config for _, layer in backbone_layers(core) if layer.chip is not None), None)
    if removed and chip is not None and chip != chip.quietly():
        attach_cim(core, chip)  # written as a deflated layer is


def removed_directions(core: nn.Module) -> dict[str, torch.Tensor]:
    """Return R of every layer that runs deflated, by name."""
    bases = {name: layer.get_base_layer() for name, layer, _ in surrogates(core)}
    return {name: base.deflation.r for name, base in bases.items() if base.deflation is not None}  # type: ignore[union-attr]


def deflating_path(metric: torch.Tensor, covariance: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
    """
    Find A and R that leave least of the error: the minimum of tr(M (I - R A) H (I - R A)^T).

    With M = K K^T and H = L L^T it is the truncated singular value decomposition U S V^T of K^T L:
    A = V_r^T L^(-1), R = K^(-T) U_r S_r. With M = E^T E it is QERA-exact (arXiv 2410.06040, theorem 1), B A = E R A.

    Args:
        metric (`torch.Tensor` of shape `(in, in)`): M, positive definite, float64.
        covariance (`torch.Tensor` of shape `(in, in)`): H, positive definite, float64.
        rank (`int`): r.

    Returns:
        A `(r, in)`, R `(in, r)`, and the singular values S `(r,)`, whose squares are what each path takes back.
    """
    k, low = torch.linalg.cholesky(metric), torch.linalg.cholesky(covariance)
    x = k.T @ low
    values, vectors = torch.linalg.eigh(x.T @ x)
    v = vectors[:, -rank:].flip(1)
    s = values[-rank:].flip(0).clamp(min=0).sqrt()
    a = torch.linalg.solve_triangular(low, v.T, upper=False, left=False)
    r = torch.linalg.solve_triangular(k.T, x @ v, upper=True)
    balance = s.sqrt().clamp(min=1e-30)  # as the other closed forms share the singular values
    return a * balance[:, None], r / balance, s


def per_integer(chip: CIMConfig) -> float:
    """Return the mean square of a token's scale, of an input of 1, per mean square of its inputs."""
    largest: int = 2 ** (chip.input_bits - 1) - 1
    return (CREST / largest) ** 2


@dataclass(frozen=True)
class Execution:
    """
    What a backbone layer computes where it runs, over all chips of a kind, or with rounded inputs.

    Mismatch makes a weight vary from chip to chip. Offsets of columns and the noise of readings, of the ADC and of
    rounded inputs are as large as a token's scale, (CREST / largest integer)^2 times its mean square: all inputs share
    them alike.

    Attributes:
        weight (`torch.Tensor` of shape `(out, in)`): on average, float64: the values of the format on the grid of the
            array, with stuck cells and IR drop.
        variance (`torch.Tensor` of shape `(out, in)`): of each weight over chips, float64.
        random, offset (`torch.Tensor` of shape `(out,)`): variance of each output per mean square of the inputs, of
            readings and rounding, and of the offsets of columns, float64.
    """

    weight: torch.Tensor
    variance: torch.Tensor
    random: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def of(cls, layer: BackboneLayer, config: PolarizeConfig) -> Execution:
        """Return that of a layer with `cim` or `activations`."""
        weight = layer.dequantized().double()
        rounding = weight.square().sum(1) / 12
        if config.cim is None:
            step = ACTIVATION_STEPS[config.activations or "int8"]
            return cls(weight, torch.zeros_like(weight), rounding * (CREST * step) ** 2, torch.zeros_like(rounding))
        chip = config.cim.quietly()
        moments = chip_moments(layer, chip)
        random, offset = moments.reading.double() + rounding, moments.offset.double()
        scale = per_integer(chip)
        return cls(moments.mean.double(), moments.variance.double(), random * scale, offset * scale)

    def metric(self, weight: torch.Tensor, g: torch.Tensor | None) -> torch.Tensor:
        """
        Return M `(in, in)` = E^T G E + diag(c), E = W less the weight as executed.

        c is the variance of the output per variance of each input: c_j = sum_i G_ii V_ij + the shared noise.

        Args:
            weight (`torch.Tensor` of shape `(out, in)`): W, float64.
            g (`torch.Tensor` of shape `(out, out)`, *optional*): G; I if left out.
        """
        error = weight - self.weight
        importance = torch.ones_like(error[:, 0]) if g is None else g.diagonal()
        m = error.T @ (error if g is None else g @ error)
        noise = importance @ self.variance + importance @ (self.random + self.offset) / error.shape[1]
        return m + torch.diag(noise + 1e-6 * (m.diagonal().mean() + noise.mean()))


def deflate(
    layer: BackboneLayer,
    weight: torch.Tensor,
    inputs: Covariance,
    rank: int,
    largest: int,
    config: PolarizeConfig,
    closed_form: ClosedForm,
    output_covariance: torch.Tensor | None = None,
) -> Compensation:
    """
    Find the deflating path of a layer that runs on any chip of a kind, and the backbone that suits it.

    M of [`Execution`]: A and R by [`deflating_path`], then codes and scales for what is left of the input,
    H' = (I - R A) H (I - R A)^T, then A and R once more.

    Args:
        layer ([`~hf_polarize.formats.BackboneLayer`]): holds W, quantized; changed in place.
        weight (`torch.Tensor` of shape `(out, in)`): W.
        inputs ([`~hf_polarize.rounding.Covariance`]): H.
        rank (`int`): r, for which the backbone is chosen.
        largest (`int`): number of paths that are returned, for any rank up to it.
        config ([`PolarizeConfig`]): with `cim` or `activations`.
        closed_form ([`ClosedForm`]): `alternations` and `scale_search` of the backbone; `two_sided` puts G into M.
        output_covariance (`torch.Tensor` of shape `(out, out)`, *optional*): G, damped, float64, to predict losses.

    Returns:
        [`~hf_polarize.compensation.Compensation`]: with `r`; its errors and losses are those expected on the chip.
    """
    w, h, g = weight.double(), inputs.matrix, output_covariance
    outputs = Covariance(g) if g is not None and closed_form.two_sided else None
    if closed_form.scale_search or closed_form.alternations:
        metric = Execution.of(layer, config).metric(w, g if closed_form.two_sided else None)
        a, r, _ = deflating_path(metric, h, rank)
        rest = torch.eye(len(h), dtype=h.dtype, device=h.device) - r @ a
        requantize(
            layer, weight, Covariance(damped(rest @ h @ rest.T)), 0, closed_form.alternations,
            closed_form.scale_search, outputs,
        )  # fmt: skip
    execution = Execution.of(layer, config)
    plain = execution.metric(w, None)
    weighed = plain if g is None else execution.metric(w, g)
    a, r, _ = deflating_path(weighed if closed_form.two_sided else plain, h, largest)
    b, ha = (w - layer.dequantized().double()) @ r, h @ a.T

    def left(m: torch.Tensor) -> torch.Tensor:
        """Return tr(M (I - R A) H (I - R A)^T), multiplied out, for every number of paths."""
        mr = m @ r
        once, twice = (ha * mr).sum(0).cumsum(0), ((a @ ha) * (r.T @ mr)).cumsum(0).cumsum(1).diagonal()
        return (torch.cat([once.new_zeros(1), twice - 2 * once]) + (m * h).sum()).clamp(min=0)

    size, losses = ((w @ h) * w).sum(), left(weighed) / 2
    return Compensation(
        a=a.float(), b=b.float(),
        errors=((left(plain) / size).sqrt() if size > 0 else torch.zeros_like(losses)).tolist(),
        loss_before=None if g is None else float(losses[0]),
        gains=None if g is None else (-losses.diff()).tolist(), r=r.float(),
    )  # fmt: skip


def deflated_on_chip(model: nn.Module) -> dict[str, BackboneLayer]:
    """
    Return the layers on a chip that have a surrogate beside them, by name.

    Raises:
        ValueError: If one of them is not deflated, there is none, or the model has several adapters of surrogates.
    """
    core, _ = core_model(model), surrogate_adapter(model)
    bases = {name: core.get_submodule(name).get_base_layer() for name in factors(core)}  # type: ignore[operator]
    on_chip: dict[str, BackboneLayer] = {name: layer for name, layer in bases.items() if layer.chip is not None}
    plain = [name for name, layer in on_chip.items() if layer.deflation is None]
    if plain or not on_chip:
        what = f"{plain[0]} is not deflated" if plain else "no surrogate stands beside a layer on a chip"
        raise ValueError(f"{what}: polarize with deflated=True and a chip first")
    return on_chip


def fit_to_chip(
    model: nn.Module,
    originals: Mapping[str, nn.Module],
    statistics: Iterable[Mapping[str, Statistics]],
    batches: Sequence[Batch],
    two_sided: bool = False,
    codes: bool = False,
) -> None:
    """
    Solve the surrogates of a deflated model anew for the one chip that it is attached to.

    The static error of that chip, measured, takes the place of its variance over chips: E = W - W_chip, c of readings
    and of the offsets of its columns. What training has made of B stays: the weight that is aimed at is W + D A, where
    D is what B has beyond the (W - Q) R of the closed form; so a model is fitted once. The backbone stays as it is,
    unless its codes are chosen anew as well. Those are right on that chip only: elsewhere, and off any chip, the model
    is the worse for them.

    Args:
        model (`PreTrainedModel` or `PeftModel`): deflated and on a chip; A, R and B are changed in place.
        originals (`Mapping[str, nn.Module]`): the original's layers, by name, with W `(out, in)`.
        statistics (`Iterable[Mapping[str, Statistics]]`): of [`~hf_polarize.calibration.layer_statistics`]. A layer
            that is in none of them is fitted as one whose inputs all count alike.
        batches (`Sequence[dict[str, torch.Tensor]]`): to measure ranges of ADCs anew, where those are measured.
        two_sided (`bool`, defaults to `False`): weigh output errors by the G of the statistics.
        codes (`bool`, defaults to `False`): choose codes by what each cell makes of them, with
            [`~hf_polarize.cim.programming.codes_for_cells`]. It takes a chip whose cells were measured one by one.

    Raises:
        ValueError: If a layer is not deflated, or none is on a chip; or on a chip with `model="fast"`, where that is
            not valid for the new codes of a layer.
    """
    core, left = core_model(model), deflated_on_chip(model)
    exact = [(name, layer.chip.reason) for name, layer in left.items() if layer.chip.reason is not None]
    if exact:
        logger.warning(
            f"cim: a chip is measured by the weights of its fast model, which is not valid for {len(exact)} layers, "
            f"among them {exact[0][0]} ({exact[0][1]}): they are fitted to less than what the chip does"
        )
    config: PolarizeConfig = core.config.quantization_config
    chip: CIMConfig = config.cim  # type: ignore[assignment]
    with logging.tqdm(total=len(left), desc="fitting to the chip", unit="layer") as bar:
        for part in itertools.chain(statistics, [None]):  # at last those that no token reached
            for name in [name for name in left if part is None or name in part]:
                known = Statistics.unseen(originals[name]) if part is None else part[name]
                weight = weight_matrix(originals[name]).double()
                known = known if two_sided else replace(known, g=None)
                _fit_layer(left.pop(name), weight, known, codes, config)
                bar.update()
    if chip.adc_range != "full" and chip.adc_bits is not None:
        attach_cim(model, chip.replace(ranges={}), batches)


@torch.no_grad()
def _fit_layer(
    layer: BackboneLayer, weight: torch.Tensor, known: Statistics, codes: bool, config: PolarizeConfig
) -> None:
    """Fit A, R and B of one layer to its chip, and with `codes` what is written."""
    deflation: Deflation = layer.deflation
    layer.chip.move(weight.device)
    a, b = (getattr(deflation.surrogate, part)[deflation.adapter].weight for part in ("lora_A", "lora_B"))
    beyond = b.double() - (weight - layer.dequantized().double()) @ deflation.r.double()
    weight = weight + beyond @ a.double()
    first, r = _path_on_chip(layer, weight, known, len(a), config)
    if codes:
        rest = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device) - r @ first
        seen = Covariance(damped(rest @ damped(known.h) @ rest.T))
        chip, before = layer.chip.config, layer.weight.detach().clone()
        layer.store(codes_for_cells(layer, layer.chip.name, weight, seen, chip), layer.block_scales())
        try:
            layer.chip = OnChip(layer, layer.chip.name, chip)
        except ValueError:  # model="fast", and not valid for the new codes
            layer.weight.data.copy_(before)
            raise
        first, r = _path_on_chip(layer, weight, known, len(a), config)
    a.copy_(first)
    b.copy_((weight - layer.dequantized().double()) @ r)
    deflation.r = r
    deflation.refresh(layer)


def _path_on_chip(
    layer: BackboneLayer, weight: torch.Tensor, known: Statistics, rank: int, config: PolarizeConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and R for the error of the chip that a layer is on."""
    g = None if known.g is None else damped(known.g, OUTPUT_DAMPING)
    any_chip = Execution.of(layer, config)
    fast: FastArray = layer.chip.fast
    offset = fast.offset.double().square() * per_integer(layer.chip.config)
    this = replace(any_chip, weight=fast.weight.double(), variance=torch.zeros_like(weight), offset=offset)
    a, r, _ = deflating_path(this.metric(weight, g), damped(known.h), rank)
    return a, r


def check_deflated(config: Any) -> None:
    """
    Make sure that deflation has something to work against.

    Raises:
        ValueError: If the backbone runs exactly.
    """
    if config.cim is None and config.activations is None:
        raise ValueError(
            "deflated=True takes what a surrogate sees out of the input of a noisy backbone: give the PolarizeConfig "
            "a chip (cim=CIMConfig(...)) or rounded activations"
        )

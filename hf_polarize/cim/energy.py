"""
The energy bill of a model on a chip, item by item, every constant with its source.

It is of multiply-accumulates and conversion. In no item: moving data (reading the weights of digital layers and
surrogates, the keys and values of attention, driving the rows of the array), norms, softmax and activation functions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .configuration import CIMConfig
from .planes import WeightCode, integer_planes, weight_code

logger = logging.get_logger(__name__)

ITEMS = ("array", "ADC", "shift-add", "scales", "surrogate", "deflation", "other layers", "attention")
"""Of a bill, in the order of the tables."""


@dataclass(frozen=True)
class Constant:
    """A number that a bill rests on: its value, unit, source, and the node and voltage that it was given for."""

    value: float
    unit: str
    source: str
    node: str
    voltage: str


HOROWITZ = "Horowitz, ISSCC 2014, multiply and add"
JOUPPI = "Jouppi et al., ISCA 2021 (Ten lessons), multiply and add"
NODES = (45, 28, 16, 7)
MAC = {
    ("fp16", 45): Constant(1.5, "pJ", HOROWITZ, "45 nm", "0.9 V"),
    ("fp16", 7): Constant(0.50, "pJ", JOUPPI, "7 nm", "nominal"),
    ("bf16", 7): Constant(0.32, "pJ", JOUPPI, "7 nm", "nominal"),
    ("int8", 45): Constant(0.23, "pJ", HOROWITZ, "45 nm", "0.9 V"),
    ("int8", 7): Constant(0.077, "pJ", JOUPPI, "7 nm", "nominal"),
}
"""Digital multiply-accumulates as they were published; [`digital_mac`] goes between them."""
ADC_LINEAR = Constant(100.0, "fJ / V^2 / bit", "ZigZag-IMC, k1 of its ADC model", "28 nm", "times V_DD^2")
ADC_EXPONENTIAL = Constant(0.001, "fJ / V^2 / 4^bit", "ZigZag-IMC, k2 of its ADC model", "28 nm", "times V_DD^2")
SHIFT_ADD = Constant(17.5, "fJ / reading", "assumed: middle of the 15 to 20 fJ of bit-serial arrays", "28 nm", "0.9 V")
ACTIVITY = Constant(
    0.5,
    "share of rows",
    "assumed: half of the input bits are 1; of cells, what the code of weights says",
    "any",
    "any",
)
PAPER = Constant(
    464.0, "TOPS/W", "arXiv 2411.05845, abstract, rank 8; its derivation is not public", "not given", "not given"
)
PAPER_RANK = 8
"""Of the surrogates in [`PAPER`]."""
PRESET_NODES = {"sram-28nm": 28.0}
"""Of presets that are named after another node than [`EnergyConfig`] takes."""


def digital_mac(kind: str, node: float) -> Constant:
    """
    Return the energy of a digital multiply-accumulate, pJ.

    Between the nodes that were published it follows a power of the node (a straight line in logarithms). bf16 has one
    node; others are as far from it as those of fp16.

    Args:
        kind (`str`): `"fp16"`, `"bf16"` or `"int8"`.
        node (`float`): nm, 7..45.

    Raises:
        ValueError: If the kind or the node is out of range.
    """
    known = {n: constant for (k, n), constant in MAC.items() if k == kind}
    if not known or not 7 <= node <= 45:
        raise ValueError(f"a digital MAC is of fp16, bf16 or int8, at 7 to 45 nm; got {kind!r} at {node} nm")
    if node in known:
        return known[int(node)]
    ends = {k: (MAC[k, 7].value, MAC[k, 45].value) for k in ("fp16", "int8")}
    low, high = ends["fp16" if kind == "bf16" else kind]
    power = math.log(high / low) / math.log(45 / 7)
    anchor = MAC[kind, 7]
    source = f"{anchor.source}; scaled from 7 nm by the power of the node that leads to {HOROWITZ}"
    return Constant(anchor.value * (node / 7) ** power, "pJ", source, f"{node:g} nm", "nominal")


@dataclass(frozen=True)
class EnergyConfig:
    """
    What a bill assumes beside the chip.

    Args:
        node (`float`, defaults to 16): nm, 7..45, of all logic and converters.
        digital (`str`, defaults to `"bf16"`): arithmetic of the surrogate, the scales and the layers off the chip.
        context (`int`, defaults to 512): tokens that attention looks back on.

    Raises:
        ValueError: If a value is out of range.
    """

    node: float = 16
    digital: str = "bf16"
    context: int = 512

    def __post_init__(self) -> None:
        digital_mac(self.digital, self.node)
        if self.context < 1:
            raise ValueError(f"context must be at least 1 token; got {self.context}")


@dataclass
class LayerShape:
    """A linear layer: its name, sizes, rank of its surrogate (0: none), and whether it is on the chip and deflated."""

    name: str
    out_features: int
    in_features: int
    rank: int = 0
    on_chip: bool = True
    deflated: bool = False

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the original layer for a token."""
        return self.out_features * self.in_features


def input_planes(chip: CIMConfig) -> int:
    """Return how many planes of inputs the array executes."""
    return len(integer_planes(torch.zeros(1), chip.input_bits, chip.encoding)[1])


def adc_energy(chip: CIMConfig, node: float) -> float:
    """
    Return what a reading costs in the ADC, fJ: `(100 b * node / 28 + 0.001 * 4^b) V^2`.

    The second term is what thermal noise asks for, at any node.
    """
    bits = adc_bits(chip)
    return float(ADC_LINEAR.value * bits * node / 28 + ADC_EXPONENTIAL.value * 4**bits) * chip.v_dd**2


def adc_bits(chip: CIMConfig) -> int:
    """Return the bits of a chip's ADC; without one, those of the smallest that tells all counts apart."""
    return chip.adc_bits or math.ceil(math.log2(chip.span + 1))


def layer_energy(layer: LayerShape, chip: CIMConfig, energy: EnergyConfig, code: WeightCode) -> dict[str, float]:
    """
    Return the items of one layer's bill for one token, pJ.

    With B_x and B_w planes of inputs and weights, C the cell, N rows and G = ceil(in / N) groups of rows:

        array      B_x B_w out in * activity * share of cells that hold 1 * C V^2
        ADC        B_x B_w out G * (100 b * node / 28 + 0.001 * 4^b) V^2
        shift-add  B_x B_w out G * 17.5 fJ * node / 28
        scales     out G multiply-accumulates
        surrogate  r (in + out) multiply-accumulates
        deflation  r (in + out) more: R z and Q R z

    V is the supply of the array and its ADCs. Digital logic has the nominal one of its node.

    Args:
        layer ([`LayerShape`]): the layer.
        chip ([`CIMConfig`]): that it runs on.
        energy ([`EnergyConfig`]): what else is assumed.
        code ([`~hf_polarize.cim.planes.WeightCode`]): of the weight; its values count as equally frequent.
    """
    mac = digital_mac(energy.digital, energy.node).value
    bill = dict.fromkeys(ITEMS, 0.0)
    paths = layer.rank * (layer.in_features + layer.out_features) * mac
    bill["surrogate"] = paths
    if not layer.on_chip:
        bill["other layers"] = layer.macs * mac
        return bill
    pairs = input_planes(chip) * len(code.significance)
    groups = -(-layer.in_features // chip.rows)
    readings = pairs * layer.out_features * groups
    hold_one = float((code.cells != 0).double().mean())
    cell = ACTIVITY.value * hold_one * chip.cell_capacitance * chip.v_dd**2
    bill["array"] = pairs * layer.macs * cell * 1e-3
    bill["ADC"] = readings * adc_energy(chip, energy.node) * 1e-3
    bill["shift-add"] = readings * SHIFT_ADD.value * energy.node / 28 * 1e-3
    bill["scales"] = layer.out_features * groups * mac
    bill["deflation"] = paths if layer.deflated else 0.0
    return bill


@dataclass
class Bill:
    """
    The bill of a model for one token.

    Attributes:
        layers (`dict[str, dict[str, float]]`): items of each layer, pJ.
        macs (`int`): multiply-accumulates of the original model, those of attention included.
        chip ([`CIMConfig`]), energy ([`EnergyConfig`]): what it was computed for.
        planes (`int`): pairs of planes of inputs and weights that the array executes, for the normalised figure.
        shapes (`list[LayerShape]`): of the linear layers.
    """

    layers: dict[str, dict[str, float]]
    macs: int
    chip: CIMConfig
    energy: EnergyConfig
    planes: int
    shapes: list[LayerShape] = field(default_factory=list)

    def totals(self) -> dict[str, float]:
        """Return the sum of each item over layers, pJ."""
        return {item: sum(bill[item] for bill in self.layers.values()) for item in ITEMS}

    @property
    def total(self) -> float:
        """pJ per token."""
        return sum(self.totals().values())

    @property
    def tops_per_watt(self) -> float:
        """Two operations per multiply-accumulate, of all those of the original model; 2 MACs / pJ."""
        return 2 * self.macs / self.total

    @property
    def on_chip_tops_per_watt(self) -> float:
        """Of the layers on the chip with their surrogates."""
        on_chip = [shape for shape in self.shapes if shape.on_chip]
        spent = sum(sum(self.layers[shape.name].values()) for shape in on_chip)
        return 2 * sum(shape.macs for shape in on_chip) / spent if spent else 0.0

    @property
    def one_bit_tops_per_watt(self) -> float:
        """The same with two operations for each pair of bits that is multiplied."""
        return self.planes * self.on_chip_tops_per_watt

    def caps(self) -> dict[str, float]:
        """Return the TOPS/W that would be left if only one item cost anything."""
        return {item: 2 * self.macs / value for item, value in self.totals().items() if value}

    def to_dict(self) -> dict[str, Any]:
        totals = self.totals()
        return {
            "pJ per token": self.total,
            "TOPS/W": self.tops_per_watt,
            "TOPS/W, layers on the chip": self.on_chip_tops_per_watt,
            "TOPS/W, layers on the chip, 1 bit": self.one_bit_tops_per_watt,
            "MACs per token": self.macs,
            "totals": totals,
            "caps": self.caps(),
            "largest item": max(totals, key=lambda item: totals[item]),
            "chip": self.chip.to_dict(),
            "assumptions": asdict(self.energy),
            "layers": self.layers,
        }


def bill_of(shapes: list[LayerShape], attention: int, chip: CIMConfig, energy: EnergyConfig, nf4: bool) -> Bill:
    """
    Add up the bill of a model.

    Args:
        shapes (`list[LayerShape]`): of its linear layers.
        attention (`int`): multiply-accumulates of attention per token, at `energy.context`.
        chip ([`CIMConfig`]), energy ([`EnergyConfig`]): what to assume.
        nf4 (`bool`): whether the backbone is NF4; INT8 always has the grid of `weight_bits`.
    """
    from bitsandbytes.functional import get_4bit_type

    levels = get_4bit_type("nf4", device="cpu")
    mapped = chip if nf4 or chip.on_grid else chip.replace(mapping=None)
    code, quiet = weight_code(mapped, levels), weight_code(mapped.quietly(), levels)
    layers = {shape.name: layer_energy(shape, chip, energy, quiet if shape.deflated else code) for shape in shapes}
    macs = attention + sum(shape.macs for shape in shapes)
    if attention:
        mac = digital_mac(energy.digital, energy.node).value
        layers["attention"] = {**dict.fromkeys(ITEMS, 0.0), "attention": attention * mac}
    return Bill(layers, macs, chip, energy, input_planes(chip) * len(code.significance), shapes)


def paper_section(bill: Bill) -> dict[str, Any]:
    """
    Set the paper's 464 TOPS/W beside what this bill gives, and say what would have to hold.

    It is 2 / 464 = 4.31 fJ for each multiply-accumulate of the backbone's layers, everything included. What is left of
    that for a digital multiply-accumulate of the surrogate (twice as many where it deflates), with everything else as
    in the bill and with everything else free, is the assumption that would have to hold.
    """
    on_chip = [shape for shape in bill.shapes if shape.on_chip]
    macs = sum(shape.macs for shape in on_chip)
    paths = sum((1 + shape.deflated) * shape.rank * (shape.in_features + shape.out_features) for shape in on_chip)
    layers = [bill.layers[shape.name] for shape in on_chip]
    spent = {item: 1e3 * sum(layer[item] for layer in layers) / macs for item in ITEMS}
    claimed = 2e3 / PAPER.value  # fJ per MAC
    analog = sum(value for item, value in spent.items() if item not in ("surrogate", "deflation"))
    share = paths / macs
    return {
        "claim, TOPS/W": PAPER.value,
        "claim, fJ per MAC": claimed,
        "backbone layers here, TOPS/W": 2e3 / sum(spent.values()),
        "fJ per MAC here": {item: value for item, value in spent.items() if value},
        "share of surrogate MACs": share,
        "cap of the surrogate alone, TOPS/W": {
            f"{kind}, {node} nm": 2 / (share * digital_mac(kind, node).value)
            for kind in ("fp16", "bf16", "int8")
            for node in NODES
        } if share else {},
        "surrogate MAC that the claim leaves, fJ, everything else free": claimed / share if share else math.inf,
        "surrogate MAC that the claim leaves, fJ, everything else as here": (claimed - analog) / share
        if share
        else -math.inf,
        "source": PAPER.source,
    }  # fmt: skip


def model_shapes(
    model: nn.Module, on_chip: Collection[str], ranks: Mapping[str, int], deflated: bool
) -> list[LayerShape]:
    """Return the shapes of a model's linear layers, of which some are on the chip, and there deflated."""
    from ..backbone import is_convertible, weight_matrix

    shapes = []
    for name, module in model.named_modules():
        if is_convertible(module):
            out_features, in_features = weight_matrix(module).shape
            rank, analog = ranks.get(name, 0), name in on_chip
            shapes.append(LayerShape(name, out_features, in_features, rank, analog, deflated and analog and rank > 0))
    return shapes


def attention_macs(config: Any, context: int) -> int:
    """
    Return the multiply-accumulates of attention per token: scores and sums over `context` tokens, all layers.

    Layers with a sliding window or chunks look back on no more than that, those without attention (`layer_types`) on
    nothing, those of an image on its patches. In an encoder-decoder a token is one of each, and those of the decoder
    attend to themselves and to the encoder's. 0, with a warning, for a model that does not say how many heads it has.
    """
    try:
        text = config.get_text_config()
        heads, layers = int(text.num_attention_heads), int(text.num_hidden_layers)
        size = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or text.hidden_size // heads
    except (AttributeError, TypeError, ValueError):
        logger.warning(f"no attention is billed: a {type(config).__name__} does not say what each layer attends to")
        return 0
    context = _patches(text) or context
    windows = {
        "full_attention": None,
        "attention": None,
        "sliding_attention": getattr(text, "sliding_window", None),
        "chunked_attention": getattr(text, "attention_chunk_size", None),
    }
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * layers
    looks_back = sum(min(windows[kind] or context, context) for kind in kinds if kind in windows)
    if getattr(config, "is_encoder_decoder", False):
        decoder = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None) or layers
        looks_back += 2 * decoder * context
    return int(2 * looks_back * heads * size)


def _patches(config: Any) -> int:
    """Return how many tokens an image, or the frames of a film, are with the one of the class; 0 for what is none."""
    image, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    if not image or not patch:
        return 0
    (height, width), (down, across) = (
        side if isinstance(side, (list, tuple)) else (side, side) for side in (image, patch)
    )
    frames = getattr(config, "num_frames", 1) // getattr(config, "tubelet_size", 1)
    return int((height // down) * (width // across) * frames + 1)

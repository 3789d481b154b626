"""What a user can choose: each knob, its default, its consequence, its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers import auto
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config
from transformers.utils.quantization_config import QuantizationMethod

from .cim.configuration import CIMConfig

BACKBONES = ("nf4", "int8")
ACTIVATIONS = (None, "int8", "nf4")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
STARTS = ("zero", "random")
ALLOCATIONS = ("uniform", "sensitivity")

SURROGATE_LAYERS: dict[type[nn.Module], Callable[..., nn.Module]] = {}
"""Backbone layer -> surrogate layer. PEFT asks the configuration for its layers; surrogate.py enters them here."""


def choice_error(name: str, value: object, accepted: tuple) -> ValueError:
    return ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}; got {value!r}")


@register_quantization_config("polarize")
class PolarizeConfig(BitsAndBytesConfig):
    """
    Choose the low-precision backbone of a model.

    A `PolarizeConfig` is a [`~transformers.BitsAndBytesConfig`]: what it writes into `config.json` is the bitsandbytes
    configuration of the same weights, plus one block `polarize` that readers without this library ignore.

    Args:
        backbone (`str`, defaults to `"nf4"`):
            Format of the weights of every linear layer. `"nf4"`: 4-bit NormalFloat codes with one scale per 64 weights
            (4.5 bits per weight; QLoRA, arXiv 2305.14314). `"int8"`: one scale per output row, and an input quantized
            to INT8 per token (8.0 bits per weight; LLM.int8(), arXiv 2208.07339, outlier threshold 0: true W8A8).
        double_quant (`bool`, defaults to `False`):
            Store NF4's block scales themselves in 8 bits: 4.13 instead of 4.5 bits per weight, at a little more error.
            Only with `backbone="nf4"`.
        compute_dtype (`str` or `torch.dtype`, *optional*):
            Dtype of the matrix product with NF4 weights: `"float32"`, `"bfloat16"` or `"float16"`. Left out, it is the
            dtype that the model is loaded in. An INT8 backbone multiplies in INT8 and takes no compute dtype.
        activations (`str`, *optional*):
            Fake quantization of the input of each backbone layer, one scale per token: `"int8"` or `"nf4"`. The
            surrogate still sees the input in full precision. Without this library installed it has no effect. Given
            to `from_pretrained` for a polarized checkpoint, it takes the place of what the checkpoint says.
        modules_to_not_convert (`list[str]`, *optional*):
            Names of modules to leave as they are, matched as a prefix, as a suffix, or as a regular expression. Left
            out: the heads (whatever lies outside the base model) and every tied layer. A list *replaces* that default.
        cim ([`CIMConfig`] or `dict`, *optional*):
            Run the backbone on a simulated compute-in-memory chip. The surrogate stays digital. Without this library
            installed it has no effect. Given to `from_pretrained` for a polarized checkpoint, it takes the place of
            what the checkpoint says. An `adc_range` that is measured needs data: [`attach_cim`].

    Raises:
        ValueError: If a value is not among those accepted; the message names them.

    Example:

    ```python
    model = AutoModelForCausalLM.from_pretrained(model_id, quantization_config=PolarizeConfig(backbone="nf4"))
    ```
    """

    def __init__(
        self,
        backbone: str = "nf4",
        double_quant: bool = False,
        compute_dtype: str | torch.dtype | None = None,
        activations: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        cim: CIMConfig | dict[str, Any] | None = None,
    ) -> None:
        if backbone not in BACKBONES:
            raise choice_error("backbone", backbone, BACKBONES)
        if activations not in ACTIVATIONS:
            raise choice_error("activations", activations, ACTIVATIONS)
        if not isinstance(double_quant, bool):
            raise choice_error("double_quant", double_quant, (True, False))
        if double_quant and backbone != "nf4":
            raise ValueError(f'double_quant compresses the scales of NF4 blocks; backbone="{backbone}" has none')
        name = str(compute_dtype).removeprefix("torch.")
        if compute_dtype is not None and name not in COMPUTE_DTYPES:
            raise choice_error("compute_dtype", compute_dtype, (None, *COMPUTE_DTYPES))
        if compute_dtype is not None and backbone != "nf4":
            raise ValueError(f'compute_dtype is a choice of the NF4 product; backbone="{backbone}" multiplies in INT8')
        if modules_to_not_convert is not None and not (
            isinstance(modules_to_not_convert, (list, tuple))
            and all(isinstance(item, str) for item in modules_to_not_convert)
        ):
            raise ValueError(f"modules_to_not_convert must be None or a list of names; got {modules_to_not_convert!r}")
        if cim is not None and not isinstance(cim, CIMConfig):
            cim = CIMConfig.from_dict(cim)
        if cim is not None and activations is not None:
            raise ValueError(
                f"a chip quantizes its inputs itself (input_bits of cim): leave activations out; got {activations!r}"
            )

        super().__init__(
            load_in_4bit=backbone == "nf4",
            load_in_8bit=backbone == "int8",
            llm_int8_threshold=0.0,
            llm_int8_skip_modules=None if modules_to_not_convert is None else list(modules_to_not_convert),
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=None if compute_dtype is None else name,
        )
        self.quant_method = "polarize"
        self.compute_dtype_given = compute_dtype is not None
        self.activations = activations
        self.cim = cim
        self.surrogate = False
        """Whether the checkpoint that this configuration belongs to holds surrogates; set by `save_polarized`."""

    @property
    def backbone(self) -> str:
        return "int8" if self.load_in_8bit else "nf4"

    @property
    def double_quant(self) -> bool:
        return bool(self.bnb_4bit_use_double_quant)

    @property
    def modules_to_not_convert(self) -> list[str] | None:
        return self.llm_int8_skip_modules  # type: ignore[no-any-return]

    def resolve(self, dtype: torch.dtype | None) -> None:
        """Let the NF4 product run in the model's own dtype unless the user chose another."""
        if not self.compute_dtype_given and dtype in (torch.float32, torch.bfloat16, torch.float16):
            self.bnb_4bit_compute_dtype = dtype

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what a configuration given to `from_pretrained` changes about a quantized checkpoint."""
        return {"activations": self.activations, "cim": self.cim}

    def to_dict(self) -> dict[str, Any]:
        """Write a bitsandbytes configuration that carries the keys of this library in one block, `polarize`."""
        output: dict[str, Any] = super().to_dict()
        del output["compute_dtype_given"]
        output["quant_method"] = QuantizationMethod.BITS_AND_BYTES.value
        output["cim"] = None if self.cim is None else self.cim.to_dict()
        output["polarize"] = {key: output.pop(key) for key in ("activations", "cim", "surrogate")}
        return output

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read what `to_dict` wrote, or the constructor's own arguments."""
        if "polarize" in config_dict:
            nf4 = bool(config_dict["load_in_4bit"])
            block = dict(config_dict["polarize"])
            surrogate = block.pop("surrogate", False)
            arguments = {
                "backbone": "nf4" if nf4 else "int8",
                "double_quant": nf4 and config_dict["bnb_4bit_use_double_quant"],
                "compute_dtype": config_dict["bnb_4bit_compute_dtype"] if nf4 else None,
                "modules_to_not_convert": config_dict["llm_int8_skip_modules"],
                **block,
            }
        else:
            surrogate = False
            arguments = {key: value for key, value in config_dict.items() if key != "quant_method"}
        config = cls(**arguments)
        config.surrogate = surrogate
        return (config, kwargs) if return_unused_kwargs else config


class _CheckpointConfig(BitsAndBytesConfig):
    """Read a bitsandbytes configuration as a `PolarizeConfig` where it carries a block `polarize`."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        target = PolarizeConfig if "polarize" in config_dict else BitsAndBytesConfig
        return target.from_dict(config_dict, **kwargs)


# A polarized checkpoint calls itself a bitsandbytes checkpoint, so that everyone can read it. transformers looks such
# a configuration up under these two names; every other bitsandbytes checkpoint passes through unchanged.
for _name in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
    AUTO_QUANTIZATION_CONFIG_MAPPING[_name] = _CheckpointConfig
# the classes whose loading attributes transformers takes over; it has no function to register one (auto.py:140)
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, PolarizeConfig)


@dataclass
class SurrogateConfig(LoraConfig):
    """
    Choose the surrogates: the rank-r high-precision path `B @ A` beside each backbone layer.

    A `SurrogateConfig` is a [`~peft.LoraConfig`] with unit scale, so that PEFT's own readers, and servers that apply
    one global `alpha / r`, add exactly `B @ A`. What it adds: its adapter stays active and frozen when a user stacks
    another adapter on top (see [`~hf_polarize.surrogate.SurrogateLayer`]).

    Args:
        r (`int`, defaults to 8):
            Rank of each path. A layer of `out x in` weights gets `r * (out + in)` parameters: at `r=8` and 768 x 768,
            2 % of the layer's weights. They are kept in the compute dtype of an NF4 backbone (0.67 bit per weight in
            float32, half of that in bfloat16) and in float32 beside an INT8 one. At most `min(in, out)` of every
            layer.
        rank_pattern (`dict[str, int]`, *optional*):
            Ranks of single layers, by name or regular expression; `alpha_pattern` always follows it.
        target_modules (`str` or `list[str]`, defaults to `"all-linear"`):
            The layers that get a surrogate; among them only those that are quantized.
        start (`str`, defaults to `"zero"`):
            `"zero"`: A random, B zero, so that the model starts as the bare backbone. `"random"`: both random. Either
            way [`polarize`] puts the closed form in their place. Seed torch first: PEFT draws while it attaches.

    Raises:
        ValueError: If a rank is not a positive integer, or an option would break the unit scale or the plain format
            (`lora_alpha` other than `r`, `use_rslora`, `use_dora`, `lora_bias`, `bias`, `lora_dropout`).

    Example:

    ```python
    model = get_peft_model(model, SurrogateConfig(r=8), adapter_name="surrogate")
    ```
    """

    r: int = 8
    lora_alpha: int | None = None  # type: ignore[assignment]
    target_modules: list[str] | str | None = "all-linear"
    alpha_pattern: dict | None = field(default_factory=dict)
    start: InitVar[str] = "zero"

    def __post_init__(self, start: str) -> None:
        if start not in STARTS:
            raise choice_error("start", start, STARTS)
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": value for key, value in (self.rank_pattern or {}).items()}}
        for name, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"{name} must be an integer of at least 1; got {rank!r}")
        if self.lora_alpha is None:
            self.lora_alpha = self.r
        if not self.alpha_pattern:
            # PEFT scales a layer by alpha / r: a rank of its own needs an alpha of its own
            self.alpha_pattern = dict(self.rank_pattern or {})
        if self.lora_alpha != self.r or self.alpha_pattern != (self.rank_pattern or {}):
            raise ValueError(
                "a surrogate has unit scale: leave lora_alpha and alpha_pattern out, or set them equal to r and "
                f"rank_pattern; got lora_alpha={self.lora_alpha!r} with r={self.r!r}, "
                f"alpha_pattern={self.alpha_pattern!r} with rank_pattern={self.rank_pattern!r}"
            )
        for name, plain in {
            "use_rslora": False,
            "use_dora": False,
            "lora_bias": False,
            "bias": "none",
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "target_parameters": None,
            "layer_replication": None,
            "trainable_token_indices": None,
            "init_lora_weights": True,  # start chooses it
        }.items():
            value = getattr(self, name)
            if value != plain and not (plain is None and not value):  # PEFT writes [] for a mixture of experts
                raise ValueError(f"{name} must be {plain!r} for a surrogate; got {getattr(self, name)!r}")
        self.init_lora_weights = start == "zero"
        super().__post_init__()
        self._register_custom_module(SURROGATE_LAYERS)


@dataclass(frozen=True)
class ClosedForm:
    """
    Choose how backbone and surrogates are solved before any training.

    Args:
        scale_search (`bool`, defaults to `True`):
            Choose the block scales for the inputs that each layer sees, instead of the largest magnitude.
        alternations (`int`, defaults to 3):
            Rounds of choosing the codes for the surrogate and the surrogate for the codes; 0 keeps nearest codes. With
            `scale_search` off and 0 here the backbone is the one that bitsandbytes makes.
        two_sided (`bool`, defaults to `False`):
            Weigh output errors by the gradients there as well: backbones are chosen so, and surrogates for every kind
            of layer where that brings held-out data nearer to the original.
        allocation (`str`, defaults to `"uniform"`):
            `"uniform"`: each surrogate has its rank of the [`SurrogateConfig`]. `"sensitivity"`: as many bytes, spent
            where they are predicted to win most; kept only if held-out data says so. Backbones are chosen for the rank
            of the configuration, so with `alternations` there is less to win by another. Some servers want one rank.
        r_max (`int`, defaults to 32): largest rank of a layer under `"sensitivity"`.
        gradients (`bool`, defaults to `True`):
            Collect gradients on the calibration data, for `weigh_tokens`, `two_sided`, `"sensitivity"` and the
            sensitivity report. Calibration then takes backward passes of the original.
        weigh_tokens (`bool`, defaults to `True`):
            With gradients, weigh each calibration token by the norm of its gradient, layer by layer: those count whose
            errors do. See [`~hf_polarize.calibration.layer_statistics`].
        held_out (`int`, defaults to 8): samples of the calibration data that are kept back to choose by.
        deflated (`bool`, defaults to `False`):
            For a backbone on a chip or with rounded activations: take what the surrogate sees out of the backbone's
            input, and solve for the noise of any such chip. See [`~hf_polarize.deflation`]. What `"sensitivity"`
            allocates by is then the predicted loss on the chip, and held-out data runs on it.

    Raises:
        ValueError: If a value is not accepted, or a choice has no statistics to go by.
    """

    scale_search: bool = True
    alternations: int = 3
    two_sided: bool = False
    allocation: str = "uniform"
    r_max: int = 32
    gradients: bool = True
    weigh_tokens: bool = True
    held_out: int = 8
    deflated: bool = False

    def __post_init__(self) -> None:
        if self.allocation not in ALLOCATIONS:
            raise choice_error("allocation", self.allocation, ALLOCATIONS)
        for name in ("alternations", "held_out"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")
        if self.r_max < 1:
            raise ValueError(f"r_max must be at least 1; got {self.r_max}")
        blind = (self.two_sided or self.chooses) and not self.gradients
        if blind or (self.chooses and not self.held_out):
            raise ValueError(
                'two_sided and allocation="sensitivity" need gradients, and held_out of at least 1; got '
                f"gradients={self.gradients} and held_out={self.held_out}"
            )

    @property
    def chooses(self) -> bool:
        """Whether something is decided on held-out data."""
        return (self.two_sided and not self.deflated) or self.allocation == "sensitivity"

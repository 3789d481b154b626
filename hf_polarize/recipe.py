"""A recipe: every choice of a run in one flat file. Defaults < recipe < command line."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .cim.configuration import CIMConfig
from .cim.presets import PRESETS
from .configuration import ClosedForm, PolarizeConfig, SurrogateConfig
from .self_text import SELF
from .sources import DEMO_MODELS, NEWS, PYTHON_DOCS, in_package
from .training import PARTS

MODEL_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageClassification",
    "AutoModel",
)
DTYPES = ("float32", "bfloat16", "float16", "auto")


COMPARED = (
    "backbone alone",
    "SVD (LoRC)",
    "LoftQ (our implementation)",
    "LQER",
    "QERA-approx",
    "QERA-exact = EoRA",
    "ours, closed form",
    "ours, trained",
)


SWEPT = (
    "backbone alone",
    "closed form",
    "deflated",
    "deflated, trained",
    "deflated, per chip",
    "deflated, trained, per chip",
    "deflated, written per chip",
)
"""What a sweep measures on every chip."""


def _key(default: Any, help: str) -> Any:
    metadata = {"help": help}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Recipe:
    """Every key of a recipe; `hf-polarize run --help` prints them with their defaults."""

    model: str = _key("", 'Hub id or folder of the original model, or demo:smollm2, demo:minilm (extra "demo")')
    model_class: str = _key("AutoModelForCausalLM", f"one of {', '.join(MODEL_CLASSES)}")
    gguf_file: str | None = _key(None, "name of a GGUF file in the model's folder or repository")
    base_model: str | None = _key(None, "what the model card names as base model; the model itself if left out")
    dtype: str = _key("float32", f"of the original model: {', '.join(DTYPES)}; float32 is the fastest on most CPUs")
    device: str = _key("auto", "cpu, cuda, ...; auto takes a GPU if there is one")

    backbone: str = _key("nf4", "format of the weights: nf4 or int8")
    double_quant: bool = _key(False, "store NF4 scales in 8 bits")
    activations: str | None = _key(None, "fake quantization of each backbone layer's input: int8 or nf4")
    cim: str | dict[str, object] | None = _key(
        None,
        f"simulated chip under the backbone: one of {', '.join(PRESETS)}, or {{preset: NAME, what differs: value}}, "
        "the arguments of CIMConfig",
    )
    modules_to_not_convert: list[str] | None = _key(None, "names left alone; heads and tied layers if left out")
    r: int = _key(8, "rank of the surrogates")
    rank_pattern: dict[str, int] | None = _key(None, "ranks of single layers, {name or regular expression: rank}")

    scale_search: bool = _key(True, "choose the block scales for the inputs of each layer")
    alternations: int = _key(3, "rounds of choosing codes for the surrogate and the surrogate for the codes")
    two_sided: bool = _key(False, "weigh output errors by gradients, per kind of layer where held-out data likes it")
    allocation: str = _key("uniform", "of ranks: uniform, or sensitivity (as many bytes, where they win most)")
    r_max: int = _key(32, "largest rank under allocation: sensitivity")
    deflated: bool = _key(
        False, "on a chip or with rounded activations: take what the surrogates see out of the backbone's input"
    )
    gradients: bool = _key(True, "collect gradients on the calibration data, for all that goes by sensitivity")
    weigh_tokens: bool = _key(True, "with gradients, weigh calibration tokens by the norm of theirs")
    held_out: int = _key(12, "samples of the calibration data that are kept back to choose and to stop by")
    replay: int = _key(
        0, "held-out samples on which each layer is quantized alone, to judge predicted losses by; takes minutes"
    )

    calibration: str | list[str] = _key(
        SELF,
        f"{SELF} (text that the original model writes itself), {PYTHON_DOCS} (the language reference that every "
        f'Python carries), {NEWS} (300 news articles, extra "demo"), the path of a text file, or '
        "hub:NAME[:CONFIG]:SPLIT; or a list of these, of which each gives an equal share: what one is too short for, "
        "those after it give, last of all the model itself",
    )
    calibration_column: str | None = _key(
        None, "text column of a calibration data set; the first one of strings if left out"
    )
    max_tokens: int = _key(
        18432, "calibration tokens, in whole windows spread evenly over the text, or as patches of whole images"
    )
    window: int = _key(384, "tokens per calibration window")
    batch_size: int = _key(4, "windows per batch")
    lines: bool = _key(
        False,
        "each line of a text, or of the rows of its column, is an input of its own, to calibrate, train and measure "
        "an encoder of sentences by; windows to calibrate, train and choose by mean lines of as many tokens",
    )
    seed: int = _key(0, "of calibration text that the model writes, of random signs, and of the order of data")

    train: list[str] | None = _key(
        None, f"what is trained after the closed form, of {', '.join(PARTS)}; null: nothing"
    )
    train_tokens: int = _key(
        65536, "tokens to train on, in one pass: calibration tokens, and more where those are fewer"
    )
    learning_rate: float = _key(1e-4, "of the surrogates' B, at its peak; others are multiples of it")
    train_batch_size: int = _key(8, "windows per step")
    hidden_weight: float = _key(0.0, "of the distance of the final hidden states, beside the KL")
    layer_weight: float = _key(0.0, "of the predicted loss of all layers, beside the KL")
    patience: int = _key(3, "evaluations on held-out text without a gain after which training stops")

    evaluation: str = _key(PYTHON_DOCS, "held-out data, never the calibration data; the same forms, without " + SELF)
    evaluation_column: str | None = _key(None, "text column of an evaluation data set")
    evaluation_window: int = _key(512, "tokens per evaluation window")
    evaluation_windows: int = _key(24, "evaluation windows, images or (with lines) lines, spread evenly")

    compare_methods: list[str] = _key(list(COMPARED), "of hf-polarize compare, which measures them side by side")
    compare_ranks: list[int] = _key([2, 4, 8, 16, 32], "ranks of its curve")
    compare_tokens: list[int] = _key([2048, 8192, 32768, 131072], "calibration tokens of its curve")

    sweep: list[dict[str, list]] = _key(
        [
            {"mismatch": [0.0, 0.05, 0.1, 0.15, 0.2, 0.3]},
            {"adc_bits": [8, 9, 10, 11], "rows": [32, 64, 128]},
            {"v_dd": [0.6, 0.7, 0.8, 0.9], "read_noise": [None]},
            {"r": [2, 4, 8, 16, 32]},
        ],
        "grids of hf-polarize cim sweep: each gives lists of values of arguments of CIMConfig, or of the rank r; the "
        "others stay as they are in the recipe",
    )
    sweep_methods: list[str] = _key(list(SWEPT), f"what it measures, of {', '.join(SWEPT)}")
    sweep_chips: int = _key(10, "chips of each setting, with seeds from cim.chip_seed on")
    energy_node: float | None = _key(
        None, "nm, 7..45, of hf-polarize energy: logic and converters; the preset's or 16 if left out"
    )
    energy_digital: str = _key("bf16", "its arithmetic outside the array: fp16, bf16 or int8")
    energy_context: int = _key(512, "its tokens that attention looks back on")

    output_dir: str = _key("out", "folder for the checkpoint, metrics.json, report.md and plots; must be empty")
    overwrite: bool = _key(False, "write into an output folder that is not empty")
    push_to: str | None = _key(None, "Hub repository user/name to upload the checkpoint to")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Recipe)
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if not _is_of(value, hints[item.name]):
                expected = str(item.type).replace("None", "null")
                raise ValueError(f"recipe key {item.name} must be {expected}; got {value!r}")
        for key, choices in {"model_class": MODEL_CLASSES, "dtype": DTYPES}.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"recipe key {key} must be one of {', '.join(choices)}; got {getattr(self, key)!r}")
        for key in (
            "max_tokens",
            "window",
            "batch_size",
            "evaluation_window",
            "evaluation_windows",
            "train_tokens",
            "train_batch_size",
            "patience",
            "sweep_chips",
        ):
            if getattr(self, key) < 1:
                raise ValueError(f"recipe key {key} must be at least 1; got {getattr(self, key)}")
        if self.evaluation_window < 2:
            raise ValueError("recipe key evaluation_window must be at least 2: the first token predicts the second")
        if self.window > self.max_tokens:
            raise ValueError(f"max_tokens={self.max_tokens} holds no window of {self.window} tokens")
        if not self.model:
            raise ValueError("recipe key model is missing: a Hub id, a folder, or demo:smollm2")
        if self.model.startswith("demo:") and self.model not in DEMO_MODELS:
            raise ValueError(
                f"model must be one of {', '.join(DEMO_MODELS)}, a Hub id or a folder; got {self.model!r}"
            )
        if self.evaluation == SELF:
            raise ValueError(f'evaluation can\'t be "{SELF}": a text that the model wrote does not measure the model')
        if not self.sources or "" in self.sources or len(set(self.sources)) < len(self.sources):
            raise ValueError(f"recipe key calibration names nothing, or something twice; got {self.calibration!r}")
        for name in (*self.sources, self.evaluation):
            if name.startswith("demo:") and name != NEWS:
                raise ValueError(f"the demo data is {NEWS}; got {name!r}")
        if self.window * len(self.sources) > self.max_tokens:
            raise ValueError(f"max_tokens={self.max_tokens} holds no window of {self.window} tokens of each source")
        if self.lines and len(self.sources) > 1:
            raise ValueError(f"lines come from one source; got calibration={self.calibration!r}")
        if self.lines and SELF in self.sources:
            raise ValueError(f'lines come from a text or a data set: calibration can\'t be "{SELF}"')
        if self.lines and self.model_class not in ("AutoModel", "AutoModelForSequenceClassification"):
            raise ValueError(
                "lines are inputs of encoders that embed or classify sentences: model_class must be AutoModel or "
                f"AutoModelForSequenceClassification; got {self.model_class}"
            )
        if self.evaluation in self.sources and not self.evaluation.startswith("hub:"):
            raise ValueError(f"evaluation and calibration are both {self.evaluation!r}: hold out other data")
        if self.push_to is not None and self.push_to.count("/") != 1:
            raise ValueError(f"push_to must be user/name; got {self.push_to!r}")
        for part in self.train or []:
            if part not in PARTS:
                raise ValueError(f"recipe key train takes any of {', '.join(PARTS)}; got {part!r}")
        if self.train is not None and not self.train:
            raise ValueError("recipe key train is empty: name what to train, or null for no training")
        if self.cim is not None and "scales" in (self.train or []):
            raise ValueError("block scales are part of the chip that cim names: leave scales out of train")
        if self.train and self.held_out < 1:
            raise ValueError("training stops by held-out text: held_out must be at least 1")
        if not 0 <= self.replay <= self.held_out or (self.replay and not self.gradients):
            raise ValueError(
                f"replay takes some of the held_out={self.held_out} samples, and predictions need gradients; got "
                f"replay={self.replay} and gradients={str(self.gradients).lower()}"
            )
        if self.learning_rate <= 0:
            raise ValueError(f"recipe key learning_rate must be greater than 0; got {self.learning_rate}")
        self.polarize_config()
        self.surrogate_config()
        self.closed_form()

    @property
    def sources(self) -> list[str]:
        """The calibration data, one or several."""
        return [self.calibration] if isinstance(self.calibration, str) else self.calibration

    @property
    def calibration_name(self) -> str:
        """What the calibration data is called in reports, without folders."""
        return " + ".join(name.rpartition("/")[2] for name in self.sources)

    def decisive(self) -> dict[str, Any]:
        """Return the keys that what is measured depends on, and not only how much of it, or where it is written."""
        free = ("overwrite", "output_dir", "compare_", "sweep", "energy_")
        return {key: value for key, value in dataclasses.asdict(self).items() if not key.startswith(free)}

    def polarize_config(self) -> PolarizeConfig:
        return PolarizeConfig(
            backbone=self.backbone,
            double_quant=self.double_quant,
            activations=self.activations,
            modules_to_not_convert=self.modules_to_not_convert,
            cim=self.chip(),
        )

    def chip(self) -> CIMConfig | None:
        """The chip that the recipe names, if any."""
        if self.cim is None:
            return None
        values: dict[str, Any] = {"preset": self.cim} if isinstance(self.cim, str) else dict(self.cim)
        preset = values.pop("preset", None)
        return CIMConfig.from_dict(values) if preset is None else CIMConfig.preset(str(preset), **values)

    def surrogate_config(self) -> SurrogateConfig:
        return SurrogateConfig(r=self.r, rank_pattern=dict(self.rank_pattern or {}))

    def closed_form(self) -> ClosedForm:
        return ClosedForm(**{item.name: getattr(self, item.name) for item in dataclasses.fields(ClosedForm)})

    def source(self) -> tuple[str, str | None, str]:
        """
        Return where the original model is: path or Hub id, name of its GGUF file, and the name to give as base model.

        Raises:
            ModuleNotFoundError: If the package of a demo model is not installed.
            FileNotFoundError: If the model is a path and there is no such folder.
        """
        if self.model not in DEMO_MODELS:
            if self.model.startswith(("/", ".", "~")) and not Path(self.model).is_dir():
                raise FileNotFoundError(f'no model: there is no folder "{self.model}"')
            return self.model, self.gguf_file, self.base_model or self.model
        package, folder, gguf_file, base_model = DEMO_MODELS[self.model]
        return str(in_package(self.model, package, folder)), gguf_file, self.base_model or base_model


def _is_of(value: Any, hint: Any) -> bool:
    """Tell whether a value is of a type as recipes use them: a scalar, a list, a dict, or an optional one of these."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, option) for option in typing.get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_is_of(item, typing.get_args(hint)[0]) for item in value)
    if origin is dict:
        key, item = typing.get_args(hint)
        return isinstance(value, dict) and all(_is_of(k, key) and _is_of(v, item) for k, v in value.items())
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """
    Read a recipe.

    Args:
        path (`str` or `Path`): a flat YAML file.
        overrides (`Sequence[str]`): `key=value`, values as YAML writes them; they win over the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a key is unknown (the message names the nearest one) or a value is not accepted.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f'no recipe "{file}"')
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f'"{file}" is not valid YAML: {error}') from None
    if not isinstance(values, dict):
        raise ValueError(f'"{file}" is not a recipe: it must hold "key: value" lines')
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f'"{override}" is not of the form key=value')
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f'the value of "{override}" is not valid YAML: {error}') from None
    known = [item.name for item in dataclasses.fields(Recipe)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise ValueError(f"unknown recipe key {key!r}; the nearest known one is {near[0]!r}")
        values[key] = _number(key, values[key])
    return Recipe(**values)


def resumed(path: Path, recipe: Recipe) -> dict[str, Any]:
    """
    Return the record of an interrupted comparison or sweep, or a new one.

    What is to be measured may differ from what it was then, and where to.

    Args:
        path (`Path`): of the JSON file, which need not exist.
        recipe ([`Recipe`]): what to do.

    Raises:
        FileExistsError: If the record is of another recipe, and `overwrite` is false.
    """
    now = dataclasses.asdict(recipe)
    if path.is_file():
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        then = {**dataclasses.asdict(Recipe(model=recipe.model)), **record["recipe"]}  # keys that came since
        changed = [key for key, value in recipe.decisive().items() if then[key] != value]
        if not changed:
            return record
        if not recipe.overwrite:
            raise FileExistsError(
                f'"{path}" is of a recipe with other {", ".join(changed)}; choose another output_dir, or '
                "overwrite=true"
            )
    return {"recipe": now, "results": []}


def _number(key: str, value: Any) -> Any:
    """Return the value of a key that takes a float as one: YAML reads 5e-4 as a string, and 1 as an integer."""
    if typing.get_type_hints(Recipe)[key] not in (float, float | None) or isinstance(value, bool) or value is None:
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def describe_keys() -> str:
    """Return one line for each key: name, default, what it is."""
    lines = []
    for item in dataclasses.fields(Recipe):
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        shown = yaml.safe_dump(default, default_flow_style=True).replace("\n...", "").strip()
        lines.append(f"  {item.name}: {shown}\n      {item.metadata['help']}")
    return "\n".join(lines)

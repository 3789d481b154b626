"""A recipe, step by step: load, measure, polarize, save, measure again, report."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .checkpoint import SIDECAR, prepare_folder, save_polarized, sidecar, write_json
from .data import SELF, calibration_batches, is_causal_lm, is_text_model, read_texts, token_windows, tokens_per_sample
from .evaluation import (
    Quality,
    evaluate_causal_lm,
    gap_recovered,
    gap_standard_error,
    model_outputs,
    output_distance,
    reference_states,
)
from .hub import push_folder
from .inspection import CheckpointInfo, inspect_checkpoint
from .polarization import forget_gguf, make_plan, polarize, public_name
from .recipe import Recipe, load_data
from .report import markdown_report, plot_layer_errors
from .surrogate import backbone_only


class Evaluator:
    """
    Measure models against the original on held-out data.

    The original's outputs are computed once, when this is made, and kept: final hidden states for a causal language
    model, the outputs themselves for any other.
    """

    def __init__(self, original: PreTrainedModel, recipe: Recipe, data: Any, processor: Any) -> None:
        self.causal = is_causal_lm(original)
        window, count = recipe.evaluation_window, recipe.evaluation_windows
        name = recipe.evaluation.removeprefix("hub:").rpartition("/")[2]
        if self.causal:
            self.windows = token_windows(read_texts(data, recipe.evaluation_column), processor, window, count)
            self.reference = reference_states(original, self.windows)
            started = time.monotonic()
            self.original = evaluate_causal_lm(original, self.windows, self.reference, desc="evaluating original")
            self.protocol = (
                f"Token perplexity on `{name}`: {len(self.windows)} windows of {window} tokens that don't overlap, "
                "spread evenly; KL in nats per token."
            )
        else:
            tokens = count * tokens_per_sample(original, window)
            self.batches = calibration_batches(
                original, data, processor, window, tokens, recipe.batch_size, 0, recipe.evaluation_column
            )
            started = time.monotonic()
            self.outputs = model_outputs(original, self.batches, desc="evaluating original")
            self.original = output_distance(self.outputs, self.outputs)
            measure = "KL(original || model) of the logits, in nats" if self.outputs.logits else "1 - cosine"
            self.protocol = f"Loss is the mean distance of the output from the original's on `{name}`: {measure}."
        self.seconds = time.monotonic() - started

    def measure(self, model: PreTrainedModel, desc: str) -> tuple[Quality, float]:
        """Return what a model does, and the seconds that it took."""
        started = time.monotonic()
        if self.causal:
            quality = evaluate_causal_lm(model, self.windows, self.reference, desc=f"evaluating {desc}")
        else:
            quality = output_distance(self.outputs, model_outputs(model, self.batches, f"evaluating {desc}"))
        return quality, time.monotonic() - started


def load_model(recipe: Recipe) -> tuple[PreTrainedModel, Any]:
    """Load a recipe's original model and its tokenizer or image processor."""
    name, gguf_file, _ = recipe.source()
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    dtype = recipe.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = getattr(transformers, recipe.model_class).from_pretrained(name, dtype=dtype, **extra).to(device).eval()
    forget_gguf(model)
    auto = transformers.AutoTokenizer if is_text_model(model) else transformers.AutoImageProcessor
    return model, auto.from_pretrained(name, **extra)


def run_recipe(recipe: Recipe, command: str = "") -> dict[str, Any]:
    """
    Run a recipe and leave everything in its output folder.

    The folder then holds the checkpoint at its root, `metrics.json`, `report.md` and `layer_errors.png`. The
    checkpoint is written as soon as the model is polarized: an interruption after that loses only measurements.

    Args:
        recipe ([`Recipe`]): what to do.
        command (`str`): how to run it again, for the report.

    Returns:
        `dict`: the content of `metrics.json`.
    """
    started = time.monotonic()
    folder = prepare_folder(recipe.output_dir, recipe.overwrite)
    calibration, evaluation = load_data(recipe.calibration), load_data(recipe.evaluation)
    model, processor = load_model(recipe)
    _, gguf_file, base_model = recipe.source()
    config, surrogate = recipe.polarize_config(), recipe.surrogate_config()
    make_plan(model, config, surrogate)
    if calibration != SELF:
        calibration = calibration_batches(
            model, calibration, processor, recipe.window, recipe.max_tokens, recipe.batch_size, recipe.seed,
            recipe.calibration_column,
        )  # fmt: skip

    evaluator = Evaluator(model, recipe, evaluation, processor)
    original_bytes = sum(parameter.nbytes for parameter in model.parameters())
    original_bits = 8.0 * model.dtype.itemsize
    polarize(
        model, calibration, config, surrogate, processor=processor, window=recipe.window,
        max_tokens=recipe.max_tokens, batch_size=recipe.batch_size, seed=recipe.seed,
    )  # fmt: skip
    provenance = model.polarization["provenance"]
    provenance["base_model"] = public_name(base_model)
    if gguf_file:
        provenance["weights"] = f"{gguf_file}, dequantized to {recipe.dtype}"
    provenance["calibration"]["source"] = recipe.calibration.rpartition("/")[2]
    save_polarized(model, folder, processor, overwrite=True)
    info = inspect_checkpoint(folder)

    polarized, polarized_seconds = evaluator.measure(model, "polarized")
    with backbone_only(model):
        backbone, backbone_seconds = evaluator.measure(model, "backbone alone")
    metrics = {
        "original": _variant(evaluator.original, original_bits, original_bytes, evaluator.seconds),
        "backbone": _variant(
            backbone, info.bits("code") + info.bits("scale"), info.bytes - _surrogate_bytes(info), backbone_seconds
        ),
        "polarized": _variant(polarized, info.bits_per_weight, info.bytes, polarized_seconds),
        "gap_recovered": gap_recovered(evaluator.original, backbone, polarized),
        "gap_standard_error": gap_standard_error(evaluator.original, backbone),
        "bits_per_weight": info.bits_per_weight,
        "bytes": info.bytes,
        "protocol": evaluator.protocol,
        "text": recipe.evaluation.rpartition("/")[2],
        "seconds": time.monotonic() - started,
    }
    model.polarization["results"] = {key: value for key, value in metrics.items() if key != "seconds"}
    write_json(folder / SIDECAR, sidecar(model))
    write_json(folder / "metrics.json", {**metrics, "recipe": asdict(recipe)})
    plot_layer_errors(model.polarization["layers"], folder / "layer_errors.png")
    title = f"{base_model.rpartition('/')[2]}, polarized ({recipe.backbone.upper()}, rank {recipe.r})"
    report = markdown_report(title, metrics, inspect_checkpoint(folder), command, "layer_errors.png")
    (folder / "report.md").write_text(report, encoding="utf-8")
    if recipe.push_to:
        push_folder(folder, recipe.push_to)
    return metrics


def _variant(quality: Quality, bits: float, size: int, seconds: float) -> dict[str, Any]:
    return {
        "loss": quality.loss,
        "perplexity": quality.perplexity,
        "kl": quality.kl,
        "bits_per_weight": bits,
        "bytes": size,
        "seconds": seconds,
    }


def _surrogate_bytes(info: CheckpointInfo) -> int:
    return sum(layer.surrogate_bytes for layer in info.layers)

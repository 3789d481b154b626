"""A recipe, step by step: load, measure, polarize, save, measure again, report."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .checkpoint import SIDECAR, prepare_folder, save_polarized, sidecar, write_json
from .data import calibration_batches, lengths, line_batches, lines_per_window, read_texts, split, token_windows
from .deflation import check_deflated
from .distillation import teacher_dataset
from .evaluation import (
    HeldOut,
    Quality,
    gap_recovered,
    gap_standard_error,
)
from .hub import push_folder
from .inspection import CheckpointInfo, inspect_checkpoint
from .models import Batch, is_causal_lm, is_text_model, tokens_per_sample
from .plan import forget_gguf, make_plan
from .polarization import count_samples, hold_out, parted, polarize, public_name
from .recipe import Recipe
from .report import markdown_report, plot_layer_errors, plot_training
from .self_text import SELF
from .sensitivity import SensitivityReport
from .solver import replayed_losses, rounded_backbone
from .sources import load_data
from .training import distill


class Evaluator:
    """Measure models against the original on the held-out data of a recipe, and say how."""

    def __init__(self, original: PreTrainedModel, recipe: Recipe, data: Any, processor: Any) -> None:
        window, count = recipe.evaluation_window, recipe.evaluation_windows
        name = recipe.evaluation.removeprefix("hub:").rpartition("/")[2]
        if is_causal_lm(original):
            windows = token_windows(read_texts(data, recipe.evaluation_column), processor, window, count)
            batches = split(windows, recipe.batch_size, original)
            self.protocol = (
                f"Token perplexity on `{name}`: {len(windows)} windows of {window} tokens that don't overlap, "
                "spread evenly; KL in nats per token."
            )
        elif recipe.lines:
            batches = line_batches(
                original, data, processor, window, 8 * recipe.batch_size * recipe.window, count=count,
                column=recipe.evaluation_column,
            )  # fmt: skip
        else:
            tokens = count * tokens_per_sample(original, window)
            batches = calibration_batches(
                original, data, processor, window, tokens, recipe.batch_size, 0, recipe.evaluation_column
            )
        self.held_out = HeldOut(original, batches)
        self.original = self.held_out.original
        if not self.held_out.causal:
            measure = "KL(original || model) of the logits, in nats" if self.held_out.outputs.logits else "1 - cosine"
            output = "output" if self.held_out.outputs.logits or not recipe.lines else "embedding"
            output += f" for each of {count_samples(batches)} lines" if recipe.lines else ""
            self.protocol = f"Loss is the mean distance of the {output} from the original's on `{name}`: {measure}."

    def measure(self, model: PreTrainedModel, desc: str) -> tuple[Quality, float]:
        """Return what a model does, and the seconds that it took."""
        started = time.monotonic()
        return self.held_out.measure(model, desc), time.monotonic() - started


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

    The folder then holds the checkpoint at its root, `metrics.json`, `report.md`, and its plots and tables. The
    checkpoint is written as soon as the closed form is attached, and again after training: an interruption loses only
    what comes later.

    Args:
        recipe ([`Recipe`]): what to do.
        command (`str`): how to run it again, for the report.

    Returns:
        `dict`: the content of `metrics.json`.
    """
    started = time.monotonic()
    if recipe.deflated:
        check_deflated(recipe.polarize_config())
    folder = prepare_folder(recipe.output_dir, recipe.overwrite)
    calibration, evaluation = [load_data(name) for name in recipe.sources], load_data(recipe.evaluation)
    model, processor = load_model(recipe)
    _, gguf_file, base_model = recipe.source()
    plan = make_plan(model, recipe.polarize_config(), recipe.surrogate_config())
    batches, held_back = recipe_batches(recipe, model, calibration, processor)
    first = at_most(batches, recipe.max_tokens, model)

    evaluator = Evaluator(model, recipe, evaluation, processor)
    original_bytes = sum(parameter.nbytes for parameter in model.parameters())
    original_bits = 8.0 * model.dtype.itemsize
    with rounded_backbone(model, plan, first):
        backbone, backbone_seconds = evaluator.measure(model, "backbone alone")
    replayed = None
    if recipe.replay:
        few = at_most(held_back, recipe.replay * tokens_per_sample(model, recipe.window), model)
        replayed = replayed_losses(model, plan, HeldOut(model, few))
    del plan
    with tempfile.TemporaryDirectory(prefix="hf-polarize-") as scratch:
        data = held_out = None
        if recipe.train:
            fresh = at_most(batches, recipe.train_tokens, model)
            data, held_out = (teacher_dataset(model, part, scratch) for part in (fresh, held_back))
        closed_form(recipe, model, first, held_back, processor)
        model.sensitivity.replayed = replayed
        provenance = model.polarization["provenance"]
        provenance["base_model"] = public_name(base_model)
        if gguf_file:
            provenance["weights"] = f"{gguf_file}, dequantized to {recipe.dtype}"
        provenance["calibration"]["source"] = recipe.calibration_name
        provenance["calibration"]["lines"] = recipe.lines
        provenance["calibration"]["held_out_samples"] = count_samples(held_back)
        save_polarized(model, folder, processor, overwrite=True)
        info = inspect_checkpoint(folder)
        polarized, polarized_seconds = evaluator.measure(model, "closed form" if recipe.train else "polarized")
        variants = {
            "original": _variant(evaluator.original, original_bits, original_bytes, evaluator.held_out.seconds),
            "backbone": _variant(
                backbone, info.bits("code") + info.bits("scale"), info.bytes - _surrogate_bytes(info),
                backbone_seconds,
            ),
            "polarized": _variant(polarized, info.bits_per_weight, info.bytes, polarized_seconds),
        }  # fmt: skip
        if recipe.train:
            provenance["training"] = train(recipe, model, data, held_out, scratch)
            provenance["method"] = "closed form, then distilled from the original"
            save_polarized(model, folder, processor, overwrite=True)
            info = inspect_checkpoint(folder)
            variants["closed_form"] = variants["polarized"]
            polarized, polarized_seconds = evaluator.measure(model, "polarized")
            variants["polarized"] = _variant(polarized, info.bits_per_weight, info.bytes, polarized_seconds)
    metrics = {
        **variants,
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
    write_report(folder, model, recipe, metrics, command)
    if recipe.push_to:
        push_folder(folder, recipe.push_to)
    return metrics


def closed_form(
    recipe: Recipe, model: PreTrainedModel, batches: list[Batch], held_back: list[Batch], processor: Any
) -> None:
    """Polarize a model as a recipe says, before any training."""
    polarize(
        model, batches, recipe.polarize_config(), recipe.surrogate_config(), recipe.closed_form(),
        processor=processor, window=recipe.window, max_tokens=recipe.max_tokens, seed=recipe.seed,
        held_out=held_back, keep_layer_losses=bool(recipe.train and recipe.layer_weight),
    )  # fmt: skip


def train(recipe: Recipe, model: PreTrainedModel, data: Any, held_out: Any, scratch: str) -> dict[str, Any]:
    """Train a polarized model as a recipe says."""
    batch_size, micro_batch_size = recipe.train_batch_size, recipe.batch_size
    if recipe.lines:
        sizes = [len(ids) for ids in data["input_ids"]]
        batch_size *= lines_per_window(sizes, recipe.window)
        micro_batch_size = max(1, recipe.batch_size * recipe.window // max(sizes))  # as many tokens with all padding
    return distill(
        model, data, held_out, Path(scratch) / "training", train=recipe.train or ["surrogate"],
        learning_rate=recipe.learning_rate, batch_size=batch_size, micro_batch_size=micro_batch_size,
        hidden_weight=recipe.hidden_weight, layer_weight=recipe.layer_weight,
        layer_losses=model.layer_losses, patience=recipe.patience, seed=recipe.seed,
    )  # fmt: skip


def write_report(folder: Path, model: PreTrainedModel, recipe: Recipe, metrics: dict[str, Any], command: str) -> None:
    """Write report.md with its plots, and the sensitivities as JSON, into the folder of a run."""
    plots = {"layer_errors.png": "Relative output error of each layer"}
    plot_layer_errors(model.polarization["layers"], folder / "layer_errors.png")
    report: SensitivityReport = model.sensitivity
    if report.layers:
        report.save(folder / "sensitivity.json")
        report.plot(folder / "sensitivity.png")
        plots["sensitivity.png"] = "Predicted loss increase of each layer"
    if report.rank_correlation() is not None:
        report.plot_replays(folder / "replayed.png")
        plots["replayed.png"] = "Predicted and replayed loss of each layer quantized alone"
    training = model.polarization["provenance"].get("training")
    if training:
        plot_training(training, folder / "training.png")
        plots["training.png"] = "Distance to the original in training"
    name = recipe.source()[2].rpartition("/")[2]
    title = f"{name}, polarized ({recipe.backbone.upper()}, rank {recipe.r})"
    text = markdown_report(
        title,
        metrics,
        inspect_checkpoint(folder),
        command,
        plots,
        model.polarization["provenance"],
        f"\n## The most sensitive layers\n\n{report.table(12)}\n" if report.layers else "",
    )
    (folder / "report.md").write_text(text, encoding="utf-8")


def recipe_batches(
    recipe: Recipe, model: PreTrainedModel, calibration: list[Any], processor: Any
) -> tuple[list[Batch], list[Batch]]:
    """
    Return the batches to calibrate and train on, and those kept back where something is chosen on them.

    Each source gives an equal share of the tokens, the model itself last: what one is too short for, those after it
    give.
    """
    tokens = max(recipe.max_tokens, recipe.train_tokens if recipe.train else 0)
    choosing = bool(recipe.train or recipe.replay) or recipe.closed_form().chooses
    extra = recipe.held_out * tokens_per_sample(model, recipe.window) if choosing else 0
    left, batches = tokens + extra, list[Batch]()
    for i, data in enumerate(sorted(calibration, key=lambda data: isinstance(data, str) and data == SELF)):
        part = calibration_batches(
            model, data, processor, recipe.window, left // (len(calibration) - i), recipe.batch_size, recipe.seed,
            recipe.calibration_column, recipe.lines,
        )  # fmt: skip
        batches += part
        left -= held_tokens(part, model)
    per_window = lines_per_window(lengths(batches), recipe.window) if recipe.lines else 1
    return hold_out(batches, recipe.held_out * per_window) if choosing else (batches, [])


def at_most(batches: list[Batch], tokens: int, model: PreTrainedModel) -> list[Batch]:
    """Return samples that hold no more than so many tokens, spread evenly over the batches; at least one."""
    samples, total = count_samples(batches), held_tokens(batches, model)
    if total <= tokens:
        return batches
    count = max(1, samples * tokens // total)
    while held_tokens(taken := parted(batches, count)[1], model) > tokens and count > 1:
        count -= 1
    return taken


def held_tokens(batches: list[Batch], model: PreTrainedModel) -> int:
    """Return the number of tokens, or of patches, in batches."""
    first = [next(iter(batch.values())) for batch in batches]
    return sum(len(values) * tokens_per_sample(model, values.shape[-1]) for values in first)


def _variant(quality: Quality, bits: float, size: int, seconds: float | None) -> dict[str, Any]:
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

"""PolarizeTrainer: distil the original model into the few high-precision values of a polarized one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .backbone import backbone_layers
from .cim.hook import reset_reads
from .cim.variation import SampledChips
from .compensation import LayerLoss
from .deflation import removed_directions
from .distillation import (
    HIDDEN,
    INDICES,
    TEACHER_COLUMNS,
    TOP,
    TOP_K,
    divergence,
    divergence_of_top,
    hidden_distance,
    padded_batch,
    shared_head,
    teacher_outputs,
)
from .formats import BackboneLinear4bit
from .models import bfloat16_is_fast, final_states
from .surrogate import core_model, factors

PARTS = ("surrogate", "scales", "norms", "biases")
"""What can be trained. All of it is in the checkpoint anyway, and every reader loads it."""


RATES = {"B": 1.0, "A": 0.1, "scales": 0.05, "norms": 0.3, "biases": 0.3}
"""
Learning rates, as multiples of that of B. Two rates as in LoRA+ (arXiv 2402.12354); on SmolLM2, A a
thousand times slower did as well.
"""


def trainable_parameters(model: nn.Module, parts: Sequence[str] = ("surrogate",)) -> dict[str, list[nn.Parameter]]:
    """
    Make chosen parts of a polarized model trainable, and everything else not.

    Args:
        model (`PreTrainedModel` or `PeftModel`): polarized.
        parts (`Sequence[str]`): of `"surrogate"` (A and B; B alone where a layer runs deflated), `"scales"` (the block
            scales of an NF4 backbone), `"norms"` (weights and biases of the normalization layers) and `"biases"` (of
            the backbone's layers).

    Returns:
        `dict[str, list[nn.Parameter]]`: the parameters of each part; empty where the model has none.

    Raises:
        ValueError: If a part is unknown, or the model has none of all.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ValueError(f"train takes any of {', '.join(PARTS)}; got {list(parts)!r}")
    core = core_model(model)
    core.requires_grad_(False)
    layers = [layer for _, layer in backbone_layers(core)]
    found: dict[str, list[nn.Parameter]] = {part: [] for part in parts}
    if "surrogate" in found:
        deflated = removed_directions(core)  # there A and R belong together, and R is no parameter
        found["surrogate"] = [
            factor for name, pair in factors(core).items() for factor in (pair[1:] if name in deflated else pair)
        ]
    if "scales" in found:
        found["scales"] = [layer.free_scales() for layer in layers if isinstance(layer, BackboneLinear4bit)]
    if "norms" in found:
        found["norms"] = [
            parameter
            for module in core.modules()
            if "norm" in type(module).__name__.lower()
            for parameter in module.parameters(recurse=False)
        ]
    if "biases" in found:
        found["biases"] = [layer.bias for layer in layers if layer.bias is not None]
    for parameters in found.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    if not any(found.values()):
        raise ValueError(f"the model has nothing to train in {list(parts)}")
    return found


def freeze(model: nn.Module) -> None:
    """Put trained block scales back into the format and leave the surrogates alone trainable."""
    core = core_model(model)
    for _, layer in backbone_layers(core):
        if isinstance(layer, BackboneLinear4bit):
            layer.fix_scales()
    core.requires_grad_(False)
    for pair in factors(core).values():
        for factor in pair:
            factor.requires_grad_(True)


class PolarizeTrainer(Trainer):
    """
    A `transformers.Trainer` that distils the original model into a polarized one.

    The loss is `kl_weight` KL(original || model) per token + `hidden_weight` relative squared distance of the final
    hidden states + `layer_weight` predicted loss of all layers (see [`~hf_polarize.compensation.LayerLoss`]). A model
    without logits has no KL, and the distance of its hidden states takes its place.

    The original's part comes with the data (see [`~hf_polarize.distillation.teacher_dataset`]), so it need not be in
    memory; or give it as `original` and train on any data set of model inputs. `eval_loss` is the first two terms on
    the evaluation data: with `EarlyStoppingCallback` and `load_best_model_at_end` training ends before it overfits.
    Dropout is off, as it was for the original. Samples may differ in length: they are padded (see
    [`~hf_polarize.distillation.padded_batch`]), and padding does not count in the loss.
    All else is Trainer's own: accumulation, precision, resuming, `report_to`, processes.

    Args:
        model (`PreTrainedModel` or `PeftModel`): polarized.
        args (`TrainingArguments`): `learning_rate` is that of the surrogates' B. Columns of data are never removed.
        train (`Sequence[str]`, defaults to `("surrogate",)`): see [`trainable_parameters`].
        original (`PreTrainedModel`, *optional*): for data without the original's outputs.
        kl_weight, hidden_weight, layer_weight (`float`): of the three terms.
        layer_losses (`Mapping[str, LayerLoss]`, *optional*): by layer name, for `layer_weight`.
        rates (`Mapping[str, float]`, *optional*): learning rates as multiples of that of B, where not as in `RATES`.
        sample_chips (`bool`, defaults to `True`):
            With a model on a chip: every micro-batch runs on another chip of its kind (see
            [`~hf_polarize.cim.variation.SampledChips`]), and evaluations on one of these, so that the surrogates suit
            any. `False`: on the chip that is attached, which they then suit best.
        **kwargs: Trainer's.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train: Sequence[str] = ("surrogate",),
        original: PreTrainedModel | None = None,
        kl_weight: float = 1.0,
        hidden_weight: float = 0.0,
        layer_weight: float = 0.0,
        layer_losses: Mapping[str, LayerLoss] | None = None,
        rates: Mapping[str, float] | None = None,
        sample_chips: bool = True,
        **kwargs: Any,
    ) -> None:
        if layer_weight and not layer_losses:
            raise ValueError("layer_weight needs layer_losses: the statistics of a calibration")
        self.parts = trainable_parameters(model, train)
        self.chips = SampledChips(model, args.seed) if sample_chips else None
        self.original = original.eval() if original is not None else None
        self.weights = {"kl": kl_weight, "hidden": hidden_weight, "layer": layer_weight}
        self.layer_losses = dict(layer_losses or {})
        self.rates = {**RATES, **(rates or {})}
        args.remove_unused_columns = False
        pad = getattr(core_model(model).config, "pad_token_id", None)
        kwargs.setdefault("data_collator", partial(padded_batch, pad_token_id=pad))
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = False  # micro-batches count alike, whatever their padding
        self.label_names: list[str] = []
        self.can_return_loss = True
        self._micro_batch = (0, 0)  # the step, and which of its micro-batches

    optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rate = self.args.learning_rate
            parts = {**self.parts}
            surrogate, first = parts.pop("surrogate", []), {id(a) for a, _ in factors(core_model(self.model)).values()}
            pair = {part: [p for p in surrogate if (id(p) in first) == (part == "A")] for part in "AB"}
            groups = [
                {"params": parameters, "lr": rate * self.rates[part], "weight_decay": self.args.weight_decay}
                for part, parameters in {**pair, **parts}.items()
                if parameters
            ]
            optimizer: torch.optim.Optimizer = cls(groups, **options)
            self.optimizer = optimizer
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with without_dropout(core_model(self.model)):
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.chips is None:
            return super().training_step(*args, **kwargs)  # type: ignore[no-any-return]
        step, (before, i) = self.state.global_step, self._micro_batch
        self._micro_batch = step, (i + 1 if step == before else 1)
        number = step * self.args.gradient_accumulation_steps + self._micro_batch[1]  # the same after a resumption
        self.chips.take("training", self.args.process_index, number)
        try:
            return super().training_step(*args, **kwargs)  # type: ignore[no-any-return]
        finally:
            self.chips.restore()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.chips is None:
            return super().evaluate(*args, **kwargs)  # type: ignore[no-any-return]
        reset_reads(self.model)
        self.chips.take("evaluation")
        try:
            return super().evaluate(*args, **kwargs)  # type: ignore[no-any-return]
        finally:
            self.chips.restore()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inputs = dict(inputs)
        teacher = {key: inputs.pop(key) for key in TEACHER_COLUMNS if key in inputs}
        for key in ("labels", "label", "label_ids"):
            inputs.pop(key, None)
        core = core_model(self.accelerator.unwrap_model(model))
        head = shared_head(core)
        if not teacher:
            if self.original is None:
                raise ValueError(
                    "the data holds no outputs of the original model: make it with teacher_dataset(original, "
                    "batches), or give PolarizeTrainer the original"
                )
            made = teacher_outputs(self.original, inputs, top_k=None if head is not None else TOP_K)
            teacher = {key: value.to(self.args.device) for key, value in made.items()}
        mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")

        def tokens(values: torch.Tensor) -> torch.Tensor:
            if mask is None or values.shape[1] == 1:  # one output per input
                return values.flatten(0, -2)
            return values[mask.bool()]

        with final_states(core) as states:
            few_logits = {"logits_to_keep": 1, "use_cache": False} if head is not None and HIDDEN in teacher else {}
            outputs = model(**inputs, **few_logits)
        if HIDDEN in teacher and head is None and "logits" in outputs:
            raise ValueError(
                "the model's output embedding is not the original's, so that hidden states don't give the original's "
                "logits: make the data with teacher_dataset(original, batches, top_k=128)"
            )
        if head is not None and HIDDEN in teacher:
            ours, theirs = tokens(states[-1]), tokens(teacher[HIDDEN]).to(states[-1].device)
            loss = self.weights["kl"] * divergence(ours, theirs, head)
            if self.weights["hidden"]:
                loss = loss + self.weights["hidden"] * hidden_distance(ours, theirs)
        elif HIDDEN in teacher:
            loss = self.weights["kl"] * hidden_distance(tokens(outputs.last_hidden_state), tokens(teacher[HIDDEN]))
        else:
            logits = outputs.logits if outputs.logits.dim() == 3 else outputs.logits[:, None]
            loss = self.weights["kl"] * divergence_of_top(
                tokens(logits), tokens(teacher[TOP]), tokens(teacher[INDICES])
            )
        if self.weights["layer"] and model.training:
            pairs = factors(core)
            loss = loss + self.weights["layer"] * sum(
                layer(*pairs[name]) for name, layer in self.layer_losses.items() if name in pairs
            )
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Train without dropout inside this context: the original's outputs were made without it."""
    changed = []
    for module in model.modules():
        names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else list(vars(module))
        for name in names:
            value = getattr(module, name)
            if (name == "p" or name.endswith("dropout")) and isinstance(value, float) and value:
                changed.append((module, name, value))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


def distill(
    model: nn.Module,
    data: Any,
    held_out: Any,
    folder: str | Path,
    *,
    train: Sequence[str] = ("surrogate",),
    learning_rate: float = 1e-4,
    batch_size: int = 8,
    micro_batch_size: int = 8,
    epochs: float = 1.0,
    hidden_weight: float = 0.0,
    layer_weight: float = 0.0,
    layer_losses: Mapping[str, LayerLoss] | None = None,
    evaluations: int = 4,
    patience: int = 3,
    sample_chips: bool = True,
    bf16: bool | None = None,
    seed: int = 0,
    resume: bool = False,
) -> dict[str, Any]:
    """
    Train a polarized model with [`PolarizeTrainer`] and good defaults, and keep the step that is best held out.

    AdamW with a cosine schedule; fresh data counts for more than further passes over it.

    Args:
        model (`PreTrainedModel` or `PeftModel`): polarized; trained in place.
        data, held_out (`datasets.Dataset`): of [`~hf_polarize.distillation.teacher_dataset`].
        folder (`str` or `Path`): for checkpoints, from which `resume` goes on.
        train (`Sequence[str]`): see [`trainable_parameters`].
        learning_rate (`float`, defaults to 1e-4): of the surrogates' B, at its peak.
        batch_size (`int`, defaults to 8): samples per step.
        micro_batch_size (`int`, defaults to 8): samples in memory at a time.
        epochs (`float`, defaults to 1): passes over the data.
        hidden_weight, layer_weight (`float`), layer_losses (`Mapping[str, LayerLoss]`): see [`PolarizeTrainer`].
        evaluations (`int`, defaults to 4): evaluations on the held-out data, and checkpoints.
        patience (`int`, defaults to 3): evaluations without a gain after which training stops.
        sample_chips (`bool`, defaults to `True`): for a model on a chip, see [`PolarizeTrainer`].
        bf16 (`bool`, *optional*): mixed precision; where the device is fast in it if left out.
        seed (`int`, defaults to 0): of the order of the data.
        resume (`bool`, defaults to `False`): go on from the last checkpoint in the folder, if there is one.

    Returns:
        `dict` with `start` and `end`, the held-out distances; `shares`, by how much the distance would be greater with
        a trained part put back to where it started (empty for a single part, or where no step was better); `steps`;
        and `history`, the losses that were logged.
    """
    core = core_model(model)
    steps = max(1, math.ceil(len(data) * epochs / batch_size))
    every = max(1, steps // evaluations)
    micro = min(micro_batch_size, batch_size)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=micro, per_device_eval_batch_size=micro,
        gradient_accumulation_steps=-(-batch_size // micro), max_steps=steps, learning_rate=learning_rate,
        lr_scheduler_type="cosine", warmup_steps=max(1, steps // 20), weight_decay=0.0, adam_beta2=0.95,
        max_grad_norm=1.0, eval_strategy="steps", eval_steps=every, save_strategy="steps", save_steps=every,
        save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
        logging_steps=max(1, every // 4), report_to=[], seed=seed, use_cpu=core.device.type == "cpu",
        bf16=bfloat16_is_fast(core.device) if bf16 is None else bf16,
    )  # fmt: skip
    trainer = PolarizeTrainer(
        model, arguments, train=train, hidden_weight=hidden_weight, layer_weight=layer_weight,
        layer_losses=layer_losses, sample_chips=sample_chips, train_dataset=data, eval_dataset=held_out,
        callbacks=[EarlyStoppingCallback(patience)],
    )  # fmt: skip
    before = {part: [p.detach().clone() for p in parameters] for part, parameters in trainer.parts.items()}
    start = trainer.evaluate()["eval_loss"]
    checkpoint = get_last_checkpoint(str(folder)) if resume and Path(folder).is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    end = trainer.evaluate()["eval_loss"]
    shares = {}
    if not end <= start:  # not one step was better, or it diverged
        _swap(trainer.parts, before)
        end = start
    else:
        for part in trainer.parts if len(trainer.parts) > 1 else ():
            _swap({part: trainer.parts[part]}, before)
            shares[part] = trainer.evaluate()["eval_loss"] - end
            _swap({part: trainer.parts[part]}, before)
    freeze(model)
    # accelerate leaves its mixed precision around the model's forward
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    core.eval()
    return {
        "start": start,
        "end": end,
        "shares": shares,
        "steps": trainer.state.global_step,
        "samples": len(data),
        "train": list(train),
        "learning_rate": learning_rate,
        "history": trainer.state.log_history,
    }


def _swap(parts: Mapping[str, list[nn.Parameter]], others: Mapping[str, list[torch.Tensor]]) -> None:
    """Exchange the values of parameters with others."""
    for part, parameters in parts.items():
        for parameter, other in zip(parameters, others[part], strict=True):
            value = parameter.detach().clone()
            parameter.data.copy_(other)
            other.copy_(value)

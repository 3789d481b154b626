"""The model card: what a checkpoint is, how it loads with and without this library, and what was measured."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .inspection import CheckpointInfo
from .report import results_table, size_table

TASKS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", None),
}

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ base }} with {{ backbone }} weights and a rank-{{ ranks }} *surrogate*: a thin high-precision path `B A` beside
each quantized linear layer, which takes back accuracy that quantization lost. Made with hf_polarize
{{ version }} ({{ method }}).

## How to load it

With transformers, peft and bitsandbytes alone, nothing else to install:

```python
from transformers import {{ auto_class }}

model = {{ auto_class }}.from_pretrained("{{ repo_id }}")
```

With `import hf_polarize` before that line the surrogate stays active and frozen under adapters of your own,
{{ extras }}and the record of how the model was made is in `model.polarization`.
{{ chip }}
To get rid of quantization, call `hf_polarize.merge_surrogates(model)`: it dequantizes first and merges then. PEFT's
own merge would round the result to the backbone's grid again.

## Size

{{ size }}

{{ results }}

## How it was made

{{ provenance }}
"""

CHIP = """
It then runs{which} on a simulated compute-in-memory chip, and the results below are those on it:

```python
chip = hf_polarize.CIMConfig.from_dict({chip})
hf_polarize.attach_cim(model, chip.replace(chip_seed={other}))  # another chip of its kind{note}
hf_polarize.detach_cim(model)  # none, as without hf_polarize
```
"""


def loader(info: CheckpointInfo) -> tuple[str, str | None]:
    """Return the auto class that loads a checkpoint and the Hub's name of its task."""
    architecture = (info.config.get("architectures") or [""])[0]
    for suffix, found in TASKS.items():
        if architecture.endswith(suffix):
            return found
    return "AutoModel", "feature-extraction"


def model_card(info: CheckpointInfo, repo_id: str) -> ModelCard:
    """
    Make the card of a checkpoint for the repository that it goes to.

    Args:
        info ([`CheckpointInfo`]): of the checkpoint.
        repo_id (`str`): `user/name`.
    """
    record = info.sidecar
    provenance: dict[str, Any] = record.get("provenance", {})
    results: dict[str, Any] = record.get("results", {})
    backbone: dict[str, Any] = record.get("backbone", {})
    base = provenance.get("base_model") or None
    fitted: dict[str, Any] = provenance.get("chip", {}).get("cim", {})
    auto_class, task = loader(info)
    ranks = sorted({layer.rank for layer in info.layers if layer.rank})
    nf4 = not info.config["quantization_config"].get("load_in_8bit")
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        quantized_by=repo_id.partition("/")[0],
        library_name="transformers",
        pipeline_tag=task,
        tags=["polarize", "bitsandbytes", "4-bit" if nf4 else "8-bit", "nf4" if nf4 else "int8", "peft", "lora"],
        model_name=repo_id.partition("/")[2] if results else None,
        eval_results=_eval_results(results, task) if results else None,
        ignore_metadata_errors=True,
    )
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=repo_id.partition("/")[2],
        base=f"[{base}](https://huggingface.co/{base})" if base and "/" in base else (base or "A pretrained model"),
        backbone="4-bit NF4" if nf4 else "INT8",
        ranks=ranks[0] if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        version=record.get("hf_polarize_version", ""),
        method=provenance.get("method", "surrogates as trained by their author"),
        auto_class=auto_class,
        repo_id=repo_id,
        extras=f"inputs of the backbone are rounded to {backbone['activations'].upper()}, "
        if backbone.get("activations")
        else "",
        chip=""
        if info.chip is None
        else CHIP.format(
            chip=info.chip,
            which=" deflated" if info.deflated else "",
            other=fitted.get("chip_seed", 0) + 1,
            note=f": worse, the model was fitted to seed {fitted.get('chip_seed', 0)}" if fitted else "",
        ),
        size=size_table(info),
        results=f"## Results\n\n{results_table(results)}\n\n{results.get('protocol', '')}" if results else "",
        provenance=_provenance(provenance),
    )
    return card


def _eval_results(results: dict[str, Any], task: str | None) -> list[EvalResult]:
    names = {"perplexity": "perplexity", "kl": "KL(original || polarized) per token", "loss": "loss"}
    text = results.get("text", "held-out data")
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type=text,
            dataset_name=text,
            metric_type=key,
            metric_name=name,
            metric_value=round(results["polarized"][key], 6),
        )
        for key, name in names.items()
        if results["polarized"].get(key) is not None
    ]


def _provenance(provenance: dict[str, Any]) -> str:
    if not provenance:
        return "No record."
    calibration = provenance.get("calibration", {})
    amount = (
        f"{calibration.get('tokens')} tokens" if calibration.get("tokens") else f"{calibration.get('samples')} samples"
    )
    text = " and ".join(
        "text that the original model wrote itself" if source == "self" else f"`{source}`"
        for source in str(calibration.get("source")).split(" + ")
    )
    weights = f"The original's weights are those of {provenance['weights']}. " if "weights" in provenance else ""
    fitted = ""
    if "chip" in provenance:
        written = ", its codes written for those cells: off that chip it is not the model that it should be"
        written = written if provenance["chip"]["codes"] else ""
        seed = provenance["chip"]["cim"].get("chip_seed", 0)
        fitted = f" Then fitted to the simulated chip of seed {seed} alone{written}."
    return (
        f"{weights}Calibrated on {amount} of {text} (seed {calibration.get('seed')}); {provenance.get('method')}; "
        f"{provenance.get('seconds')} seconds.{fitted}"
    )

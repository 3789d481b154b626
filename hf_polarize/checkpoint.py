"""
The checkpoint: one folder, two readers.

    config.json, model*.safetensors     a vanilla bitsandbytes checkpoint (4-bit NF4 or 8-bit)
    adapter_config.json, adapter_model.safetensors     a plain PEFT LoRA adapter: the surrogates
    deflation.safetensors               where the backbone runs deflated: what surrogates take out of its input
    polarize_config.json                what only this library knows: provenance, ranks, errors, results

transformers, peft and bitsandbytes alone load it with the same logits. Nothing in it is a pickle.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import os
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin
from transformers.quantizers.auto import register_quantizer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import cached_file

from .backbone import backbone_layers
from .cim.hook import warn_if_fitted
from .configuration import PolarizeConfig, SurrogateConfig
from .deflation import attach_deflation, removed_directions
from .quantizer import BackboneHfQuantizer
from .surrogate import SURROGATE, core_model, factor_dtype, factors, surrogate_adapter, surrogates, target_modules

SIDECAR = "polarize_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
DEFLATION = "deflation.safetensors"
WEIGHTS = ("model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors")
OWN_FILES = (*WEIGHTS, "model.safetensors.index.json", ADAPTER_CONFIG, ADAPTER_WEIGHTS, DEFLATION)
"""What an earlier checkpoint may have left, by name or pattern: files that a reader would take for ours."""
FORMAT_VERSION = 1
DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
PEFT_PREFIX = "base_model.model."


@register_quantizer("polarize")
class PolarizeHfQuantizer(BackboneHfQuantizer):
    """A [`BackboneHfQuantizer`] that also takes in the surrogates of a polarized checkpoint, and checks them."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.quantization_config.surrogate and checkpoint_files:
            folder = Path(checkpoint_files[0]).parent
            if not (folder / ADAPTER_CONFIG).is_file():
                raise ValueError(
                    f"this polarized checkpoint is missing its adapter: no {ADAPTER_CONFIG} in {folder}. "
                    "Without its surrogates it is a bare backbone; restore the file, or remove "
                    '"surrogate": true from quantization_config.polarize in config.json to load it as one.'
                )
        super()._process_model_before_weight_loading(model, **kwargs)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        if self.quantization_config.surrogate:
            # from_pretrained loads a root adapter right after this hook, as a plain LoRA named "default", and has no
            # later one (modeling_utils.py:4465 of 5.23): for that one call the method is ours
            model.load_adapter = types.MethodType(_load_surrogates, model)
        return model

    def mark(self, model: PreTrainedModel) -> None:
        super().mark(model)
        model.save_pretrained = types.MethodType(_save_pretrained, model)
        model.push_to_hub = types.MethodType(_push_to_hub, model)

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        super().remove_quantization_config(model)
        if not _is_polarized_alone(model):  # else they say what is left to do
            for name in ("save_pretrained", "push_to_hub"):
                model.__dict__.pop(name, None)


def _is_polarized_alone(model: PreTrainedModel) -> bool:
    """Tell whether surrogates are the only adapters of a model: then it is saved as a whole."""
    names = {adapter for _, _, adapter in surrogates(model)}
    return bool(names) and names == set(getattr(model, "peft_config", {}))


def _save_pretrained(
    model: PreTrainedModel, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any
) -> None:
    """
    Save a polarized model as a whole, and any other as transformers does: with a user's adapter, that one alone.

    In the checkpoints of a Trainer it is the adapter alone as well, beside a file from which Trainer can resume: it
    reads an adapter only into a `PeftModel` (trainer.py:3701 of 5.23), and model.safetensors by parameter name.
    """
    in_training = Path(save_directory).name.startswith(PREFIX_CHECKPOINT_DIR)
    if _is_polarized_alone(model) and not in_training:
        if kwargs.get("push_to_hub"):
            _push_to_hub(model)
        if is_main_process:
            save_polarized(model, save_directory, max_shard_size=kwargs.get("max_shard_size", "5GB"), overwrite=True)
        return
    type(model).save_pretrained(model, save_directory, is_main_process=is_main_process, **kwargs)
    if getattr(model, "_hf_peft_config_loaded", False) and is_main_process and in_training:
        trained = {
            name: parameter.detach().cpu().clone()
            for name, parameter in model.named_parameters()
            if ".lora_" in name or parameter.requires_grad
        }
        save_file(trained, Path(save_directory) / "model.safetensors", metadata={"format": "pt"})


def _push_to_hub(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Push any model but a polarized one, whose adapter has to name its repository."""
    if _is_polarized_alone(model):
        raise ValueError(
            "use hf_polarize.push_polarized(model, repo_id): it also writes what the Hub needs to load it"
        )
    return type(model).push_to_hub(model, *args, **kwargs)


# a bound method pickles by its name
_save_pretrained.__name__, _push_to_hub.__name__ = "save_pretrained", "push_to_hub"


def _load_surrogates(
    model: PreTrainedModel, peft_model_id: str, adapter_name: str | None = None, load_config: Any = None, **kwargs: Any
) -> Any:
    del model.load_adapter
    download = {**(load_config.download_kwargs if load_config else {}), **(kwargs.get("adapter_kwargs") or {})}
    download = {key: value for key, value in download.items() if key in DOWNLOAD_ARGUMENTS}
    plain = LoraConfig.from_pretrained(peft_model_id, **download)
    names = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    config = SurrogateConfig(**{name: getattr(plain, name) for name in names})
    name = SURROGATE if adapter_name in (None, "default") else adapter_name
    # of the mixin: some models have a load_adapter of their own
    info = PeftAdapterMixin.load_adapter(
        model, peft_model_id, adapter_name=name, peft_config=config, load_config=load_config, **kwargs
    )
    for what in ("missing", "unexpected"):
        keys = sorted(getattr(info, f"{what}_keys"))
        if keys:
            raise ValueError(f"the adapter of {peft_model_id} has {what} keys: {few(keys)}")
    check_finite(model)
    removed = cached_file(peft_model_id, DEFLATION, _raise_exceptions_for_missing_entries=False, **download)
    if removed:
        attach_deflation(model, load_file(removed))
    sidecar = cached_file(peft_model_id, SIDECAR, _raise_exceptions_for_missing_entries=False, **download)
    model.polarization = read_json(Path(sidecar)) if sidecar else {}
    warn_if_fitted(model)
    return info


def few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check_finite(model: nn.Module) -> None:
    """
    Make sure that every scale of the backbone and every factor of a surrogate is a finite number.

    Raises:
        ValueError: Naming the first layers that are not.
    """
    bad = []
    for name, pair in factors(model).items():
        bad += [f"{name}.{part}" for part, value in zip("AB", pair, strict=True) if not torch.isfinite(value).all()]
    for name, layer in backbone_layers(core_model(model)):
        if not all(torch.isfinite(scale).all() for scale in layer.scales()):
            bad.append(f"{name}.scales")
    if bad:
        raise ValueError(f"NaN or infinite values in {few(bad)}: this model is broken")


def prepare_folder(directory: str | Path, overwrite: bool) -> Path:
    """
    Return the folder to write to; it need not exist yet.

    Raises:
        FileExistsError: If it holds something and `overwrite` is false.
        NotADirectoryError: If it is a file.
    """
    folder = Path(directory)
    if folder.is_file():
        raise NotADirectoryError(f'"{folder}" is a file; give a folder')
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f'the folder "{folder}" is not empty; choose another, or allow it with overwrite=True (in a recipe, '
            "overwrite=true)"
        )
    return folder


def base_state_dict(core: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors of the model without its adapters, under the names that they have without adapters."""
    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for key, tensor in core.state_dict().items():
        if ".lora_" in key or ".modules_to_save." in key:
            continue
        name = key.replace(".base_layer.", ".").replace(".original_module.", ".")
        if tensor.data_ptr() in seen and tensor.numel():
            if name in core.all_tied_weights_keys:
                continue
            tensor = tensor.clone()  # bitsandbytes lets all layers share one codebook; a file can't
        seen.add(tensor.data_ptr())
        state[name] = tensor.detach().contiguous()
    return state


def save_polarized(
    model: nn.Module,
    directory: str | Path,
    processor: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """
    Write a polarized model so that it loads with transformers, peft and bitsandbytes alone.

    Another adapter that a user stacked on top is not written; save that one with PEFT, to a folder of its own.

    Args:
        model (`PreTrainedModel` or `PeftModel`): polarized.
        directory (`str` or `Path`): new or empty.
        processor (*optional*): a tokenizer or image processor to write with it.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): of each file of weights.
        overwrite (`bool`, defaults to `False`): write into a folder that isn't empty, over the checkpoint in it.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: If the model has no surrogates, or a scale or factor is not finite. Nothing is written then.
        FileExistsError: If the folder is not empty.
    """
    folder = prepare_folder(directory, overwrite)
    core = core_model(model)
    surrogate_adapter(model)
    if not isinstance(getattr(core, "hf_quantizer", None), BackboneHfQuantizer):
        raise ValueError(
            "this model's backbone was dequantized, and its surrogates are still beside it; call "
            "merge_surrogates(model) and save the plain model that it gives"
        )
    check_finite(model)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as written:
        _write_base(core, Path(written), max_shard_size)
        if processor is not None:
            processor.save_pretrained(written)
        _write_surrogates(model, Path(written))
        folder.mkdir(exist_ok=True)
        for old in OWN_FILES:
            for path in folder.glob(old):
                path.unlink()
        for path in sorted(Path(written).rglob("*")):
            target = folder / path.relative_to(written)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                path.chmod(0o666 & ~_umask())  # safetensors' files are for their owner alone
                path.replace(target)
    return folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_base(core: PreTrainedModel, folder: Path, max_shard_size: int | str) -> None:
    config = copy.deepcopy(core.config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.dtype = str(core.dtype).removeprefix("torch.")
    config.architectures = [type(core).__name__]
    config.quantization_config = copy.deepcopy(core.hf_quantizer.quantization_config)
    config.quantization_config.surrogate = True
    config.save_pretrained(folder)
    if core.can_generate():
        core.generation_config.save_pretrained(folder)
    save_torch_state_dict(base_state_dict(core), folder, max_shard_size=max_shard_size, metadata={"format": "pt"})


def _write_surrogates(model: nn.Module, folder: Path) -> None:
    core, pairs = core_model(model), factors(model)
    state = {
        f"{PEFT_PREFIX}{name}.lora_{part}.weight": factor.detach().to("cpu", factor_dtype(layer)).contiguous()
        for name, layer, _ in surrogates(model)
        for part, factor in zip("AB", pairs[name], strict=True)
    }
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = core.peft_config[surrogate_adapter(model)]
    write_json(folder / ADAPTER_CONFIG, plain_adapter_config(config, target_modules(core, set(pairs))))
    removed = removed_directions(core)
    if removed:
        state = {name: r.to("cpu").contiguous() for name, r in removed.items()}
        save_file(state, folder / DEFLATION, metadata={"format": "pt"})
    write_json(folder / SIDECAR, sidecar(model))


def plain_adapter_config(config: LoraConfig, targets: list[str]) -> dict[str, Any]:
    """Return what PEFT writes for a `LoraConfig` of these values and target modules, without a path."""
    output = config.to_dict()
    output.update(
        inference_mode=True,
        base_model_name_or_path=None,
        revision=None,
        auto_mapping=None,
        exclude_modules=None,
        target_parameters=None,
        init_lora_weights=True,
        target_modules=targets,
    )
    return {key: sorted(value) if isinstance(value, set) else value for key, value in output.items()}


def sidecar(model: nn.Module) -> dict[str, Any]:
    """Return what `polarize_config.json` says: how the model was made, and the rank of every layer."""
    record = copy.deepcopy(getattr(core_model(model), "polarization", None) or {})
    layers: Mapping[str, dict] = record.get("layers", {})
    config: PolarizeConfig = core_model(model).hf_quantizer.quantization_config
    return {
        "format_version": FORMAT_VERSION,
        "hf_polarize_version": importlib.metadata.version("hf-polarize"),
        "backbone": {
            "format": config.backbone,
            "double_quant": config.double_quant,
            "activations": config.activations,
        },
        **{key: value for key, value in record.items() if key in ("provenance", "results")},
        "layers": {name: {**layers.get(name, {}), "rank": len(a)} for name, (a, _) in factors(model).items()},
    }


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not valid JSON ({error}); the checkpoint is broken") from None


def write_json(path: Path, content: Any) -> None:
    """Write a file that is whole at any moment."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(new, path)

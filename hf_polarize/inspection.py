"""Look into a polarized checkpoint without loading the model: is it whole, and what does it weigh?"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from .checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DEFLATION, PEFT_PREFIX, SIDECAR, WEIGHTS, few, read_json

CONFIG = "config.json"
NF4_STATE = "weight.quant_state.bitsandbytes__nf4"


@dataclass
class LayerInfo:
    """
    One layer of the backbone, in bytes and bits.

    Attributes:
        name (`str`): in the base model.
        out_features, in_features (`int`): shape of the weight.
        rank (`int`): of its surrogate, 0 if it has none.
        code_bytes, scale_bytes, surrogate_bytes (`int`): quantized weights; scales and codebooks; factors A and B, and
            R where the layer runs deflated.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    code_bytes: int
    scale_bytes: int
    surrogate_bytes: int

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass
class CheckpointInfo:
    """
    A polarized checkpoint.

    Attributes:
        layers (`list[LayerInfo]`): the backbone.
        other_bytes (`int`): everything else in high precision: embeddings, norms, biases, heads.
        sidecar (`dict`): contents of `polarize_config.json`, empty if there is none.
        config (`dict`): contents of `config.json`.
        deflated (`bool`): whether layers run deflated.
    """

    layers: list[LayerInfo]
    other_bytes: int
    sidecar: dict[str, Any] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    deflated: bool = False

    @property
    def chip(self) -> dict[str, Any] | None:
        """Arguments of the `CIMConfig` of the chip that the backbone runs on, where they differ from the defaults."""
        chip: dict[str, Any] | None = self.config["quantization_config"].get("polarize", {}).get("cim")
        return chip

    def bits(self, part: str) -> float:
        """Return bits per backbone weight of `"code"`, `"scale"` or `"surrogate"`."""
        total: int = sum(getattr(layer, f"{part}_bytes") for layer in self.layers)
        return 8 * total / sum(layer.weights for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """All bits that stand for the weights of the backbone's layers, surrogates included, per weight."""
        return self.bits("code") + self.bits("scale") + self.bits("surrogate")

    @property
    def bytes(self) -> int:
        return self.other_bytes + sum(
            layer.code_bytes + layer.scale_bytes + layer.surrogate_bytes for layer in self.layers
        )


def _read_tensors(path: Path, want: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, int], dict[str, torch.Tensor]]:
    """Return shapes and bytes of all tensors of a file, and the tensors whose name `want` accepts."""
    shapes, sizes, values = {}, {}, {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                view = file.get_slice(key)
                shapes[key] = tuple(view.get_shape())
                bits = int("".join(filter(str.isdigit, view.get_dtype().split("_")[0])) or 8)
                sizes[key] = torch.Size(shapes[key]).numel() * bits // 8
                if want(key):
                    values[key] = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{path.name} can't be read ({error}); the checkpoint is broken") from None
    return shapes, sizes, values


def inspect_checkpoint(directory: str | Path) -> CheckpointInfo:
    """
    Read and check a polarized checkpoint.

    Args:
        directory (`str` or `Path`): local folder.

    Returns:
        [`CheckpointInfo`]

    Raises:
        FileNotFoundError: If the folder, its model or its adapter is not there.
        ValueError: If a file can't be read, adapter keys are missing or unexpected, or a scale or factor is NaN or
            infinite.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f'no folder "{folder}"')
    files = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    if not (folder / CONFIG).is_file() or not files:
        raise FileNotFoundError(f'no model in "{folder}": a checkpoint has {CONFIG} and model.safetensors')
    config = read_json(folder / CONFIG)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f'the checkpoint in "{folder}" is missing its adapter: no {name}')
    sidecar = read_json(folder / SIDECAR) if (folder / SIDECAR).is_file() else {}

    def is_scale(key: str) -> bool:
        return key.endswith(("absmax", "SCB", NF4_STATE))

    sizes: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    broken = []
    blobs: dict[str, dict[str, Any]] = {}
    for path in files:
        file_shapes, file_sizes, values = _read_tensors(path, is_scale)
        shapes |= file_shapes
        sizes |= file_sizes
        broken += [key for key, value in values.items() if value.is_floating_point() and not value.isfinite().all()]
        blobs |= {
            key.removesuffix(f".{NF4_STATE}"): json.loads(bytes(value.tolist()))
            for key, value in values.items()
            if key.endswith(NF4_STATE)
        }
    index = folder / "model.safetensors.index.json"
    if index.is_file() and (absent := sorted(set(read_json(index)["weight_map"]) - set(sizes))):
        raise ValueError(f"shards are missing: no {few(absent)}")

    broken += [f"{name}.offset" for name, blob in blobs.items() if not math.isfinite(blob.get("nested_offset", 0.0))]
    matrices: dict[str, tuple[int, int]] = {name: tuple(blob["shape"]) for name, blob in blobs.items()}
    for key in sizes:
        if key.endswith(".SCB"):
            name = key.removesuffix(".SCB")
            matrices[name] = shapes[f"{name}.weight"]  # type: ignore[assignment]
    if not matrices:
        raise ValueError(f'the model in "{folder}" has no bitsandbytes layer: it is not a polarized checkpoint')

    a_b, adapter_sizes = _check_adapter(folder / ADAPTER_WEIGHTS, matrices, sidecar, broken)
    _check_ranks(read_json(folder / ADAPTER_CONFIG), a_b)
    removed = folder / DEFLATION
    if removed.is_file():
        for name, size in _check_deflation(removed, matrices, a_b, broken).items():
            adapter_sizes[name] += size
    if broken:
        raise ValueError(f"NaN or infinite values in {few(sorted(broken))}: the checkpoint is broken")

    by_layer: dict[str, int] = defaultdict(int)
    for key, size in sizes.items():
        name = key.removesuffix(".SCB").removesuffix(".weight_format").partition(".weight")[0]
        if name in matrices and not key.endswith(".bias"):
            by_layer[name] += size
    layers = [
        LayerInfo(
            name,
            *shape,
            rank=a_b.get(name, 0),
            code_bytes=sizes[f"{name}.weight"],
            scale_bytes=by_layer[name] - sizes[f"{name}.weight"],
            surrogate_bytes=adapter_sizes.get(name, 0),
        )
        for name, shape in matrices.items()
    ]
    layers.sort(key=lambda layer: _natural(layer.name))
    return CheckpointInfo(layers, sum(sizes.values()) - sum(by_layer.values()), sidecar, config, removed.is_file())


def _check_deflation(
    path: Path, matrices: dict[str, tuple[int, int]], ranks: dict[str, int], broken: list[str]
) -> dict[str, int]:
    """Return the bytes of each R; collect what is not finite in `broken`."""
    shapes, sizes, values = _read_tensors(path, lambda key: True)
    broken += [f"{key} of {path.name}" for key, value in values.items() if not value.isfinite().all()]
    for name, shape in shapes.items():
        if name not in ranks or shape != (matrices[name][1], ranks[name]):
            raise ValueError(f"{path.name} has {name} of shape {shape}: no surrogate stands there that it fits")
    return sizes


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _check_ranks(adapter: dict[str, Any], ranks: dict[str, int]) -> None:
    """Make sure that PEFT will make layers of these ranks and scale them by 1."""
    for name, rank in ranks.items():
        said = []
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            patterns = adapter.get(pattern) or {}
            said.append(patterns.get(get_pattern_key(patterns, name), adapter.get(key)))
        if said != [rank, rank]:
            raise ValueError(
                f"{ADAPTER_CONFIG} gives {name} rank {said[0]} and alpha {said[1]}; its factors have rank {rank}, and "
                "a surrogate has unit scale"
            )


def _check_adapter(
    path: Path, matrices: dict[str, tuple[int, int]], sidecar: dict[str, Any], broken: list[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the rank and the bytes of each surrogate; collect what is not finite in `broken`."""
    shapes, sizes, values = _read_tensors(path, lambda key: True)
    broken += [key for key, value in values.items() if not value.isfinite().all()]
    found: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    total: dict[str, int] = defaultdict(int)
    unexpected = []
    for key, shape in shapes.items():
        name, _, part = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if name in matrices and part in ("A.weight", "B.weight"):
            found[name][part[0]] = shape
            total[name] += sizes[key]
        else:
            unexpected.append(key)
    expected = set(sidecar.get("layers", {})) | set(found)
    missing = sorted(f"{name}.lora_{part}" for name in expected for part in "AB" if part not in found[name])
    for what, keys in {"missing": missing, "unexpected": sorted(unexpected)}.items():
        if keys:
            raise ValueError(f"the adapter has {what} keys: {few(keys)}")
    for name, pair in found.items():
        out_features, in_features = matrices[name]
        if pair["A"][1] != in_features or pair["B"][0] != out_features or pair["A"][0] != pair["B"][1]:
            raise ValueError(
                f"the factors of {name} have shapes A {pair['A']} and B {pair['B']}, which don't fit its weight "
                f"({out_features}, {in_features})"
            )
    return {name: pair["A"][0] for name, pair in found.items()}, dict(total)

"""One checkpoint, two readers: with and without hf_polarize, bit for bit; and what is refused."""

import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import FAMILIES, output, tiny_inputs, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_polarize import PolarizeConfig, SurrogateConfig, polarize, save_polarized
from hf_polarize.checkpoint import SIDECAR
from hf_polarize.inspection import inspect_checkpoint
from hf_polarize.surrogate import factors

READER = Path(__file__).with_name("vanilla_reader.py")
VARIANTS = {
    **{
        f"{family}-{kind}": (family, {"backbone": kind}, torch.float32)
        for family in FAMILIES
        for kind in ("nf4", "int8")
    },
    "double": ("llama-tied", {"double_quant": True}, torch.float32),
    "bfloat16": ("llama-untied", {}, torch.bfloat16),
    "bfloat16-int8": ("llama-untied", {"backbone": "int8"}, torch.bfloat16),
}


def make(family="llama-untied", arguments=None, dtype=torch.float32, **surrogate):
    model = tiny_model(family, dtype=dtype)
    config = SurrogateConfig(**{"r": 4, **surrogate})
    return polarize(model, [tiny_inputs(model)], PolarizeConfig(**(arguments or {})), config)


def load(folder, family="llama-untied", **kwargs):
    return getattr(transformers, FAMILIES[family][0]).from_pretrained(folder, **kwargs)


@pytest.fixture
def checkpoint(tmp_path):
    return save_polarized(make(), tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """Save a model of each variant; return its folder, inputs and outputs."""
    result = {}
    for name, (family, arguments, dtype) in VARIANTS.items():
        model = make(family, arguments, dtype)
        folder = tmp_path_factory.mktemp("variants") / name
        inputs = tiny_inputs(model)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        before = output(model, inputs)  # an inference repacks the weights on some CPUs
        save_polarized(model, folder, max_shard_size="60KB" if name == "gpt2-nf4" else "5GB")
        assert torch.equal(output(model, inputs), before)
        result[name] = (family, folder, inputs, before)
    return result


def test_without_the_library_the_logits_are_the_same_bit_for_bit(variants, tmp_path):
    arguments = []
    for name, (family, folder, inputs, _) in variants.items():
        torch.save(inputs, tmp_path / f"{name}.in")
        arguments += [FAMILIES[family][0], str(folder), str(tmp_path / f"{name}.in"), str(tmp_path / f"{name}.out")]
    done = subprocess.run([sys.executable, READER, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    different = [
        name
        for name, (*_, expected) in variants.items()
        if not torch.equal(torch.load(tmp_path / f"{name}.out"), expected)
    ]
    assert not different


@pytest.mark.parametrize("name", VARIANTS)
def test_with_the_library_the_logits_and_a_second_save_are_the_same(variants, name, tmp_path):
    family, folder, inputs, expected = variants[name]
    model = load(folder, family)
    assert torch.equal(output(model, inputs), expected)
    assert list(model.peft_config) == ["surrogate"]
    save_polarized(model, tmp_path, max_shard_size="60KB" if name == "gpt2-nf4" else "5GB")
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in tmp_path.iterdir())
    _, different, errors = filecmp.cmpfiles(folder, tmp_path, files, shallow=False)
    assert not different and not errors


def test_a_mixture_of_experts_comes_back(tmp_path):
    """Its experts are no linear layers; PEFT converts the configuration of its adapters."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    inputs = tiny_inputs(model)
    polarize(model, [inputs])
    again = load(save_polarized(model, tmp_path / "one"))
    assert torch.equal(output(again, inputs), output(model, inputs))
    save_polarized(again, tmp_path / "two")
    names = [path.name for path in (tmp_path / "one").iterdir()]
    assert filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names, shallow=False)[0] == names


def test_the_layout_is_the_one_that_other_readers_know(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors",
        "adapter_config.json", "adapter_model.safetensors", SIDECAR,
    }  # fmt: skip
    layer = "model.layers.0.self_attn.q_proj.weight"
    keys = set(load_file(checkpoint / "model.safetensors"))
    assert {key for key in keys if key.startswith(layer)} == {
        layer, f"{layer}.absmax", f"{layer}.quant_map", f"{layer}.quant_state.bitsandbytes__nf4",
    }  # fmt: skip
    assert set(load_file(checkpoint / "adapter_model.safetensors")) == {
        f"base_model.model.{name}.lora_{part}.weight" for name in factors(make()) for part in "AB"
    }
    adapter = json.loads((checkpoint / "adapter_config.json").read_text())
    assert adapter["peft_type"] == "LORA" and adapter["r"] == adapter["lora_alpha"] == 4
    assert adapter["base_model_name_or_path"] is None and set(adapter) <= set(LoraConfig().to_dict())
    assert str(checkpoint.parent) not in "".join(path.read_text() for path in checkpoint.glob("*.json"))


def test_ranks_of_single_layers_survive(tmp_path):
    model = make(rank_pattern={"down_proj": 2, "layers.0.self_attn.q_proj": 7})
    folder = save_polarized(model, tmp_path)
    ranks = {name: len(a) for name, (a, _) in factors(load(folder)).items()}
    assert ranks == {name: len(a) for name, (a, _) in factors(model).items()}
    assert sorted(set(ranks.values())) == [2, 4, 7]
    assert {layer.name: layer.rank for layer in inspect_checkpoint(folder).layers} == ranks


def test_activations_come_back_with_the_library(tmp_path):
    model = make(arguments={"activations": "nf4"})
    inputs = tiny_inputs(model)
    again = load(save_polarized(model, tmp_path))
    assert again.config.quantization_config.activations == "nf4"
    changed = load(tmp_path, quantization_config=PolarizeConfig(activations="int8"))
    assert not torch.equal(output(changed, inputs), output(model, inputs))
    assert torch.equal(output(again, inputs), output(model, inputs))


@pytest.mark.parametrize("family", ["t5", "bert-mlm", "llama-tied"])
def test_surrogates_made_by_peft_alone_survive(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "original")
    model = load(tmp_path / "original", family, quantization_config=PolarizeConfig())
    peft_model = get_peft_model(model, SurrogateConfig(r=3, start="random"))
    inputs = tiny_inputs(model)
    again = load(save_polarized(peft_model, tmp_path / "saved"), family)
    assert torch.equal(output(again, inputs), output(peft_model, inputs))


def test_save_pretrained_of_a_polarized_model_is_the_same(checkpoint, tmp_path):
    make().save_pretrained(tmp_path / "other")
    names = [path.name for path in checkpoint.iterdir() if path.name != SIDECAR]  # that one has the seconds
    assert filecmp.cmpfiles(checkpoint, tmp_path / "other", names, shallow=False)[0] == names
    with pytest.raises(ValueError, match=r"use hf_polarize\.push_polarized"):
        load(checkpoint).push_to_hub("user/model")


def test_a_stacked_adapter_is_not_written(tmp_path):
    model = make()
    save_polarized(model, tmp_path / "alone")
    stacked = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    save_polarized(stacked, tmp_path / "stacked")
    names = [path.name for path in (tmp_path / "alone").iterdir()]
    assert filecmp.cmpfiles(tmp_path / "alone", tmp_path / "stacked", names, shallow=False)[0] == names


def test_peft_loads_the_adapter_onto_a_backbone(checkpoint, tmp_path):
    """What vLLM does: the base model by itself, then the adapter from the same folder."""
    from peft import PeftModel

    model = load(checkpoint)
    inputs = tiny_inputs(model)
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("adapter_*"))
    config = json.loads((bare / "config.json").read_text())
    config["quantization_config"]["polarize"]["surrogate"] = False
    (bare / "config.json").write_text(json.dumps(config))
    peft_model = PeftModel.from_pretrained(load(bare), checkpoint)
    assert torch.equal(output(peft_model, inputs), output(model, inputs))


def test_the_record_of_how_it_was_made(checkpoint):
    record = json.loads((checkpoint / SIDECAR).read_text())
    assert record["format_version"] == 1 and record["backbone"]["format"] == "nf4"
    assert record["provenance"]["calibration"]["tokens"] == 128
    for layer in record["layers"].values():
        assert layer["rank"] == 4 and 0 < layer["error_after"] < layer["error_before"]
    assert load(checkpoint).polarization == record


def test_info_counts_every_byte(checkpoint):
    info = inspect_checkpoint(checkpoint)
    stored = sum(tensor.nbytes for path in checkpoint.glob("*.safetensors") for tensor in load_file(path).values())
    assert info.bytes == stored
    assert info.bits("code") == 4
    layer = next(layer for layer in info.layers if layer.name == "model.layers.0.mlp.down_proj")
    assert (layer.out_features, layer.in_features, layer.rank) == (64, 128, 4)
    assert layer.surrogate_bytes == 4 * 4 * (64 + 128)
    assert info.bits_per_weight == pytest.approx(
        8 * (info.bytes - info.other_bytes) / sum(layer.weights for layer in info.layers)
    )


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def drop_adapter(folder):
    for path in folder.glob("adapter_*"):
        path.unlink()


def drop_adapter_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


FACTOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SCALE = "model.layers.1.mlp.up_proj.weight.absmax"


def drop_key(folder):
    edit_tensors(folder / "adapter_model.safetensors", lambda tensors: tensors.pop(FACTOR))


def add_key(folder):
    edit_tensors(
        folder / "adapter_model.safetensors",
        lambda tensors: tensors.update({FACTOR.replace("q_proj", "z_proj"): torch.zeros(4, 64)}),
    )


def break_factor(folder):
    edit_tensors(folder / "adapter_model.safetensors", lambda tensors: tensors[FACTOR].fill_(float("nan")))


def break_json(folder):
    (folder / SIDECAR).write_text('{"a": ')


def break_rank(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 8}))


def break_scale(folder):
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors[SCALE][3].fill_(float("inf")))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_adapter, "missing its adapter"),
        (drop_adapter_weights, "adapter_model.safetensors|adapter is missing|Could not download"),
        (drop_key, "missing keys: .*q_proj"),
        (add_key, "unexpected keys: .*z_proj"),
        (break_factor, "NaN or infinite values in .*q_proj"),
        (break_json, "polarize_config.json is not valid JSON"),
        (break_rank, "unit scale"),
        (break_scale, "NaN or infinite values in .*up_proj"),
    ],
)
def test_a_damaged_checkpoint_is_refused(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises((ValueError, OSError), match=message):
        load(checkpoint)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        inspect_checkpoint(checkpoint)


def test_a_missing_shard_is_named(tmp_path):
    folder = save_polarized(make(), tmp_path, max_shard_size="60KB")
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"shards are missing: no .* and \d+ more"):
        inspect_checkpoint(folder)


def test_saving_refuses_before_it_writes(tmp_path):
    model = make()
    full = tmp_path / "full"
    full.mkdir()
    for name in ("notes.txt", "adapter_notes.txt", "model_of_mine.safetensors"):
        (full / name).write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_polarized(model, full)
    assert len(list(full.iterdir())) == 3
    save_polarized(model, full, max_shard_size="60KB", overwrite=True)
    save_polarized(model, full, overwrite=True)
    assert (full / "adapter_notes.txt").read_text() == "mine" and inspect_checkpoint(full).layers
    assert {path.name for path in full.glob("model*")} == {"model.safetensors", "model_of_mine.safetensors"}

    with torch.no_grad():
        next(iter(factors(model).values()))[1].fill_(float("inf"))
    with pytest.raises(ValueError, match=r"NaN or infinite values in model\.layers\.0"):
        save_polarized(model, tmp_path / "broken")
    with pytest.raises(ValueError, match="expected one adapter made with a SurrogateConfig"):
        save_polarized(tiny_model("llama-tied"), tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_what_is_no_checkpoint_is_named(checkpoint, tmp_path):
    (checkpoint / "adapter_config.json").write_text("{")  # transformers itself reads this one first
    with pytest.raises(ValueError, match=r"adapter_config\.json is not valid JSON"):
        inspect_checkpoint(checkpoint)
    with pytest.raises(FileNotFoundError, match="no folder"):
        inspect_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no model in"):
        inspect_checkpoint(tmp_path / "empty")

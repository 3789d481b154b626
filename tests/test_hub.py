"""Push with the real client to a small Hub, and read it back where hf_polarize can't be imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import output, tiny_inputs, tiny_model
from hub_server import Hub
from huggingface_hub import ModelCard

from hf_polarize import polarize, save_polarized
from hf_polarize.card import model_card
from hf_polarize.inspection import inspect_checkpoint

READER = Path(__file__).with_name("vanilla_reader.py")
PUSH = """
import sys
from transformers import AutoModelForCausalLM
import hf_polarize
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(hf_polarize.push_polarized(model, sys.argv[2]).oid)
"""


@pytest.fixture(scope="module")
def hub():
    with Hub().running() as running:
        yield running


@pytest.fixture(scope="module")
def model(tokenizer):
    model = tiny_model("llama-tied")
    polarize(model, [tiny_inputs(model)])
    model.polarization["provenance"]["base_model"] = "someone/base"
    variant = {"loss": 2.0, "perplexity": 7.4, "kl": 0.1, "bits_per_weight": 5.0, "bytes": 10, "seconds": 1.0}
    model.polarization["results"] = {
        **dict.fromkeys(("original", "backbone", "polarized"), variant),
        "gap_recovered": 0.55,
        "protocol": "Token perplexity on `some-text`.",
        "text": "some-text",
    }
    return model


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = save_polarized(model, tmp_path_factory.mktemp("hub") / "checkpoint", tokenizer)
    (folder / "report.md").write_text("of the run")
    return folder


def client(hub, cache):
    """Return the environment of a client of this hub that has never downloaded anything."""
    return {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def run(arguments, **kwargs):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, **kwargs
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("how", ["command", "function"])
def test_a_pushed_model_loads_everywhere_with_the_same_logits(hub, folder, model, tmp_path, how):
    repo_id = f"user/tiny-{how}"
    commits = len(hub.commits)
    environment = client(hub, tmp_path / "cache-push")
    if how == "command":
        printed = run(["-m", "hf_polarize.cli", "push", folder, repo_id], env=environment)
        assert printed.strip().startswith(f"{hub.url}/{repo_id}/commit/")
    else:
        run(["-c", PUSH, folder, repo_id], env=environment)
    assert len(hub.commits) == commits + 1  # in one commit

    files = hub.files(repo_id)
    assert "report.md" not in files and "README.md" in files
    assert not any(str(folder.parent).encode() in content for content in files.values())

    inputs = tiny_inputs(model)
    torch.save(inputs, tmp_path / "in")
    run(
        [READER, "AutoModelForCausalLM", repo_id, tmp_path / "in", tmp_path / "out"],
        env=client(hub, tmp_path / "cache-vanilla"),
    )
    assert torch.equal(torch.load(tmp_path / "out"), output(model, inputs))

    code = (
        "import sys, torch, hf_polarize; from transformers import AutoModelForCausalLM as M;"
        "m = M.from_pretrained(sys.argv[1]); torch.save(m(**torch.load(sys.argv[2])).logits.detach(), sys.argv[3]);"
        "print(list(m.peft_config), m.polarization['provenance']['base_model'])"
    )
    printed = run(
        ["-c", code, repo_id, tmp_path / "in", tmp_path / "out2"], env=client(hub, tmp_path / "cache-plugin")
    )
    assert printed.strip() == "['surrogate'] someone/base"
    assert torch.equal(torch.load(tmp_path / "out2"), output(model, inputs))


def test_a_second_push_replaces_the_weights_of_the_first(hub, model, tmp_path):
    """transformers would prefer the old single file to the new shards."""
    for step, size in (("one", "5GB"), ("two", "40KB")):
        folder = save_polarized(model, tmp_path / step, max_shard_size=size)
        run(["-m", "hf_polarize.cli", "push", folder, "user/twice"], env=client(hub, tmp_path / "cache"))
    weights = {name for name in hub.files("user/twice") if name.startswith("model") and name.endswith(".safetensors")}
    assert weights == {path.name for path in folder.glob("model*.safetensors")} and len(weights) > 1


def test_the_card_tells_what_the_hub_and_a_reader_need(folder):
    text = str(model_card(inspect_checkpoint(folder), "user/tiny"))
    card = ModelCard(text)
    data = yaml.safe_load(text.split("---")[1])
    assert data["base_model"] == "someone/base" and data["base_model_relation"] == "quantized"
    assert data["quantized_by"] == "user" and data["library_name"] == "transformers"
    assert {"polarize", "bitsandbytes", "4-bit", "peft"} <= set(data["tags"])
    assert card.data.eval_results[0].metric_value == 7.4
    assert 'AutoModelForCausalLM.from_pretrained("user/tiny")' in text
    assert "| polarized | 2.0000 | 7.400 | 0.1000 | 55.0 % |" in text
    assert "merge_surrogates" in text and str(folder.parent) not in text


def test_the_card_of_a_model_without_record(tmp_path):
    model = tiny_model("bert")
    polarize(model, [tiny_inputs(model)])
    model.polarization = {}
    text = str(model_card(inspect_checkpoint(save_polarized(model, tmp_path)), "user/tiny"))
    data = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in data and data["pipeline_tag"] == "feature-extraction"
    assert 'AutoModel.from_pretrained("user/tiny")' in text and "None" not in text


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parent.parent.glob("model_cards/*.md")), ids=lambda path: path.stem
)
def test_the_cards_of_the_project_are_valid(path):
    card = ModelCard(path.read_text())
    assert card.data.base_model.count("/") == 1 and card.data.base_model_relation == "quantized"
    assert card.data.eval_results and "| polarized |" in card.text


def test_a_broken_checkpoint_or_name_is_refused_before_anything_is_sent(hub, folder, tmp_path):
    from hf_polarize.hub import push_folder

    with pytest.raises(ValueError, match='repo_id must be "user/name"; got "tiny"'):
        push_folder(folder, "tiny")
    with pytest.raises(FileNotFoundError, match="no model in"):
        push_folder(tmp_path, "user/nothing")
    assert "user/nothing" not in hub.repos

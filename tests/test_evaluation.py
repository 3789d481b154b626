"""Perplexity, divergence and the recovered gap against their definitions, in float64 on whole windows."""

import math

import pytest
import torch
from conftest import TEXT, VOCABULARY, tiny_inputs, tiny_model
from datasets import Dataset

from hf_polarize import backbone_only, polarize
from hf_polarize.data import line_batches, read_texts, token_windows
from hf_polarize.evaluation import (
    GapRecovered,
    Quality,
    evaluate_causal_lm,
    gap_recovered,
    model_outputs,
    output_distance,
    reference_states,
)
from hf_polarize.models import is_causal_lm
from hf_polarize.self_text import _Sample, self_windows


@pytest.fixture(scope="module", params=["llama-tied", "gpt2"])
def models(request):
    original = tiny_model(request.param)
    return original, polarize(tiny_model(request.param), [tiny_inputs(original)])


@torch.no_grad()
def by_definition(model, windows, original=None):
    logits = model(windows).logits[:, :-1].double()
    log_q = logits.log_softmax(-1)
    loss = -log_q.gather(-1, windows[:, 1:, None]).mean()
    if original is None:
        return float(loss), None
    log_p = original(windows).logits[:, :-1].double().log_softmax(-1)
    return float(loss), float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_loss_perplexity_and_kl_are_those_of_the_definition(models, monkeypatch):
    original, model = models
    windows = tiny_inputs(original, n=5, length=40, seed=4)["input_ids"]
    monkeypatch.setattr("hf_polarize.evaluation.CHUNK", 16)  # 39 predictions: two whole chunks and a rest
    reference = reference_states(original, windows)
    quality = evaluate_causal_lm(model, windows, reference)
    loss, kl = by_definition(model, windows, original)
    assert quality.loss == pytest.approx(loss, rel=1e-5)
    assert quality.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert quality.kl == pytest.approx(kl, rel=1e-3)
    assert len(quality.window_losses) == 5 and sum(quality.window_losses) / 5 == pytest.approx(loss, rel=1e-5)
    assert evaluate_causal_lm(original, windows, reference).kl == pytest.approx(0, abs=1e-9)
    assert evaluate_causal_lm(original, windows).kl is None


def test_a_model_with_more_behind_its_hidden_states_is_refused():
    model = tiny_model("llama-untied")
    windows = tiny_inputs(model, n=1)["input_ids"]
    evaluate_causal_lm(model, windows)
    forward = model.forward

    def scaled(*args, **kwargs):
        result = forward(*args, **kwargs)
        result.logits = result.logits * 3
        return result

    model.forward = scaled
    with pytest.raises(ValueError, match="use lm-eval"):
        evaluate_causal_lm(model, windows)


def test_gap_recovered_is_a_metric_of_evaluate():
    metric = GapRecovered()
    result = metric.compute(predictions=[3.2, 3.4], references=[3.0, 3.0], backbone=[4.0, 4.0])
    assert result["gap_recovered"] == pytest.approx(0.7)
    same = Quality(3.0, None, None, [3.0])
    assert gap_recovered(same, same, same) is None


def test_models_without_tokens_to_predict_are_compared_by_their_outputs():
    original = tiny_model("bert")
    inputs = [tiny_inputs(original, seed=seed) for seed in (5, 6)]
    reference = model_outputs(original, inputs)
    model = polarize(tiny_model("bert"), [tiny_inputs(original)])
    with backbone_only(model):
        bare = output_distance(reference, model_outputs(model, inputs))
    ours = output_distance(reference, model_outputs(model, inputs))
    assert 0 < ours.loss < bare.loss and ours.kl is None and ours.perplexity is None
    a, b = torch.cat(reference.values).double(), torch.cat(model_outputs(model, inputs).values).double()
    expected = 1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
    assert ours.loss == pytest.approx(float(expected), rel=1e-6)
    assert not is_causal_lm(original) and is_causal_lm(tiny_model("gpt2"))


LINES = ["The old cat counts 3 sheep.", "The new dog", "dog counts 7 stars. The old dog", "", "cat"]


def test_embeddings_of_sentences_are_those_of_each_alone(tokenizer):
    original, other = tiny_model("bert"), tiny_model("bert", seed=1)
    batches = line_batches(original, ["\n".join(LINES)], tokenizer, 512, 64)
    quality = output_distance(model_outputs(original, batches), model_outputs(other, batches))
    expected = []
    for line in filter(None, LINES):
        ids = tokenizer(line, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            p, q = (model(ids).last_hidden_state[0].mean(0) for model in (original, other))
        expected.append(1 - float(torch.cosine_similarity(p, q, dim=0)))
    assert sorted(quality.window_losses) == pytest.approx(sorted(expected), rel=1e-4)
    assert quality.loss == pytest.approx(sum(expected) / 4, rel=1e-4)


def test_each_line_is_a_sample_without_padding_and_no_more_than_asked_for(tokenizer):
    model = tiny_model("bert")

    def lines(**options):
        return line_batches(model, [*LINES, *TEXT], tokenizer, **{"window": 512, "batch_tokens": 40, **options})

    every = [line for text in [*LINES, *TEXT] for line in text.splitlines() if line]
    batches = lines()
    rows = [row for batch in batches for row in batch["input_ids"].tolist()]
    assert sorted(rows) == sorted(tokenizer(every)["input_ids"])
    assert all(batch["attention_mask"].all() for batch in batches)
    assert all(len(batch["input_ids"]) == 1 or batch["input_ids"].numel() <= 40 for batch in batches)
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    assert lengths != sorted(lengths)
    assert sum(len(batch["input_ids"]) for batch in lines(count=3)) == 3
    assert 30 < sum(batch["input_ids"].numel() for batch in lines(max_tokens=60)) <= 60
    assert max(batch["input_ids"].shape[1] for batch in lines(window=5)) == 5
    rows = Dataset.from_dict({"text": [f"cat {i} " * 400 for i in range(40)]})  # of each, 5 tokens count
    assert sum(b["input_ids"].numel() for b in line_batches(model, rows, tokenizer, 5, 40, max_tokens=100)) > 80
    with pytest.raises(ValueError, match="BertModel can't write them"):
        line_batches(model, "self", tokenizer, 512, 64)
    with pytest.raises(ValueError, match="max_tokens=1 holds no line of the data"):
        lines(max_tokens=1)
    for family in ("gpt2", "bert-mlm", "t5", "vit"):
        with pytest.raises(ValueError, match="lines are inputs of encoders"):
            line_batches(tiny_model(family), LINES, tokenizer, 512, 64)


def test_windows_are_cut_from_the_text_tokenized_once_and_spread_evenly(tokenizer):
    ids = tokenizer("\n\n".join(TEXT))["input_ids"]
    windows = token_windows(TEXT, tokenizer, 16)
    assert windows.tolist() == [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    chosen = token_windows(TEXT, tokenizer, 16, count=4)
    assert chosen.tolist() == [windows[i * len(windows) // 4].tolist() for i in range(4)]
    with pytest.raises(ValueError, match=r"the text has \d+ tokens, fewer than one window of 512"):
        token_windows(TEXT[:3], tokenizer, 512)


def test_what_the_model_writes_is_seeded_and_leaves_the_random_state_alone():
    model = tiny_model("llama-tied")
    torch.manual_seed(11)
    first = self_windows(model, window=24, count=5, seed=0, batch_size=2)
    state = torch.get_rng_state()
    torch.manual_seed(11)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (5, 24) and first.max() < VOCABULARY and len(set(first[:, 0].tolist())) > 1
    assert torch.equal(first, self_windows(model, window=24, count=5, seed=0, batch_size=2))
    assert not torch.equal(first, self_windows(model, window=24, count=5, seed=1, batch_size=2))
    with pytest.raises(ValueError, match="BertModel can't write its own calibration text"):
        self_windows(tiny_model("bert"), window=24, count=1, seed=0)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration can't write its own calibration text"):
        self_windows(tiny_model("t5"), window=24, count=1, seed=0)


def test_tokens_are_drawn_from_the_distribution_of_the_logits():
    logits = torch.tensor([2.0, -1.0, 0.5, -torch.inf, 1.0])
    drawn = _Sample(torch.Generator().manual_seed(0), 0)(torch.zeros(20000, 1), logits.expand(20000, -1))
    counts = (drawn == 0).float().mean(0)
    assert torch.equal((drawn == 0).sum(1), torch.ones(20000, dtype=torch.int64))
    # five standard errors of a share of 20,000
    torch.testing.assert_close(counts, logits.softmax(0), rtol=0, atol=5 * (0.25 / 20000) ** 0.5)
    assert counts[3] == 0


@pytest.mark.parametrize("form", ["list", "file", "dataset", "tokens", "self"])
def test_polarize_reads_every_kind_of_data(form, tokenizer, tmp_path):
    from datasets import Dataset

    (tmp_path / "text.txt").write_text("\n".join(TEXT))
    data = {
        "list": TEXT,
        "file": tmp_path / "text.txt",
        "dataset": Dataset.from_dict({"label": [1] * len(TEXT), "sentence": TEXT}),
        "tokens": Dataset.from_dict({"input_ids": tokenizer(TEXT)["input_ids"]}),
        "self": "self",
    }[form]
    model = polarize(tiny_model("llama-tied"), data, processor=tokenizer, window=32, max_tokens=256)
    calibration = model.polarization["provenance"]["calibration"]
    assert calibration["tokens"] == 256 and calibration["samples"] == 8
    assert str(tmp_path) not in str(model.polarization)


def test_polarize_takes_lines_as_samples(tokenizer):
    model = polarize(tiny_model("bert"), TEXT, processor=tokenizer, window=16, max_tokens=256, lines=True)
    calibration = model.polarization["provenance"]["calibration"]
    assert calibration["lines"] and 200 < calibration["tokens"] <= 256
    assert calibration["samples"] != calibration["tokens"] / 16
    with pytest.raises(ValueError, match="lines are inputs of encoders"):
        polarize(tiny_model("llama-tied"), TEXT, processor=tokenizer, window=16, max_tokens=256, lines=True)


@pytest.mark.parametrize("column", ["pixel_values", "image"])
def test_a_vision_model_is_calibrated_on_images(column):
    from datasets import Dataset, Features, Image
    from PIL import Image as Pillow
    from transformers import ViTImageProcessor

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (9, 40, 40, 3), dtype=torch.uint8, generator=generator)
    if column == "image":
        images = {"label": list(range(9)), "image": [Pillow.fromarray(one.numpy()) for one in pixels]}
        data = Dataset.from_dict(images).cast_column("image", Image())
        assert isinstance(data.features, Features)
        processor = ViTImageProcessor(size={"height": 32, "width": 32})
    else:
        data, processor = (
            Dataset.from_dict({"pixel_values": tiny_inputs(tiny_model("vit"), n=9)["pixel_values"]}),
            None,
        )
    model = polarize(tiny_model("vit"), data, processor=processor, window=1, max_tokens=5 * 17)
    assert model.polarization["provenance"]["calibration"]["samples"] == 5  # of 16 patches and one token each
    with pytest.raises(ValueError, match="column pixel_values, or image with an image processor"):
        polarize(tiny_model("vit"), TEXT)


def test_a_stream_is_read_as_far_as_it_is_needed(tokenizer):
    from datasets import Dataset, DatasetDict, IterableDataset

    read = []

    def rows():
        for number in range(10**9):
            read.append(number)
            yield {"text": TEXT[number % len(TEXT)]}

    stream = IterableDataset.from_generator(rows)
    polarize(tiny_model("llama-tied"), stream, processor=tokenizer, window=32, max_tokens=64)
    assert 10 < len(read) < 100
    splits = DatasetDict({"train": Dataset.from_dict({"text": TEXT})})
    with pytest.raises(ValueError, match=r"choose one of them: data\['train'\]"):
        polarize(tiny_model("llama-tied"), splits, processor=tokenizer)


def test_no_path_of_this_machine_is_taken_for_a_name(tmp_path):
    from hf_polarize.polarization import public_name

    assert public_name("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M" and public_name("gpt2") == "gpt2"
    for name in (str(tmp_path), str(tmp_path / "gone"), "./model", "../model", "", None):
        assert public_name(name) is None


def test_a_backbone_that_was_loaded_finds_its_original(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    from hf_polarize import PolarizeConfig
    from hf_polarize.surrogate import factors

    tiny_model("llama-tied").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=PolarizeConfig())
    polarize(model, TEXT, window=32, max_tokens=256)
    direct = polarize(tiny_model("llama-tied"), TEXT, processor=tokenizer, window=32, max_tokens=256)
    for (name, one), (_, other) in zip(factors(model).items(), factors(direct).items(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), name


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("nowhere.txt", FileNotFoundError, 'no text file "nowhere.txt"'),
        ([" ", ""], ValueError, "holds no text"),
        ({"train": ["a"]}, ValueError, "choose one of them"),
        (3, ValueError, "can't read text from int"),
    ],
)
def test_data_that_is_no_text_is_named(data, error, message):
    with pytest.raises(error, match=message):
        read_texts(data)


def test_polarize_refuses_before_any_work(tokenizer):
    model = tiny_model("llama-tied")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for arguments, message in (
        ({"data": TEXT[:1], "processor": tokenizer}, "fewer than one window"),
        ({"data": TEXT}, "needs a tokenizer"),
        ({"data": TEXT, "window": 0}, "at least one window"),
        ({"data": TEXT, "original": model}, "this one is an original"),
    ):
        with pytest.raises(ValueError, match=message):
            polarize(model, **arguments)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    polarize(model, [tiny_inputs(model)])
    with pytest.raises(ValueError, match=r"has adapters \['surrogate'\]"):
        polarize(model, TEXT)

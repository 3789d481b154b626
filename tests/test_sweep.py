"""Sweeps over chips, and runs on one, of a small model."""

import csv
import itertools
import json
from dataclasses import replace
from math import nan
from types import SimpleNamespace

import pytest
from conftest import TEXT, tiny_model
from safetensors.torch import load_file, save_file

from hf_polarize import CIMConfig
from hf_polarize.card import model_card
from hf_polarize.cim.energy_report import accuracy_against_energy, pareto_front
from hf_polarize.cim.presets import PRESETS
from hf_polarize.cim.sweep import setting_of, settings, summary
from hf_polarize.cli import main
from hf_polarize.inspection import inspect_checkpoint
from hf_polarize.recipe import Recipe, load_recipe


@pytest.fixture
def recipe(tokenizer, tmp_path):
    tiny_model("llama-tied").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "calibration.txt").write_text("\n".join(TEXT))
    (tmp_path / "evaluation.txt").write_text("\n".join(reversed(TEXT)))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""model: {tmp_path / "model"}
r: 4
cim: noisy
deflated: true
two_sided: true
allocation: sensitivity
calibration: {tmp_path / "calibration.txt"}
evaluation: {tmp_path / "evaluation.txt"}
max_tokens: 512
window: 32
evaluation_window: 32
evaluation_windows: 4
held_out: 2
sweep: [{{mismatch: [0.1, 0.3]}}, {{r: [2, 4]}}]
sweep_chips: 2
train_tokens: 512
train_batch_size: 2
output_dir: {tmp_path / "out"}
"""
    )
    return str(path)


def test_a_sweep_and_its_resumption(recipe, tmp_path, capsys):
    assert main(["cim", "sweep", recipe]) == 0
    folder = tmp_path / "out"
    record = json.loads((folder / "sweep.json").read_text())
    assert len(record["results"]) == 5 * 7 * 2  # settings, methods, chips
    assert len((folder / "sweep.csv").read_text().splitlines()) == 1 + 5 * 7 * 2
    assert (folder / "loss_against_mismatch.png").stat().st_size > 5000
    assert "| mismatch=0.3 | deflated | 2 |" in (folder / "sweep.md").read_text()
    with (folder / "summary.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert {"method", "mismatch", "r", "chips", "mean", "std", "worst", "kl", "recovered", "recovered_worst"} == set(
        table[0]
    )
    (row,) = (row for row in table if row["mismatch"] == "0.3" and row["method"] == "deflated")
    (same,) = (row for row in summary(record) if row["label"] == "mismatch=0.3" and row["method"] == "deflated")
    assert float(row["worst"]) == same["worst"] and row["r"] == ""

    trained = folder / "trained"
    assert len(list(trained.iterdir())) == 4  # rank 4 is the recipe's own
    written = {file: file.stat().st_mtime_ns for file in trained.rglob("*.safetensors")}

    kept = record["results"][:15]
    (folder / "sweep.json").write_text(json.dumps({**record, "results": kept}))
    assert main(["cim", "sweep", recipe]) == 0
    again = json.loads((folder / "sweep.json").read_text())["results"]
    assert again[:15] == kept
    for before, after in zip(record["results"], again, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)  # the same chips

    assert {file: file.stat().st_mtime_ns for file in trained.rglob("*.safetensors")} == written

    for name in ("sweep.md", "loss_against_r.png"):
        (folder / name).unlink()
    assert main(["cim", "sweep", recipe, "sweep_methods=[backbone alone, deflated]"]) == 0
    assert "loss_against_r.png" in (folder / "sweep.md").read_text() and (folder / "loss_against_r.png").is_file()

    few = ["sweep_methods=[backbone alone]", f"output_dir={tmp_path / 'few'}", "sweep=[]"]
    assert main(["cim", "sweep", recipe, *few]) == 0
    assert main(["cim", "sweep", recipe, *few, 'sweep_methods=[deflated, "deflated, trained"]']) == 1
    assert "was begun without training" in capsys.readouterr().err

    assert main(["cim", "sweep", recipe, "cim=nvm"]) == 1
    assert "is of a recipe with other cim" in capsys.readouterr().err

    rows = {(row["label"], row["method"]): row for row in summary(record)}
    for label in ("the recipe's own", "mismatch=0.3"):
        for better, worse in itertools.pairwise(("deflated", "closed form", "backbone alone")):
            assert rows[label, better]["kl"] < rows[label, worse]["kl"]
        assert rows[label, "deflated, trained"]["kl"] < rows[label, "closed form"]["kl"]
        assert rows[label, "deflated, trained, per chip"]["kl"] < rows[label, "deflated, trained"]["kl"]
        assert rows[label, "deflated, written per chip"]["kl"] < rows[label, "deflated, per chip"]["kl"]
    assert rows["mismatch=0.1", "backbone alone"]["kl"] < rows["mismatch=0.3", "backbone alone"]["kl"]
    for rank, method in ((2, "backbone alone"), (4, "deflated"), (4, "deflated, written per chip")):
        assert rows[f"r={rank}", method]["mean"] == rows["the recipe's own", method]["mean"]  # the same, measured once

    assert main(["energy", recipe]) == 0
    assert (folder / "pareto.png").is_file()

    def bill(rank, deflated):
        return SimpleNamespace(total=(rank, deflated))

    points = accuracy_against_energy(record, load_recipe(recipe), bill)
    assert [energy for _, energy, *_ in points["backbone alone"]] == [(0, False)]
    assert [energy for _, energy, *_ in points["closed form"]] == [(2, False), (4, False)]
    assert [energy for _, energy, *_ in points["deflated, trained"]] == [(2, True), (4, True)]
    assert accuracy_against_energy(record, load_recipe(recipe, ["cim=nvm"]), bill) == {}


def test_a_pareto_front_holds_what_nothing_beats():
    assert pareto_front([(3, 1.0), (1, 2.0), (2, 2.5), (2, 1.5), (4, 1.0)]) == [(1, 2.0), (2, 1.5), (3, 1.0)]


@pytest.mark.parametrize(
    "override, message",
    [
        ("cim=null", "a sweep needs a chip to start from"),
        ("cim=nosy", "no preset 'nosy'"),
        ("sweep=[{v_dd: [0.7]}]", "v_dd acts on outputs through read_noise, which this chip sets to 0.02"),
        ("sweep=[{mismatc: [0.7]}]", "the nearest is 'mismatch'"),
        ("sweep=[{adc_noise: [0.5]}]", "adc_noise acts on outputs through read_noise"),
        ("sweep=[{chip_seed: [1, 2]}]", "every setting is measured on the same chips"),
        ("sweep=[{r: [0, 8]}]", "r must be"),
        ("sweep=[{r: [2.5]}]", "r must be"),
        ("sweep=[{adc_bits: [99]}]", "adc_bits must be an integer in 1..16; got 99"),
        ("train=[surrogate, scales]", "block scales are part of the chip that cim names"),
        ("sweep_methods=[best]", "sweep_methods takes any of 'backbone alone'"),
    ],
)
def test_what_can_not_be_swept_is_said_before_any_work(recipe, override, message, capsys):
    assert main(["cim", "sweep", recipe, override]) == 1
    assert message in capsys.readouterr().err


def test_settings_in_any_order_and_of_any_kind(recipe, tmp_path):
    """JSON sorts its keys: a resumption knows its settings again. Not all that can be swept is a number."""
    grids = "sweep=[{rows: [32, 64], adc_bits: [8, null]}, {layers: [[mlp], [attn]]}]"
    swept = [grids, "sweep_methods=[backbone alone]"]
    assert main(["cim", "sweep", recipe, *swept]) == 0
    folder = tmp_path / "out"
    before = (folder / "sweep.json").read_text()
    pictures = [folder / f"loss_against_{name}.png" for name in ("rows_adc_bits", "layers")]
    for picture in pictures:
        picture.unlink()
    assert main(["cim", "sweep", recipe, *swept]) == 0
    assert (folder / "sweep.json").read_text() == before and all(picture.is_file() for picture in pictures)


def test_a_run_on_a_chip(recipe, tmp_path, capsys):
    """The backbone alone is measured on the chip as well, and training is for any chip."""
    assert main(["run", recipe, "cim=null"]) == 1
    assert "deflated=True takes what a surrogate sees" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["run", recipe, "train=[surrogate]", "train_tokens=256", "train_batch_size=2"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert main(["run", recipe, "cim=null", "deflated=false", f"output_dir={tmp_path / 'digital'}"]) == 0
    digital = json.loads((tmp_path / "digital" / "metrics.json").read_text())
    assert metrics["backbone"]["kl"] > digital["backbone"]["kl"]
    assert metrics["closed_form"]["kl"] < metrics["backbone"]["kl"]
    assert main(["info", str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    info = inspect_checkpoint(tmp_path / "out")
    assert CIMConfig.from_dict(info.chip) == CIMConfig.preset("noisy", mapping="quiet")
    assert f"CIMConfig.from_dict({info.chip})" in shown and "runs deflated" in shown
    card = str(model_card(info, "someone/model"))
    assert f"hf_polarize.CIMConfig.from_dict({info.chip})" in card

    removed = load_file(tmp_path / "out" / "deflation.safetensors")
    r = sum(tensor.nbytes for tensor in removed.values())
    (tmp_path / "out" / "deflation.safetensors").unlink()
    assert inspect_checkpoint(tmp_path / "out").bytes == info.bytes - r
    first = next(iter(removed))
    for tensor, message in (
        (removed[first].T, "no surrogate stands there that it fits"),
        (removed[first] * nan, "NaN"),
    ):
        save_file({**removed, first: tensor.contiguous()}, tmp_path / "out" / "deflation.safetensors")
        with pytest.raises(ValueError, match=message):
            inspect_checkpoint(tmp_path / "out")


def test_the_chip_of_a_recipe(recipe):
    chip = load_recipe(recipe, ["cim={preset: noisy, mismatch: 0.3}"]).chip()
    assert (chip.mismatch, chip.adc_bits) == (0.3, 10)
    assert load_recipe(recipe, ["cim=null", "deflated=false"]).chip() is None


def test_every_setting_of_the_default_sweep_can_be(recipe):
    """Whatever the preset fixes: a swept supply acts through noise that follows from it."""
    for name in PRESETS:
        default = replace(load_recipe(recipe, [f"cim={name}"]), sweep=Recipe(model="demo:smollm2").sweep)
        chips = [setting_of(default, setting)[0] for setting in settings(default)]
        noise = {chip.v_dd: chip.reading_noise for chip in chips if chip.read_noise is None and chip.v_dd < 0.8}
        assert noise[0.6] > noise[0.7]

"""The rivals against their definitions, and the command on a small model."""

import json

import pytest
import torch
from conftest import TEXT, tiny_model
from torch import nn

from hf_polarize import PolarizeConfig
from hf_polarize.backbone import quantize_linear
from hf_polarize.calibration import Statistics
from hf_polarize.cli import main
from hf_polarize.comparison import BACKBONE, CLOSED, METHODS, TRAINED, Problem
from hf_polarize.recipe import COMPARED


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    linear = nn.Linear(128, 96, bias=False)
    x = torch.randn(4000, 128) @ torch.randn(128, 128) * torch.logspace(-1, 1, 128)
    config = PolarizeConfig("nf4")
    config.resolve(torch.float32)
    return Problem(linear, config, Statistics(x.T @ x / len(x), None, x.abs().mean(0))), x.double()


def product(problem, method, rank=8):
    """Q + B A, float64."""
    layer, solution = METHODS[method](problem, rank)
    return layer.dequantized().double() + solution.b.double() @ solution.a.double()


def rounded(problem):
    return quantize_linear(problem.module, problem.config).dequantized().double()


def test_all_of_the_compared_methods_are_there():
    assert [BACKBONE, *METHODS, CLOSED, TRAINED] == list(COMPARED)


@pytest.mark.parametrize("method", ["SVD (LoRC)", "LQER", "QERA-approx", "QERA-exact = EoRA"])
def test_what_is_added_has_the_rank_and_the_backbone_is_plain(problem, method):
    problem, _ = problem
    layer, solution = METHODS[method](problem, 5)
    assert torch.equal(layer.dequantized().double(), rounded(problem))
    values = torch.linalg.svdvals(solution.b.double() @ solution.a.double())
    assert len(solution.a) == 5 and values[4] > 1e-4 * values[0]


def test_svd_is_the_best_path_for_the_weight_and_exact_the_best_for_the_output(problem):
    problem, x = problem
    weights = {method: float((product(problem, method) - problem.weight).norm()) for method in METHODS}
    added = {m: w for m, w in weights.items() if m != "LoftQ (our implementation)"}
    assert min(added, key=added.get) == "SVD (LoRC)"
    outputs = {m: float((x @ (product(problem, m) - problem.weight).T).norm()) for m in METHODS}
    assert outputs["QERA-exact = EoRA"] < outputs["QERA-approx"] < outputs["SVD (LoRC)"]
    assert outputs["SVD (LoRC)"] < float((x @ (rounded(problem) - problem.weight).T).norm())
    assert outputs["LQER"] < outputs["SVD (LoRC)"]


def test_loftq_brings_the_weight_nearer_than_one_svd(problem):
    problem, _ = problem
    distance = {method: float((product(problem, method) - problem.weight).norm()) for method in METHODS}
    assert distance["LoftQ (our implementation)"] < distance["SVD (LoRC)"]


def test_the_command_measures_all_and_goes_on_where_it_was(tokenizer, tmp_path, capsys):
    model = tiny_model("llama-tied")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, part in (("calibration", TEXT[::2]), ("evaluation", TEXT[1::2])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tmp_path}/model\ncalibration: {tmp_path}/calibration.txt\nevaluation: {tmp_path}/evaluation.txt\n"
        f"window: 32\nmax_tokens: 512\ntrain_tokens: 1024\nheld_out: 2\ntrain_batch_size: 2\nevaluation_window: 32\n"
        f"output_dir: {tmp_path}/out\nr: 4\ncompare_ranks: [2, 4]\ncompare_tokens: [256]\n"
    )
    assert main(["compare", str(recipe)]) == 0
    out = tmp_path / "out"
    text = (out / "comparison.md").read_text()
    assert all(f"| {method} |" in text for method in ("original", *COMPARED))
    for name in ("loss_against_rank.png", "loss_against_tokens.png"):
        assert name in text and (out / name).read_bytes().startswith(b"\x89PNG")
    record = json.loads((out / "comparison.json").read_text())
    assert record["original"]["kl"] == pytest.approx(0, abs=1e-9)
    ours = [r for r in record["results"] if r["method"] == "ours, closed form"]
    assert {(r["rank"], r["tokens"]) for r in ours} == {(2, 512), (4, 512), (4, 256)}

    # one result lost: the same command measures that one again and no other
    kept = [r for r in record["results"] if r["method"] != "LQER"]
    (out / "comparison.json").write_text(json.dumps({**record, "results": kept}))
    capsys.readouterr()
    assert main(["compare", str(recipe)]) == 0
    assert "QERA-approx, rank" not in capsys.readouterr().err
    assert (out / "comparison.md").read_text() == text
    assert main(["compare", str(recipe), "seed=3"]) == 1
    assert "is of a recipe with other seed" in capsys.readouterr().err
    assert main(["compare", str(recipe), "compare_methods=[GPTQ]"]) == 1
    assert "unknown methods ['GPTQ']" in capsys.readouterr().err

"""Recipes: defaults < file < command line, errors that help, and the ones that come with the project."""

import dataclasses
from pathlib import Path

import pytest
import transformers
import yaml

from hf_polarize.recipe import Recipe, describe_keys, load_recipe
from hf_polarize.sources import load_data

RECIPES = sorted(Path(__file__).parent.parent.glob("recipes/*.yaml"))


def write(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults_then_file_then_command_line(tmp_path):
    path = write(tmp_path, "model: some/model\nr: 4\nwindow: 128\n")
    recipe = load_recipe(path, ["r=16", "activations=int8", "overwrite=true", "rank_pattern={down_proj: 2}"])
    assert (recipe.backbone, recipe.window, recipe.r) == ("nf4", 128, 16)
    assert recipe.activations == "int8" and recipe.overwrite is True
    assert recipe.surrogate_config().rank_pattern == {"down_proj": 2}
    recipe = load_recipe(path, ["learning_rate=5e-4", "layer_weight=1"])  # to YAML a string and an integer
    assert (recipe.learning_rate, recipe.layer_weight) == (5e-4, 1.0)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("model: a/b\nbackbon: int8\n", [], "unknown recipe key 'backbon'; the nearest known one is 'backbone'"),
        ("model: a/b\n", ["max_token=3"], "unknown recipe key 'max_token'; the nearest known one is 'max_tokens'"),
        ("model: a/b\n", ["backbone=nf3"], "backbone must be one of 'nf4', 'int8'; got 'nf3'"),
        ("model: a/b\n", ["r=0"], "r must be an integer of at least 1; got 0"),
        ("model: a/b\n", ["learning_rate=fast"], "recipe key learning_rate must be float; got 'fast'"),
        ("model: a/b\n", ["r=eight"], "recipe key r must be int; got 'eight'"),
        ("model: a/b\n", ["r=true"], "recipe key r must be int; got True"),
        ("model: a/b\n", ["modules_to_not_convert=lm_head"], "must be list\\[str\\] | null; got 'lm_head'"),
        ("model: a/b\n", ["model_class=AutoModelForTTS"], "model_class must be one of AutoModelForCausalLM"),
        ("model: a/b\n", ["dtype=int4"], "dtype must be one of float32"),
        ("model: a/b\n", ["window=4096", "max_tokens=512"], "max_tokens=512 holds no window of 4096 tokens"),
        ("model: a/b\n", ["batch_size=0"], "batch_size must be at least 1; got 0"),
        ("model: a/b\n", ["evaluation=self"], 'evaluation can\'t be "self"'),
        ("model: a/b\n", ["calibration=python-docs"], "hold out other data"),
        ("model: a/b\n", ["calibration=[self,python-docs]"], "hold out other data"),
        ("model: a/b\n", ["calibration=[self,self]"], "names nothing, or something twice"),
        ("model: a/b\n", ["calibration=[]"], "names nothing, or something twice"),
        ("model: a/b\n", ["calibration=[self,'']"], "names nothing, or something twice"),
        ("model: a/b\n", ["calibration=demo:new"], "the demo data is demo:news; got 'demo:new'"),
        ("model: a/b\n", ["calibration=[a.txt,self]", "max_tokens=600"], "no window of 384 tokens of each source"),
        ("model: a/b\n", ["calibration=[a.txt,b.txt]", "lines=true", "model_class=AutoModel"], "from one source"),
        ("model: a/b\n", ["calibration=[1]"], "calibration must be str | list\\[str\\]; got \\[1\\]"),
        ("model: a/b\n", ["push_to=me"], "push_to must be user/name"),
        ("model: a/b\n", ["r"], '"r" is not of the form key=value'),
        ("r: 8\n", [], "recipe key model is missing"),
        ("model: demo:gpt5\n", [], "model must be one of demo:smollm2, demo:minilm"),
        ("- a\n- b\n", [], "is not a recipe"),
        ("model: [\n", [], "is not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_with_what_to_do(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, text), overrides)


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_every_key_is_documented():
    text = describe_keys()
    for field in dataclasses.fields(Recipe):
        assert field.metadata["help"] and f"  {field.name}: " in text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_project_resolve_without_network(path):
    recipe = load_recipe(path)
    assert hasattr(transformers, recipe.model_class)
    assert recipe.polarize_config().backbone == recipe.backbone
    assert recipe.surrogate_config().r == recipe.r
    source, _, base_model = recipe.source()
    assert source and base_model.count("/") == 1
    for name in (*recipe.sources, recipe.evaluation):
        assert name in ("self", "python-docs", "demo:news") or len(name.split(":")) in (3, 4)
    written = yaml.safe_load(path.read_text())
    assert all(getattr(recipe, key) == value for key, value in written.items())


def test_all_families_have_a_recipe():
    assert {path.stem for path in RECIPES} >= {"quickstart", "smollm2", "llama-3.2-1b", "qwen3-0.6b", "bert", "vit"}


def test_data_names(tmp_path):
    assert load_data("self") == "self"
    assert len("".join(load_data("python-docs"))) > 300_000
    assert len(load_data("demo:news")) == 300 and len("".join(load_data("demo:news"))) > 300_000
    with pytest.raises(FileNotFoundError, match="no text file"):
        load_data(str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="names no split"):
        load_data("hub:some/data")

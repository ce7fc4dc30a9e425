"""A run whose γ is found from the data: the number of the audit, written down, and the same after a kill."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from killed import KillAt, Killed
from one_base import train
from safetensors.torch import load_file

from pe_dpo.audit.audit import audit
from pe_dpo.errors import RecipeError, RunFolderError, UsageError
from pe_dpo.evaluation.evaluate import evaluate
from pe_dpo.recipe import load_recipe, recipe_from_yaml, recipe_to_yaml
from pe_dpo.runs.files import RUN_FILE, read_object
from pe_dpo.runs.writing import RunWriter

WAYS = ["auto", "balance:0.8", "scale:1"]
SETTINGS = ("loss.gamma=scale:1", "train.max_steps=2", "train.save_every=1")


def written(folder):
    return recipe_from_yaml((folder / "recipe.yaml").read_text(), "recipe.yaml")


def same_adapters(*folders):
    first, *others = (load_file(Path(folder) / "adapter_model.safetensors") for folder in folders)
    return all(torch.equal(other[name], first[name]) for other in others for name in first)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return f"reference.store={tmp_path_factory.mktemp('store') / 'store.sqlite'}"


@pytest.fixture(scope="module")
def mixed(tiny_pairs, tmp_path_factory):
    """The tiny pairs with the labels of every third one swapped: as they are, the tiny base ranks all of them right."""
    folder = tmp_path_factory.mktemp("mixed")
    for name in ("train.jsonl", "test.jsonl"):
        rows = [json.loads(line) for line in (tiny_pairs / name).read_text().splitlines()]
        for row in rows[::3]:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train={folder}"


@pytest.fixture(scope="module")
def found(tiny_recipe, store, tmp_path_factory):
    """A run of two steps that found its γ; not to be changed."""
    return train(tiny_recipe(tmp_path_factory.mktemp("found") / "run", *SETTINGS, store)).folder


@pytest.fixture(scope="module")
def _killed(tiny_recipe, store, tmp_path_factory):
    recipe = tiny_recipe(tmp_path_factory.mktemp("killed") / "run", *SETTINGS, store)
    with pytest.raises(Killed):
        train(recipe, callbacks=[KillAt(1)])
    return recipe.output


@pytest.fixture
def killed(_killed, make_recipe, store):
    """The same run, killed after its first step, and its recipe; a copy."""
    recipe = make_recipe(*SETTINGS, store)
    return Path(shutil.copytree(_killed, recipe.output)), recipe


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_run_takes_the_gamma_that_the_audit_tells(make_recipe, store, mixed, way, logged: list[str]):
    recipe = make_recipe(store, mixed, f"loss.gamma={way}", "train.max_steps=1")
    gamma = audit(recipe).recipe.gamma
    lines = logged
    folder = train(recipe).folder
    record = read_object(folder / RUN_FILE)
    assert record["gamma_calibration"]["asked"] == way
    assert record["gamma_calibration"]["gamma"] == pytest.approx(gamma, rel=1e-9, abs=1e-12)
    assert written(folder).loss.gamma == record["gamma_calibration"]["gamma"]
    assert record["loss"]["kappa"] == pytest.approx(gamma / 0.1, rel=1e-9, abs=1e-12)
    assert any(line.startswith(f"gamma {way}: ") for line in lines)


@pytest.mark.slow
def test_the_run_is_that_of_the_number(make_recipe, store, found):
    gamma = written(found).loss.gamma
    given = train(make_recipe(*SETTINGS, store, f"loss.gamma={gamma!r}")).folder
    assert gamma > 0
    assert same_adapters(found, given)
    assert "gamma_calibration" not in read_object(given / RUN_FILE)
    assert read_object(found / RUN_FILE)["after"] == read_object(given / RUN_FILE)["after"]


@pytest.mark.slow
def test_a_finished_run_is_evaluated_with_its_number(found):
    assert evaluate(found).metrics["loss"] == pytest.approx(read_object(found / RUN_FILE)["after"]["loss"], rel=1e-6)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_gamma_that_it_found(killed, found, monkeypatch):
    folder, recipe = killed
    gamma = read_object(folder / RUN_FILE)["gamma_calibration"]["gamma"]
    from pe_dpo.training import gamma as module

    def refuse(*arguments, **keywords):
        raise AssertionError("γ was looked for again")

    monkeypatch.setattr(module, "calibrate_loss", refuse)
    train(recipe, resume=True)
    assert written(folder).loss.gamma == gamma
    assert same_adapters(found, folder)


@pytest.mark.slow
def test_a_run_resumed_from_its_own_recipe_file_goes_on(killed):
    folder, _ = killed
    assert train(load_recipe(folder / "recipe.yaml", [f"output={folder}"]), resume=True).steps == 2


@pytest.mark.slow
def test_a_kill_between_the_record_and_the_recipe_is_repaired(killed):
    folder, recipe = killed
    (folder / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    assert written(folder).loss.is_calibrated
    train(recipe, resume=True)
    assert written(folder).loss.gamma == read_object(folder / RUN_FILE)["gamma_calibration"]["gamma"]


@pytest.mark.slow
def test_a_kill_before_anything_was_found_begins_anew(make_recipe, store):
    recipe = make_recipe(store, "loss.gamma=scale:1", "train.max_steps=1")
    folder = Path(recipe.output)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    RunWriter(folder).update(status="starting")
    assert train(recipe, resume=True).steps == 1


@pytest.mark.slow
@pytest.mark.usefixtures("killed")
def test_a_run_that_found_its_gamma_otherwise_is_another_run(make_recipe, store):
    for other in ("auto", "scale:2", "1x"):
        with pytest.raises(RunFolderError, match=r"loss\.gamma: "):
            train(make_recipe(*SETTINGS, store, f"loss.gamma={other}"), resume=True)


def test_a_share_that_cannot_be_stops_the_run_before_its_first_step(make_recipe, store):
    with pytest.raises(UsageError, match=r"loss\.gamma: balance:0\.01: no gamma gives this share"):
        train(make_recipe(store, "loss.gamma=balance:0.01"))


def test_a_gamma_that_contradicts_the_recipe_stops_the_run(make_recipe, store, monkeypatch):
    """A reference that prefers the rejected answers has γ = 0, and a floor means nothing then."""
    from pe_dpo.audit import calibration

    monkeypatch.setattr(calibration, "preferences", lambda reference, reduce: -1.0 - torch.arange(24).double().numpy())
    with pytest.raises(RecipeError, match=r"loss\.gamma: auto came to 0, which cannot be used: .*reference_floor"):
        train(make_recipe(store, "loss.gamma=auto", "loss.reference_floor=0"))


@pytest.mark.slow
def test_without_a_store_it_is_found_as_well(make_recipe, found):
    step = train(make_recipe("loss.gamma=scale:1", "train.max_steps=1", "reference.policy=step")).folder
    assert written(step).loss.gamma == pytest.approx(written(found).loss.gamma, rel=1e-9)


@pytest.mark.slow
def test_two_processes_agree_on_one_gamma(make_recipe, tmp_path, train_on_two):
    settings = ("loss.gamma=scale:1", "train.max_steps=2", f"reference.store={tmp_path / 'two.sqlite'}")
    alone = train(make_recipe(*settings, output="alone")).folder
    together = train_on_two(make_recipe(*settings, output="together"))
    assert written(together).loss.gamma == pytest.approx(written(alone).loss.gamma, rel=1e-6)
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (alone, together))
    assert all(torch.allclose(left[name], right[name], rtol=1e-3, atol=1e-6) for name in left)

"""train.seeds: each source of chance has a seed of its own, and train.seed where it has none, to the bit."""

from functools import cache

import pytest
import torch
from one_base import train

from pe_dpo.errors import RecipeError, RunFolderError, UsageError
from pe_dpo.model.provenance import adapter_fingerprints
from pe_dpo.runs.overrides import override_keys
from pe_dpo.training.mixing import Mixing

SHORT = ("train.max_steps=1", "mixout.p=0.5")


@pytest.fixture(scope="module")
def drawn(tiny_recipe, tmp_path_factory):
    """What is drawn of a run before its first step: A of the adapter; the pairs of the first epoch; dropout's noise, mixout."""
    from pe_dpo.training.preparation import prepare_run
    from pe_dpo.training.train import build_trainer

    @cache
    def draw(*settings):
        recipe = tiny_recipe(tmp_path_factory.mktemp("seeds") / "run", "mixout.p=0.5", *settings)
        trainer = build_trainer(recipe, prepare_run(recipe))
        noise = tuple(torch.rand(4).tolist())
        matrices = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if "lora_A" in name}
        (mixing,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, Mixing))
        adapter = hash(torch.cat([matrices[name].flatten() for name in sorted(matrices)]).numpy().tobytes())
        return {"adapter": adapter, "order": list(trainer.optimizer_batches()), "masks": (noise, mixing.mixout.seed)}

    return draw


@pytest.mark.slow
@pytest.mark.parametrize("what", ["adapter", "order", "masks"])
def test_a_seed_of_its_own_turns_one_source_of_chance_alone(drawn, what):
    """What is turned is what train.seed 5 draws, and the rest what train.seed 0 draws."""
    none, five = drawn(), drawn("train.seed=5")
    assert all(five[one] != none[one] for one in none)
    assert drawn(f"train.seeds.{what}=5") == {**none, what: five[what]}


@pytest.mark.slow
def test_a_run_whose_seeds_are_all_apart_is_that_of_the_seed_that_they_are(make_recipe, monkeypatch):
    monkeypatch.setattr(Mixing, "on_train_end", lambda *_, **__: None)  # it measures the noise of p
    apart = ("train.seed=9", "train.seeds.order=0", "train.seeds.adapter=0", "train.seeds.masks=0")
    folders = [train(make_recipe(*SHORT, *settings, output=name)).folder for name, settings in (("a", ()), ("b", apart))]
    first, second = (adapter_fingerprints(folder)["adapter_model.safetensors"] for folder in folders)
    assert first == second
    for key in ("order", "adapter", "masks", "data"):
        with pytest.raises(RunFolderError, match=rf"train\.seeds\.{key}: None → 1(.|\n)*cannot change"):
            train(make_recipe(*SHORT, f"train.seeds.{key}=1", output="a"), resume=True)
    with pytest.raises(UsageError, match=r"train\.seeds\.masks: cannot change"):
        override_keys(["train.seeds.masks"])


def test_a_seed_that_is_none_is_refused_with_its_place(make_recipe):
    with pytest.raises(RecipeError, match=r"train\.seeds\.masks: found -1"):
        make_recipe("train.seeds.masks=-1")
    with pytest.raises(RecipeError, match=r"train\.seeds\.mask: unknown key; did you mean train\.seeds\.masks\?"):
        make_recipe("train.seeds.mask=1")

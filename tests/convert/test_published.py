"""Published configurations of every tool: converted, trained two steps on the embedded world, and held against TRL's losses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pe_dpo.convert.convert import Conversion, convert
from pe_dpo.quickstart.demo import quickstart_recipe
from pe_dpo.recipe import recipe_from_yaml

CONFIGS = Path(__file__).parent / "configs"


class Expected(NamedTuple):
    """What a published file comes to, worked out by hand."""

    loss: dict[str, Any]
    rate: float
    pairs: int
    alpha: float
    is_same: bool = True


PUBLISHED = {
    "zephyr-7b-dpo-qlora.yaml": Expected({"preset": "dpo", "beta": 0.01}, 5e-6, 16, 128),
    "llama-3-8b-instruct-simpo.yaml": Expected({"preset": "simpo", "beta": 2.5, "margin": 1.375}, 1e-6, 32, 32, False),
    "axolotl-instruct-dpo-lora-8b.yml": Expected({"preset": "dpo", "beta": 0.1}, 2e-4, 8, 16),
    "axolotl-mistral-qlora-orpo.yml": Expected({"preset": "dpo"}, 2e-4, 8, 16, False),
    "llama3_lora_dpo.yaml": Expected({"preset": "dpo", "beta": 0.1}, 5e-6, 8, 16),
    "llama3_lora_simpo.yaml": Expected({"preset": "simpo", "beta": 2.0, "margin": 0.5}, 5e-6, 8, 16),
    "8B_lora_dpo_single_device.yaml": Expected({"preset": "dpo", "beta": 0.1}, 5e-4, 32, 16),
    "swift-dpo-lora.sh": Expected({"preset": "dpo", "beta": 0.1, "sft_weight": 0.1}, 1e-4, 16, 32),
    "swift-cpo.sh": Expected({"preset": "cpo", "beta": 0.1, "sft_weight": 1.0}, 1e-4, 16, 32),
    "trl-dpo-lora.sh": Expected({"preset": "dpo", "beta": 0.1}, 5e-6, 16, 16),
    "unsloth-zephyr-dpo.yaml": Expected({"preset": "dpo", "beta": 0.1}, 5e-6, 8, 64),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_becomes_a_recipe_of_its_numbers(name: str) -> None:
    found, expected = convert(CONFIGS / name), PUBLISHED[name]
    loss, train = found.recipe.loss, found.recipe.train
    assert {key: getattr(loss, key) for key in expected.loss} == pytest.approx(expected.loss)
    assert (train.learning_rate, train.pairs_per_step) == (expected.rate, expected.pairs)
    assert found.recipe.adapter.alpha == expected.alpha
    assert found.is_another_objective == (not expected.is_same)
    assert found.unknown == []
    assert recipe_from_yaml(found.text, "again", default_output=found.recipe.output) == found.recipe


def test_every_published_file_is_tested() -> None:
    assert {path.name for path in CONFIGS.iterdir()} - {"dataset_info.json"} == set(PUBLISHED)


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request) -> Iterator[Conversion]:
    yield convert(CONFIGS / request.param)


@pytest.fixture(scope="module")
def embedded():
    """The embedded base, loaded once, 40 of its pairs, and the sections of a recipe that name them."""
    from pe_dpo.experiments.point import share

    recipe = quickstart_recipe(["model.quantize=none", "data.limit=40", "data.eval=0.1"], runs=Path("nowhere"))
    return {"model": recipe.model, "data": recipe.data}, share(recipe)


@pytest.mark.slow
def test_a_converted_recipe_trains(published: Conversion, embedded, tmp_path: Path) -> None:
    """Loss, adapter, optimizer and schedule are its own; base, data and sizes those of the embedded world."""
    from pe_dpo.training.train import train

    sections, shared = embedded
    sizes = {"max_steps": 2, "pairs_per_step": 8, "report_to": [], "eval_every": 2, "save_every": 2}
    if published.recipe.train.optimizer not in ("adamw_torch", "adamw_torch_fused"):
        sizes["optimizer"] = "adamw_torch"  # bitsandbytes' own need a GPU
    changes = sections | {"train": published.recipe.train.model_copy(update=sizes), "output": str(tmp_path / "run")}
    result = train(published.recipe.model_copy(update=changes), shared=shared)
    assert result.steps == 2
    assert result.after["loss"] > 0


@pytest.fixture(scope="module")
def proofs() -> dict[str, Any]:
    """Proofs so far, by their loss."""
    return {}


@pytest.mark.slow
@pytest.mark.peer
def test_a_converted_loss_is_trls_where_trl_has_it(published: Conversion, proofs: dict[str, Any]) -> None:
    """One proof of each loss; files that come to the same loss share it."""
    pytest.importorskip("trl", reason="TRL is not installed; it comes with the peer extra")
    from pe_dpo.convert.proof import prove

    key = repr(published.loss and (published.recipe.loss, published.loss.names, published.loss.factor))
    proof = proofs.setdefault(key, None) or prove(published, count=3)
    proofs[key] = proof
    if published.loss is None:
        assert "no preset is that loss" in proof.trainer
        return
    assert proof.holds, proof
    assert proof.loss < 1e-5
    assert proof.gradient < 2e-5
    assert (proof.batch_gradient < 2e-5) == (published.recipe.loss.sft_weight == 0)  # a mean over tokens there

"""A trainer over the tiny world, as `train` builds it."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import one_base
import pytest
import warm_process


@pytest.fixture
def make_trainer(make_recipe: Callable) -> Callable[..., Any]:
    """A PairTrainer with its adapter's B set to noise (so that policy ≠ reference), unless `fresh`.

    What an earlier one found out of base and pairs is known, unless these are others or it is to be found out `anew`.
    """

    def make(*overrides: str, fresh: bool = False, anew: bool = False) -> Any:
        import torch

        from pe_dpo.training.preparation import prepare_run
        from pe_dpo.training.train import build_trainer

        recipe = make_recipe(*overrides)
        is_known = not anew and not any(override.startswith(("model.", "data.")) for override in overrides)
        known = one_base.inputs(recipe)._replace(loaded_base=None) if is_known else None
        trainer = build_trainer(recipe, prepare_run(recipe, shared=known))
        if not fresh:
            generator = torch.Generator().manual_seed(1)
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(0, 0.05, generator=generator)
        trainer.monitored_reference = trainer.score_reference()
        return trainer

    return make


TRAIN = """
import sys
from pe_dpo.recipe import load_recipe
from pe_dpo.training.train import train
train(load_recipe(sys.argv[1]))
"""


@pytest.fixture
def train_on_two(tmp_path: Path) -> Callable[[Any], Path]:
    """Trains a recipe in two processes, with the environment that torchrun gives them; the run's folder."""

    def run(recipe: Any) -> Path:
        from pe_dpo.recipe import recipe_to_yaml

        (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        meeting |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        both = [
            warm_process.start(TRAIN, "recipe.yaml", folder=tmp_path, environment=meeting | {"RANK": rank, "LOCAL_RANK": rank})
            for rank in ("0", "1")
        ]
        for process in both:
            process.join(timeout=300)
        said = [warm_process.log(process, tmp_path).read_text()[-3000:] for process in both]
        assert [process.exitcode for process in both] == [0, 0], "\n".join(said)
        return Path(recipe.output)

    return run

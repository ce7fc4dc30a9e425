"""A trainer over the tiny world, as `train` builds it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def make_trainer(make_recipe: Callable) -> Callable[..., Any]:
    """A PairTrainer with its adapter's B set to noise (so that policy ≠ reference), unless `fresh`."""

    def make(*overrides: str, fresh: bool = False) -> Any:
        import torch

        from pe_dpo.training.train import build_trainer, prepare_run

        recipe = make_recipe(*overrides)
        trainer = build_trainer(recipe, prepare_run(recipe))
        if not fresh:
            generator = torch.Generator().manual_seed(1)
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(0, 0.05, generator=generator)
        trainer.held_out_reference = trainer.score_reference()
        return trainer

    return make


ON_ONE_THREAD = """
import sys, torch
torch.set_num_threads(1)
from pe_dpo.recipe import load_recipe
from pe_dpo.training.train import train
train(load_recipe(sys.argv[1]))
"""


@pytest.fixture
def train_on_two(tmp_path: Path) -> Callable[[Any], Path]:
    """Trains a recipe in two processes, as torchrun starts them; the run's folder."""

    def run(recipe: Any) -> Path:
        from pe_dpo.recipe import recipe_to_yaml

        (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
        (tmp_path / "program.py").write_text(ON_ONE_THREAD)
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
        done = subprocess.run([*launch, "program.py", "recipe.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return Path(recipe.output)

    return run

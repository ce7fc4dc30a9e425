"""Two processes train what one process trains."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from pe_dpo.recipe import recipe_to_yaml
from pe_dpo.training.run import train
from pe_dpo.training.run_folder import read_metrics, read_run

PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from pe_dpo.recipe import load_recipe
from pe_dpo.training.run import train
train(load_recipe(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mixout", [0, 0.5])
def test_two_processes_give_the_run_of_one(make_recipe, tmp_path, mixout):
    """22 pairs by 7: shares of 4 and 3, and a last step of one pair, of which the second process has none."""
    settings = ("train.pairs_per_step=7", "data.limit=22", "train.epochs=1", "train.tokens_per_microbatch=300")
    settings += (f"mixout.p={mixout}",)
    alone = train(make_recipe(*settings, output="alone"))
    recipe = make_recipe(*settings, output="together")
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    done = subprocess.run([*launch, "program.py", "recipe.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    together = tmp_path / "together"
    assert read_run(together)["status"] == "finished"
    left, right = read_metrics(alone.folder), read_metrics(together)
    assert [line["step"] for line in left] == [line["step"] for line in right]
    for one, two in zip(left, right, strict=True):
        for key in one.keys() - {"tokens_per_second", "grad_norm"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key
    weights, others = (load_file(folder / "adapter_model.safetensors") for folder in (alone.folder, together))
    moved = torch.cat([w.flatten() for w in weights.values()])
    assert (torch.cat([w.flatten() for w in others.values()]) - moved).norm() < 1e-4 * moved.norm()
    assert len(left) == 1 + 4 + sum("eval_loss" in line for line in left[1:])

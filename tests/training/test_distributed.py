"""Two processes train what one process trains."""

import pytest
import torch
from safetensors.torch import load_file

from pe_dpo.runs.checkpoints import checkpoints
from pe_dpo.runs.files import RUN_FILE, read_object
from pe_dpo.runs.run import Run
from pe_dpo.training.train import train


@pytest.mark.slow
@pytest.mark.parametrize("mixout", [0, 0.5])
def test_two_processes_give_the_run_of_one(make_recipe, mixout, train_on_two):
    """22 pairs by 7: shares of 4 and 3, and a last step of one pair, of which the second process has none."""
    settings = ("train.pairs_per_step=7", "data.limit=22", "train.epochs=1", "train.tokens_per_microbatch=300")
    settings += (f"mixout.p={mixout}", "train.save_minutes=0.0001", "train.keep_best=loss")  # both save after every step
    alone = train(make_recipe(*settings, output="alone"))
    together = train_on_two(make_recipe(*settings, output="together"))
    assert read_object(together / RUN_FILE)["status"] == "finished"
    left, right = Run(alone.folder).metrics, Run(together).metrics
    assert [line["step"] for line in left] == [line["step"] for line in right]
    for one, two in zip(left, right, strict=True):
        for key in one.keys() - {"tokens_per_second", "grad_norm"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key
    weights, others = (load_file(folder / "adapter_model.safetensors") for folder in (alone.folder, together))
    moved = torch.cat([w.flatten() for w in weights.values()])
    assert (torch.cat([w.flatten() for w in others.values()]) - moved).norm() < 1e-4 * moved.norm()
    assert [path.name for path in checkpoints(together)] == ["checkpoint-3", "checkpoint-4"]
    best, other = (Run(folder).info.best for folder in (alone.folder, together))
    assert (other.step, other.evaluations) == (best.step, best.evaluations)
    assert other.value == pytest.approx(best.value, rel=1e-4) and other.luck == pytest.approx(best.luck, rel=1e-2, abs=1e-6)
    assert len(left) == 1 + 4 + sum("eval_loss" in line for line in left[1:])

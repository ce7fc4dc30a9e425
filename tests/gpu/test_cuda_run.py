"""What only a GPU shows: nf4 kernels and bfloat16 on the whole road."""

import pytest
import torch

from pe_dpo.evaluation.evaluate import evaluate
from pe_dpo.training.train import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("quantize", ["nf4", "int8", "none"])
def test_a_run_on_the_gpu_starts_with_policy_and_reference_equal_and_evaluates_to_the_same_numbers(make_recipe, quantize):
    result = train(make_recipe(f"model.quantize={quantize}", "adapter.dropout=0.1"))
    assert result.start.largest_difference == 0.0
    assert result.after["loss"] < result.before["loss"]
    # In other batches than training's: hundredths of a nat in each pair, of which the loss sees β times the mean.
    assert evaluate(result.folder).metrics["loss"] == pytest.approx(result.after["loss"], rel=5e-3)


def test_a_resumed_run_on_the_gpu_ends_near_where_the_straight_one_does(make_recipe):
    """Not at the same bits, as on a CPU: attention's backward adds in the order in which blocks finish."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    straight = train(make_recipe("train.save_every=2", output="straight"))
    train(make_recipe("train.save_every=2"), callbacks=[Stop()])
    resumed = train(make_recipe("train.save_every=2"), resume=True)
    assert resumed.after["loss"] == pytest.approx(straight.after["loss"], rel=5e-3)

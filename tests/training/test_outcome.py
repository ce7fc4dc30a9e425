"""How a run begins to go wrong and how it ends: said before the first step, logged to the last one, never finished with NaN."""

import pytest
from transformers import TrainerCallback

from pe_dpo.training.train import train


class At(TrainerCallback):
    """Calls something at the end of an optimizer step."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.do(model)


# ---------------------------------------------------------------- before the first step


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        (["loss.beta=2.0", "loss.gamma=0.2x"], "held-out pairs"),
        (["loss.beta=2.0", "loss.gamma=0.2x", "data.eval=0"], "watched training pairs"),
        (["loss.beta=2.0", "loss.gamma=scale:1"], "held-out pairs"),
    ],
)
def test_a_gamma_out_of_scale_is_said_before_the_first_step(make_recipe, settings, pairs):
    said = []
    train(
        make_recipe(*settings, "train.max_steps=1"),
        say=said.append,
        callbacks=[At(1, lambda model: said.append("a step"))],
    )
    warnings = [line for line in said[: said.index("a step")] if "δ = (γ−β)·sd(Δ0)" in line]
    assert len(warnings) == 1
    assert f"over the {pairs}" in warnings[0]


def test_a_gamma_in_scale_is_not_spoken_of(make_recipe):
    said = []
    train(make_recipe("train.max_steps=1"), say=said.append)
    assert not any("sd(Δ0)" in line for line in said)


# ---------------------------------------------------------------- the end


# ---------------------------------------------------------------- what lies there already

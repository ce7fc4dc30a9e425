"""What the benchmark of steps holds its steps against: a float64 step, and TRL with a stored reference on 4-bit codes too."""

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed; it comes with the peer extra")
pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The benchmark's modules with a tiny base, and eight pairs whose answers differ by one token in twenty."""
    from benchmarks import models
    from benchmarks.pairs import _pair

    patch = pytest.MonkeyPatch()
    patch.setitem(models.SHAPES, "tiny", models.BaseShape(2, 512, 64, 128, 2))
    patch.setattr(models, "scratch", lambda: tmp_path_factory.getbasetemp())
    draw = np.random.default_rng(0)
    pairs = []
    for number in range(8):
        prompt, chosen = draw.integers(2, 512, size=12), draw.integers(2, 512, size=20)
        rejected = chosen.copy()
        rejected[draw.integers(0, 19)] = 7
        pairs.append(_pair(prompt, chosen, rejected, where=f"tiny:{number}", key=str(number)))
    yield pairs
    patch.undo()


def test_the_step_in_float32_is_the_float64_step(tiny):
    """Loss to 1e-6, gradient to 1e-4, although chosen and rejected nearly cancel."""
    from benchmarks.agreement import check_against, outcome
    from benchmarks.models import saved_base
    from benchmarks.ours import FULL_STACK, OurStep, ladder
    from benchmarks.trl_side import GridPoint, PeerStep
    from benchmarks.truth import true_outcome

    (rung,) = [rung for rung in ladder() if rung.name == FULL_STACK]
    step = OurStep(rung, tiny, "tiny", "fp32")
    peer = PeerStep(GridPoint(8, False, True, False, "fp32"), tiny, saved_base("tiny"))
    found = {"ours": outcome(step.model, step()), peer.name: outcome(peer.trainer.model, peer())}
    distances = check_against(true_outcome("tiny", "fp32", tiny), found, "fp32")
    assert distances["ours"]["loss"] < 1e-6
    assert distances["ours"]["gradient"] < 1e-4


@pytest.mark.parametrize(("dtype", "precision"), [("bf16", "bf16"), ("nf4", "nf4/bf16")])
def test_in_16_bits_the_step_is_as_near_to_float64_as_the_one_of_trl(tiny, dtype, precision):
    """Near-identical answers: either rounds by more than the two per cent that other pairs keep, ours by no more than TRL's."""
    from benchmarks.agreement import check_against, outcome
    from benchmarks.models import saved_base
    from benchmarks.ours import FULL_STACK, OurStep, ladder
    from benchmarks.trl_side import GridPoint, PeerStep
    from benchmarks.truth import true_outcome

    (rung,) = [rung for rung in ladder() if rung.name == FULL_STACK]
    step = OurStep(rung, tiny, "tiny", dtype)
    found = {"ours": outcome(step.model, step())}
    for stored in (True, False):
        peer = PeerStep(GridPoint(8, False, stored, False, precision), tiny, saved_base("tiny"))
        found[peer.name] = outcome(peer.trainer.model, peer())
    distances = check_against(true_outcome("tiny", dtype, tiny), found, dtype)
    stored, in_step = (far["gradient"] for name, far in distances.items() if name != "ours")
    assert stored == pytest.approx(in_step, rel=0.05)  # 0.92 where the codes were repacked by the precomputation
    assert distances["ours"]["gradient"] < 1.1 * stored


def test_a_step_farther_off_than_those_of_trl_is_not_timed(tiny):
    from benchmarks.agreement import Disagreement, Outcome, check_against

    truth = Outcome(0.5, {"a": torch.ones(4)})
    theirs = {"TRL one": Outcome(0.5, {"a": torch.ones(4) * 1.03}), "TRL two": Outcome(0.5, {"a": torch.ones(4) * 1.04})}
    check_against(truth, theirs | {"ours": Outcome(0.5, {"a": torch.ones(4) * 1.043})}, "bf16")
    with pytest.raises(Disagreement, match="ours"):
        check_against(truth, theirs | {"ours": Outcome(0.5, {"a": torch.ones(4) * 1.045})}, "bf16")

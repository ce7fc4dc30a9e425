"""The judgement of a merge on pairs, on numbers small enough to work out by hand."""

import math

import pytest
import torch

from pe_dpo.merging.behaviour import Agreement, Behaviour, agreement, is_inconclusive, verification_failures
from pe_dpo.merging.merged_tensor import MergedTensor, mean_kept, tensor_failures
from pe_dpo.objective import PairLogprobs


def behaves(chosen: list[float], rejected: list[float], probabilities: list[list[float]]) -> Behaviour:
    """Two pairs of answers of 2 and 4 tokens, and distributions over a vocabulary of two at two positions."""
    lengths = torch.tensor([2, 4]), torch.tensor([2, 4])
    logprobs = PairLogprobs(torch.tensor(chosen).double(), torch.tensor(rejected).double(), *lengths)
    return Behaviour(logprobs, [torch.tensor([row]).log() for row in probabilities])


REFERENCE = behaves([-4.0, -8.0], [-5.0, -6.0], [[0.5, 0.5], [0.5, 0.5]])
TRAINED = behaves([-3.0, -8.0], [-5.0, -9.0], [[0.75, 0.25], [0.5, 0.5]])


def test_agreement_is_that_worked_out_by_hand() -> None:
    """Shifts: trained (1, 3), merged (1, 1); kept (1·1 + 1·3) / (1 + 9)."""
    merged = behaves([-3.0, -8.0], [-5.0, -7.0], [[0.25, 0.75], [0.5, 0.5]])
    found = agreement(merged, TRAINED, REFERENCE)
    assert found.shift_kept == pytest.approx(0.4)
    assert (found.shift, found.shift_trained) == (1.0, 2.0)
    assert found.shift_error == pytest.approx(math.sqrt(2))
    assert found.shift_kept_error == pytest.approx(math.sqrt((0.6**2 + 0.2**2) / 1 / 10))
    assert found.kl == pytest.approx((0.75 * math.log(3) - 0.25 * math.log(3)) / 2)
    assert found.kl_reference == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2)
    assert found.top1 == 0.5
    assert found.accuracy == 0.5
    assert found.nll == pytest.approx(11 / 6)


def test_the_trained_model_agrees_with_itself_exactly() -> None:
    found = agreement(TRAINED, TRAINED, REFERENCE)
    assert (found.kl, found.relative_kl, found.shift_kept, found.shift_error, found.top1) == (0.0, 0.0, 1.0, 0.0, 1.0)


def test_where_training_changed_nothing_there_is_nothing_to_be_relative_to() -> None:
    found = agreement(REFERENCE, REFERENCE, REFERENCE)
    assert (found.relative_kl, found.shift_kept) == (None, None)
    assert verification_failures(found, None) == []


BASE = Agreement(kl=0.01, kl_reference=1.0, shift_kept=1.0, shift_kept_error=0.01, shift_error=0.1, shift=2.0,
                 shift_trained=2.0, top1=1.0, accuracy=0.5, nll=1.0)  # fmt: skip
"""Of a merge that is right."""


@pytest.mark.parametrize(
    ("merged", "floor", "words"),
    [
        ({}, {}, []),
        ({"kl": 0.2}, {"kl": 0.01}, ["KL(trained ‖ merged)"]),
        ({"kl": 0.2}, {"kl": 0.3}, []),
        ({"kl": 0.2}, None, ["KL(trained ‖ merged)"]),
        ({"kl": 0.2}, {"kl": 0.14}, []),  # below 1.5 times the noise
        ({"shift_kept": 0.2}, {}, ["0.200 ± 0.010 of the preference shift"]),
        ({"shift_kept": 1.3}, {}, ["1.300 ± 0.010 of the preference shift"]),
        ({"shift_kept": 0.75, "shift_kept_error": 0.08}, {}, []),  # 0.1 and three standard errors
        ({"shift_kept": 0.65, "shift_kept_error": 0.08}, {}, ["0.650 ± 0.080"]),
        ({"kl": 0.5, "shift_kept": -1.0}, None, ["KL(trained ‖ merged)", "-1.000 ± 0.010"]),
        ({"kl": float("nan")}, {}, ["not finite"]),
        ({"kl": 0.2}, {"kl": float("nan")}, ["KL(trained ‖ merged)"]),  # a floor that is none excuses nothing
        ({"kl": 1e-13, "kl_reference": 1e-14}, None, []),  # equal weights, another order of sums
    ],
)
def test_a_merge_fails_only_where_arithmetic_does_not_explain_it(
    merged: dict[str, float], floor: dict[str, float] | None, words: list[str]
) -> None:
    found = verification_failures(
        BASE._replace(**merged), None if floor is None else BASE._replace(**{"kl": 0.0, "shift_error": 0.0} | floor)
    )
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))


def test_failures_of_a_scaled_adapter_do_not_call_it_trained() -> None:
    wrong = BASE._replace(kl=0.5, shift_kept=0.1, shift_kept_error=0.01)
    trained, scaled = verification_failures(wrong, None), verification_failures(wrong, None, scale=0.5)
    assert trained[0].startswith("KL(trained ‖ merged)") and "of what training changed" in trained[0]
    assert scaled[0].startswith("KL(scaled ‖ merged)") and "of what the scaled update changed" in scaled[0]
    assert trained[1:] == scaled[1:] and not any("trained" in line or "training" in line for line in scaled)


@pytest.mark.parametrize(("kl", "error", "is_unclear"), [(0.1, 0.5, False), (2.0, 0.5, True), (2.0, 0.1, False)])
def test_pairs_that_could_not_tell_a_lost_adapter_are_inconclusive(kl: float, error: float, is_unclear: bool) -> None:
    """Training changed 1 nat; noise of `kl` could hide it, and so could a share kept that is only known within `error`."""
    assert is_inconclusive(BASE._replace(shift_kept_error=error), BASE._replace(kl=kl)) is is_unclear


def tensor(kept: float | None, energy: float = 1.0, noise: float = 0.0) -> MergedTensor:
    return MergedTensor("layer", kept, 1e-3, energy, noise, "nearest")


@pytest.mark.parametrize(
    ("tensors", "count"),
    [
        ([tensor(1.0), tensor(1.05)], 0),
        ([tensor(None)], 0),
        ([tensor(0.0, energy=1e-6), tensor(1.0)], 1),  # one small layer left out: the mean does not see it
        ([tensor(2.0, energy=1e-6), tensor(1.0)], 1),
        ([tensor(0.8), tensor(0.8)], 1),  # each within its band, all together not
        ([tensor(-0.1), tensor(-0.1)], 3),
        ([tensor(1.8, energy=1e-3, noise=0.2), tensor(1.0)], 0),  # noise of rounding: within six of its deviations
        ([tensor(0.7, noise=0.06)], 0),
        ([tensor(0.6, noise=0.06)], 1),
        ([tensor(0.8, noise=0.04), tensor(0.8, noise=0.04)], 1),  # together the noise is less: 1 ± 0.17
        ([], 0),
    ],
)
def test_a_tensor_or_all_together_out_of_their_bands_are_faults(tensors: list[MergedTensor], count: int) -> None:
    assert len(tensor_failures(tensors)) == count


def test_the_share_kept_counts_each_tensor_by_the_size_of_its_update() -> None:
    assert mean_kept([tensor(1.0, 3.0), tensor(0.0, 1.0), tensor(None)]) == 0.75
    assert mean_kept([tensor(None)]) is None

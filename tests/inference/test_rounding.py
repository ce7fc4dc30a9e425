"""Rounding is told from faults: bfloat16 does not talk a model out of packed rows, and no fault hides behind it."""

import math

import pytest
import torch
from recorded import recording
from torch import nn

from benchmarks.packing_check import FAULTS, PAIRS, WINDOW_FAULTS, choice, harmed, small_policy, with_head
from pe_dpo.data.batches import pad
from pe_dpo.inference.logprobs import pair_logprobs
from pe_dpo.inference.policy import Policy
from pe_dpo.inference.reference import Reference
from pe_dpo.inference.reference_store import ReferenceStore
from pe_dpo.inference.rounding import Rounding
from pe_dpo.inference.scorer import NOT_PACKED, Scorer, choose_scorer
from pe_dpo.model.attention import ordinary_in_float32, switch_on
from pe_dpo.objective import PairLogprobs
from pe_dpo.objective.head import head_logprobs, wide_logits

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)
ROUNDED = [0.01 * torch.randn(50, generator=GENERATOR, dtype=torch.float64) for _ in range(8)]
"""Differences of eight answers of 50 tokens, whose median is 0.0067."""


# ---------------------------------------------------------------- the rule


def test_differences_like_the_noise_are_rounding():
    assert Rounding(0.0067).refutation(ROUNDED) is None


def test_two_tokens_and_two_in_a_hundred_may_be_far_off_and_more_may_not():
    """400 tokens: ten are spared, as a mixture of experts sends one elsewhere by a rounding error."""
    far = 1.0
    some = [one.clone() for one in ROUNDED]
    for answer in range(8):
        some[answer][0] = far
    some[0][1] = some[1][1] = far
    assert Rounding(0.0067).refutation(some) is None
    some[2][1] = far
    assert Rounding(0.0067).refutation(some)


def test_no_number_at_all_is_a_fault():
    assert Rounding(0.0067).refutation([*ROUNDED[:7], ROUNDED[7] + math.nan])


def test_a_tenth_of_a_nat_on_each_token_of_one_answer_is_a_fault():
    some = [*ROUNDED[:7], ROUNDED[7] + 0.1]
    assert Rounding(0.0067).refutation(some)
    assert Rounding(0.03).refutation(some) is None  # where rounding does as much


def test_an_answer_may_be_as_noisy_as_one_was():
    """Nine times as noisy as the others: in a mixture a token of its prompt went to another expert."""
    noisy = [*ROUNDED[:7], 9 * ROUNDED[7]]
    rounding = Rounding.of(noisy, 1e-5)
    assert rounding.of_an_answer == 9 * float(ROUNDED[7].abs().median())
    assert rounding.refutation(noisy) is None
    assert Rounding(rounding.noise).refutation(noisy)


def test_few_tokens_are_judged_by_their_median_and_outliers():
    """Four answers of one token: yes-or-no data."""
    assert Rounding(0.01).refutation([torch.tensor([0.01])] * 4) is None
    assert Rounding(0.01).refutation([torch.tensor([0.05])] * 4)
    assert Rounding(0.01).refutation([torch.tensor([0.01])] * 3 + [torch.tensor([0.2])]) is None


# ---------------------------------------------------------------- logits in float32


def head_of(vocabulary: int = 500, width: int = 256) -> nn.Linear:
    """A bfloat16 head whose largest logit is about 19 for states of standard deviation 1."""
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary).bfloat16().requires_grad_(False)
    head.weight.mul_(11)
    return head


def test_logits_of_nineteen_are_not_rounded_to_bfloat16():
    """There 19 is followed by 19.125; log-probs are those of float64 within the rounding of float32."""
    head = head_of()
    hidden, targets = torch.randn(40, 256).bfloat16(), torch.randint(0, 500, (40,))
    logits = hidden.double() @ head.weight.double().T + head.bias.double()
    assert 18 < float(logits.amax(dim=1).median()) < 20
    expected = logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    rounded = head(hidden).double().log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    assert float((rounded - expected).abs().max()) > 0.03
    with wide_logits(head):
        wide = head(hidden)
    assert head(hidden).dtype == torch.bfloat16
    for found in (wide.double().log_softmax(dim=1).gather(1, targets[:, None])[:, 0], head_logprobs(hidden, targets, head)):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-5)


def test_wide_logits_have_the_gradient_of_the_head():
    head, hidden = head_of(), torch.randn(6, 256).bfloat16().requires_grad_()
    pull = torch.randn(6, 500)
    with wide_logits(head):
        (found,) = torch.autograd.grad((head(hidden) * pull).sum(), hidden)
    assert found.dtype == torch.bfloat16
    expected = pull.double() @ head.weight.double()
    assert float((found.double() - expected).norm() / expected.norm()) < 5e-3


def test_an_adapted_head_has_wide_logits_too():
    from peft import LoraConfig, inject_adapter_in_model

    adapted: nn.Module = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(head_of()))[0]
    hidden = torch.randn(3, 256).bfloat16()
    plain = adapted(hidden)
    with wide_logits(adapted):
        wide = adapted(hidden)
    assert (plain.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(plain.float(), wide, rtol=0.01, atol=0.01)


def test_padded_rows_have_log_probs_of_wide_logits():
    """Of logits that are exact in float32 and not in bfloat16: the head sees the last hidden states as they are."""
    model = with_head(small_policy("llama"), 6)
    one = PAIRS[0]
    found = pair_logprobs(model, *pad([one]))
    ids = torch.tensor([[*one.prompt_ids, *one.chosen_ids]])
    causal_lm = model.get_base_model()
    with torch.no_grad():
        hidden = causal_lm.get_decoder()(input_ids=ids).last_hidden_state[0].double()
    logits = hidden @ causal_lm.lm_head.weight.double().T
    per_token = logits.log_softmax(dim=1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
    assert float(logits.amax(dim=1).median()) > 19
    assert float(found.chosen.detach()) == pytest.approx(float(per_token[len(one.prompt_ids) - 1 :].sum()), abs=1e-3)


# ---------------------------------------------------------------- the check


def test_a_larger_head_leaves_a_bfloat16_model_packed():
    """hh-dialogue-4m went padded with logits of 18; log-probs by √token were then off by more than 0.05."""
    model = with_head(small_policy("llama"), 8)
    scorer = choose_scorer(model, PAIRS)
    assert (scorer.path, scorer.is_batch_dependent) == ("segments", False)
    off = scorer.score_pairs(model, PAIRS).chosen - Scorer("padded", CPU).score_pairs(model, PAIRS).chosen
    lengths = torch.tensor([len(one.chosen_ids) for one in PAIRS])
    assert float((off.abs() / lengths.sqrt()).max()) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_models_stay_packed_whatever_the_size_of_their_logits(name):
    for times in (1, 3):
        found = choice(with_head(small_policy(name), times))
        assert (found["path"], found["is_batch_dependent"]) == ("segments", False), found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "times", "fault"), [
    *(("llama", 3, fault) for fault in FAULTS), *(("mistral", 1, fault) for fault in WINDOW_FAULTS),
    ("mistral", 3, "the window is one wider"), ("llama", 1, "a cousin is seen"), ("gpt2", 3, "positions are one further"),
    ("gemma2", 1, "the prompt's end is hidden"), ("mixtral", 3, "the next token is seen"),
])  # fmt: skip
def test_a_fault_is_refused_whatever_the_size_of_the_logits(name, times, fault):
    with harmed({**FAULTS, **WINDOW_FAULTS}[fault]):
        assert choice(with_head(small_policy(name), times))["path"] in NOT_PACKED


def test_an_attention_that_is_not_what_it_is_exchanged_for_is_no_noise():
    """Noise is what one path shows against itself with its attention exchanged: scores twice as large would excuse all."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    sdpa = AttentionInterface()["sdpa"]
    AttentionInterface.register(
        "sharper", lambda *args, **options: sdpa(*args, **options | {"scaling": 2 * options["scaling"]})
    )
    AttentionMaskInterface.register("sharper", sdpa_mask)
    model = small_policy("llama")
    model.get_base_model().set_attn_implementation("sharper")
    with recording() as said:
        assert choose_scorer(model, PAIRS).path in NOT_PACKED
    assert "its attention is not what it is exchanged for: log-probs differ by" in said[0]


def test_ordinary_attention_in_float32_moves_bfloat16_by_its_rounding_and_float32_not_at_all():
    for dtype, least, most in ((torch.bfloat16, 1e-4, 1.0), (torch.float32, 0, 0)):
        model, padded = small_policy("llama", dtype), Scorer("padded", CPU)
        switch_on(model.get_base_model())
        with torch.no_grad():
            plain = torch.stack(padded.logprobs(model, PAIRS)[:2])
            with ordinary_in_float32():
                wide = torch.stack(padded.logprobs(model, PAIRS)[:2])
        assert least <= float((wide - plain).abs().max()) <= most


# ---------------------------------------------------------------- stored references


@pytest.fixture
def padded_reference(tmp_path):
    """Of a bfloat16 model on its padded path, whose log-probs move with their batch by `noise`."""
    model = small_policy("llama")
    scorer = Scorer("padded", CPU, noise=0.03)
    policy = Policy(model, None, None, [])  # type: ignore[arg-type]
    reference = Reference(policy, scorer, store=ReferenceStore(tmp_path / "store.sqlite"), key="k")
    reference.logprobs(PAIRS)
    return reference


def shifted(scored: PairLogprobs, per_token: float, *, pairs: slice = slice(None)) -> PairLogprobs:
    chosen = scored.chosen.clone()
    chosen[pairs] += per_token * scored.chosen_lengths[pairs] ** 0.5
    rejected = scored.rejected.clone()
    rejected[pairs] -= per_token * scored.rejected_lengths[pairs] ** 0.5
    return PairLogprobs(chosen, rejected, *scored[2:])


def test_a_stored_reference_is_taken_where_rounding_alone_moves_it_and_not_for_one_number(padded_reference):
    now = padded_reference.logprobs(PAIRS)
    assert padded_reference.difference(PAIRS, shifted(now, 0.06)) is None
    assert padded_reference.difference(PAIRS, shifted(now, 3.0, pairs=slice(0, 1))) is None  # an expert chosen otherwise
    said = padded_reference.difference(PAIRS, shifted(now, 0.1))
    assert said and " now and " in said
    assert padded_reference.difference(PAIRS, shifted(now, math.nan))


def test_a_stored_answer_of_another_length_is_never_taken(padded_reference):
    now = padded_reference.logprobs(PAIRS)
    assert padded_reference.difference(PAIRS, now._replace(chosen_lengths=now.chosen_lengths + 1))


def test_where_the_bits_are_the_same_one_pair_that_is_off_is_enough(padded_reference):
    now = padded_reference.logprobs(PAIRS)
    padded_reference.scorer = Scorer("segments", CPU, noise=0.03)
    assert padded_reference.difference(PAIRS, now) is None
    assert padded_reference.difference(PAIRS, shifted(now, 0.001, pairs=slice(2, 3)))

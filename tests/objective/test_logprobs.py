"""Log-probs of answers, against loops written out by hand and against models whose probabilities are known fractions."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pe_dpo.objective import completion_logprobs, token_logprobs

VOCABULARY = 11
END = 2
# (prompt, answer); every answer ends with END, lengths 1 to 6.
ROWS: list[tuple[list[int], list[int]]] = [
    ([1, 5, 6], [7, 8, END]),
    ([1, 9], [3, 4, 10, 3, 5, END]),
    ([1, 4, 4, 4, 7], [END]),
    ([1, 3], [6, END]),
]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny_llama()


def tiny_llama() -> LlamaForCausalLM:
    """Two layers of width 16, random, float64, with logits wide enough that tokens differ clearly."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=1, eos_token_id=END, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double().eval()


def padded(rows: list[tuple[list[int], list[int]]], width: int | None = None, pad: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return input_ids, attention_mask and completion_mask, padded on the right."""
    width = width or max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), pad)
    attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(rows):
        stop = len(prompt) + len(answer)
        ids[row, :stop] = torch.tensor(prompt + answer)
        attention[row, :stop] = 1
        completion[row, len(prompt) : stop] = 1
    return ids, attention, completion


def by_hand(model: PreTrainedModel, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """Σ log π(token | all before it) of each row, one forward per token, without padding, batch or masks."""
    totals = []
    for prompt, answer in rows:
        total = torch.zeros((), dtype=torch.float64)
        for position, token in enumerate(answer):
            logits = model(torch.tensor([prompt + answer[:position]])).logits[0, -1]
            total = total + logits[token] - torch.logsumexp(logits, dim=0)
        totals.append(total)
    return torch.stack(totals)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal up to the float32 norms inside these float64 models: another batch shape may round one of them the other way."""
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- against the loop


@torch.no_grad()
def test_each_answer_is_scored_as_a_loop_over_its_tokens_scores_it(llama):
    found = completion_logprobs(llama, *padded(ROWS))
    assert_same(found.logprob, by_hand(llama, ROWS))
    assert found.length.tolist() == [3, 6, 1, 2]


@torch.no_grad()
def test_padding_does_not_change_an_answer(llama):
    """Ten more columns, and another token in them."""
    tight, wide = completion_logprobs(llama, *padded(ROWS)), completion_logprobs(llama, *padded(ROWS, width=18, pad=9))
    assert_same(wide.logprob, tight.logprob)
    assert torch.equal(wide.length, tight.length)


@torch.no_grad()
def test_batch_order_does_not_change_an_answer(llama):
    forwards, backwards = completion_logprobs(llama, *padded(ROWS)), completion_logprobs(llama, *padded(ROWS[::-1]))
    assert_same(backwards.logprob.flip(0), forwards.logprob)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2])
def test_batch_size_does_not_change_an_answer(llama, size):
    parts = [completion_logprobs(llama, *padded(ROWS[start : start + size])).logprob for start in range(0, len(ROWS), size)]
    assert_same(torch.cat(parts), completion_logprobs(llama, *padded(ROWS)).logprob)


# ---------------------------------------------------------------- what is scored


class Bigram:
    """A model whose next token depends on the last one alone, through a table of probabilities."""

    def __init__(self, probabilities: Tensor) -> None:
        self.logits = probabilities.log()
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *, input_ids: Tensor, logits_to_keep: Tensor, **options: Any) -> SimpleNamespace:
        self.calls.append({"logits_to_keep": logits_to_keep, **options})
        return SimpleNamespace(logits=self.logits[input_ids][:, logits_to_keep])


@pytest.fixture
def bigram() -> Bigram:
    """After 0: ½, ¼, ¼. After 1: ⅛, ½, ⅜. After 2: ⅕, ⅕, ⅗."""
    rows = [[1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 2, 3 / 8], [1 / 5, 1 / 5, 3 / 5]]
    return Bigram(torch.tensor(rows, dtype=torch.float64))


def test_an_answer_is_the_product_of_its_tokens_chances(bigram):
    """Prompt 1 0, answer 2 1 0: P(2|0)·P(1|2)·P(0|1) = ¼·⅕·⅛ = 1/160."""
    found = completion_logprobs(bigram, *padded([([1, 0], [2, 1, 0])]))
    assert found.logprob.item() == pytest.approx(-math.log(160), rel=1e-12)


def test_the_first_token_of_an_answer_is_scored_given_the_last_of_the_prompt(bigram):
    """After prompt 0 the answer 1 has a chance of ¼, after prompt 1 one of ½."""
    found = completion_logprobs(bigram, *padded([([2, 0], [1]), ([2, 1], [1])]))
    assert found.logprob.tolist() == pytest.approx([math.log(1 / 4), math.log(1 / 2)], rel=1e-12)


def test_prompt_tokens_are_not_scored(bigram):
    """Prompts 0 1 (½·¼ apart) and 2 2 2 1, the same answer 0 after 1: ⅛ both."""
    found = completion_logprobs(bigram, *padded([([0, 1], [0]), ([2, 2, 2, 1], [0])]))
    assert found.logprob.tolist() == pytest.approx([math.log(1 / 8)] * 2, rel=1e-12)
    assert found.length.tolist() == [1, 1]


def test_the_end_token_is_scored(bigram):
    """With 0 as the end token, answer 2 0 costs log P(0|2) = log ⅕ more than answer 2."""
    found = completion_logprobs(bigram, *padded([([1], [2, 0]), ([1], [2])]))
    assert (found.logprob[0] - found.logprob[1]).item() == pytest.approx(math.log(1 / 5), rel=1e-12)
    assert found.length.tolist() == [2, 1]


def test_an_answer_may_have_gaps(bigram):
    """Tokens 1 and 3 of 1 2 1 0 are marked: P(2|1)·P(0|1) = ⅜·⅛; the 1 between them is not scored."""
    ids = torch.tensor([[1, 2, 1, 0]])
    found = completion_logprobs(bigram, ids, torch.ones_like(ids), torch.tensor([[0, 1, 0, 1]]))
    assert found.logprob.item() == pytest.approx(math.log(3 / 64), rel=1e-12)
    assert found.length.item() == 2


def test_boolean_masks_are_as_good_as_integers(bigram):
    ids, attention, completion = padded([([1], [2, 0]), ([1], [2])])
    found, expected = (completion_logprobs(bigram, ids, a, c) for a, c in
                       ((attention.bool(), completion.bool()), (attention, completion)))  # fmt: skip
    assert torch.equal(found.logprob, expected.logprob) and torch.equal(found.length, expected.length)


def test_results_are_float64_nats_and_int64_counts(bigram):
    found = completion_logprobs(bigram, *padded([([1], [2, 0])]))
    assert (found.logprob.dtype, found.length.dtype) == (torch.float64, torch.int64)


# ---------------------------------------------------------------- only the needed positions


def test_logits_are_asked_for_at_the_positions_before_the_answers_only(bigram):
    """Answers start at positions 3 and 2 and end at 5 and 3: tokens 2 to 5 are predicted from positions 1 to 4."""
    completion_logprobs(bigram, *padded([([1, 0, 0], [2, 1, 0]), ([1, 0], [2, 0])]))
    (call,) = bigram.calls
    assert call["logits_to_keep"].tolist() == [1, 2, 3, 4]


def test_the_model_is_told_where_the_padding_is_and_to_keep_no_cache(bigram):
    """Answers of a causal model do not feel padding on their right, so no number would show that the mask was lost."""
    completion_logprobs(bigram, *padded([([1], [2, 0]), ([1], [2])]))
    (call,) = bigram.calls
    assert call["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert call["use_cache"] is False


@torch.no_grad()
def test_the_kept_logits_give_what_the_full_logits_give(llama):
    """Full logits of all positions, then log-softmax, gather and mask: the textbook way."""
    ids, attention, completion = padded(ROWS)
    full = torch.log_softmax(llama(input_ids=ids, attention_mask=attention).logits[:, :-1], dim=-1)
    per_token = full.gather(2, ids[:, 1:, None]).squeeze(2) * completion[:, 1:]
    assert_same(completion_logprobs(llama, ids, attention, completion).logprob, per_token.sum(1))


@torch.no_grad()
def test_the_lm_head_sees_only_the_positions_that_are_scored(llama):
    """The longest answer is 6 of 8 tokens, the others start at 2 or later: 6 positions instead of 8."""
    seen: list[tuple[int, ...]] = []
    handle = llama.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    completion_logprobs(llama, *padded(ROWS))
    handle.remove()
    assert seen == [(4, 6, VOCABULARY)]


# ---------------------------------------------------------------- the model's own numbers


@torch.no_grad()
def test_soft_capped_logits_are_those_of_the_model():
    """Gemma 2 caps its final logits at ±c: c·tanh(x/c). The bare LM head would miss each answer by more than 0.1 nats."""
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, max_position_embeddings=32, sliding_window=32,
        final_logit_softcapping=1.0, initializer_range=0.5, bos_token_id=1, eos_token_id=END, pad_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).double().eval()
    found = completion_logprobs(model, *padded(ROWS)).logprob
    assert_same(found, by_hand(model, ROWS))
    model.config.final_logit_softcapping = None
    assert float((found - by_hand(model, ROWS)).abs().min()) > 0.1


@torch.no_grad()
def test_the_softmax_of_a_bfloat16_model_is_float32():
    """The model's bf16 logits through a float64 softmax: equal to float32 rounding, where bf16 would be off by percents."""
    model = tiny_llama().bfloat16()
    ids, attention, completion = padded(ROWS)
    found = completion_logprobs(model, ids, attention, completion).logprob
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
    assert logits.dtype == torch.bfloat16
    exact, rough = (
        (torch.log_softmax(logits.to(dtype), dim=-1).gather(2, ids[:, 1:, None]).squeeze(2) * completion[:, 1:]).double().sum(1)
        for dtype in (torch.float64, torch.bfloat16)
    )
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)
    assert float((rough - exact).abs().max()) > 1e-3


def test_many_tokens_are_summed_in_float64():
    """5,000 tokens of log 3 nats in float32 logits: the float32 value of log 3, times 5,000, with no further rounding."""
    uniform = Bigram(torch.full((3, 3), 1 / 3))
    found = completion_logprobs(uniform, *padded([([1], [0] * 5000)])).logprob.item()
    per_token = token_logprobs(uniform.logits[:1], torch.tensor([0])).item()
    assert found == pytest.approx(5000 * per_token, rel=1e-14, abs=0)
    assert found == pytest.approx(-5000 * math.log(3), rel=1e-6)


# ---------------------------------------------------------------- gradients


def test_the_gradient_of_an_answer_is_one_less_the_chance_at_each_of_its_tokens(bigram):
    """d log P(2|0) / d logits after 0 = (0, 0, 1) − (½, ¼, ¼); the prompt's 1 → 0 step gets nothing."""
    bigram.logits.requires_grad_()
    completion_logprobs(bigram, *padded([([1, 0], [2])])).logprob.sum().backward()
    expected = torch.tensor([[-1 / 2, -1 / 4, 3 / 4], [0, 0, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(bigram.logits.grad, expected, rtol=1e-12, atol=1e-15)


def test_the_gradient_reaches_every_weight_as_through_the_loop(llama):
    """Padding, kept positions and the batch leave the gradient of each parameter as the loop over tokens has it."""
    weights = list(llama.parameters())
    found = torch.autograd.grad(completion_logprobs(llama, *padded(ROWS)).logprob.sum(), weights)
    expected = torch.autograd.grad(by_hand(llama, ROWS).sum(), weights)
    for ours, theirs in zip(found, expected, strict=True):
        assert bool(theirs.any())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- one token


def test_token_logprobs_are_log_softmax_at_the_target():
    """Logits (0, log 3): chances ¼ and ¾."""
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]], dtype=torch.float64)
    found = token_logprobs(logits, torch.tensor([0, 1]))
    assert found.tolist() == pytest.approx([math.log(1 / 4), math.log(3 / 4)], rel=1e-12)


@pytest.mark.parametrize(
    ("given", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precisions_are_widened_and_wide_ones_are_kept(given, wide):
    assert token_logprobs(torch.zeros(2, 3, dtype=given), torch.tensor([0, 1])).dtype == wide


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("which", ["input_ids", "attention_mask", "completion_mask"])
def test_tensors_of_different_shapes_are_refused(bigram, which):
    batch = dict(zip(("input_ids", "attention_mask", "completion_mask"), padded([([1], [2, 0])]), strict=True))
    with pytest.raises(ValueError, match=r"must share one shape \(B, T\); found"):
        completion_logprobs(bigram, **{**batch, which: batch[which][:, :-1]})


def test_a_row_without_a_batch_dimension_is_refused(bigram):
    row = torch.tensor([1, 2, 0])
    with pytest.raises(ValueError, match=r"must share one shape \(B, T\)"):
        completion_logprobs(bigram, row, torch.ones_like(row), torch.tensor([0, 1, 1]))


def test_an_answer_that_starts_at_position_zero_is_refused(bigram):
    ids, attention, _ = padded([([1], [2, 0]), ([1], [2])])
    with pytest.raises(ValueError, match="completion_mask marks position 0"):
        completion_logprobs(bigram, ids, attention, torch.tensor([[0, 1, 1], [1, 1, 0]]))


def test_scored_padding_is_refused(bigram):
    ids, attention, completion = padded([([1], [2, 0]), ([1], [2])])
    completion[1, 2] = 1
    with pytest.raises(ValueError, match="completion_mask marks padding"):
        completion_logprobs(bigram, ids, attention, completion)

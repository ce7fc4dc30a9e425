"""Of an answer of several turns the assistant's tokens alone are scored: in the ids, in every kind of row, and in the store."""

from typing import Any

import numpy as np
import pytest
import torch
from encoded_pairs import encode, pair_of, turn
from toy_tokenizers import CHATML, THINK_IN_ANSWERS, THINK_IN_GENERATION_PROMPT, build_tokenizer

from pe_dpo.data import DataReport, EncodedPair, Encoder, Pair, data_hash
from pe_dpo.data.batches import pack, pad
from pe_dpo.errors import DataError
from pe_dpo.inference.reference_store import answer_key
from pe_dpo.recipe import DataSection

ASK = "\n\nHuman: Hi\n\nAssistant:"
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "Bern"}}}
# as Qwen3: reasoning stands in the turns after the last question alone
CUT_THOUGHTS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and m.reasoning_content and loop.index0 > ns.last %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# as Gemma 4: what a tool answers stands within the model's turn, and only after a call of that tool
TOOLS_INSIDE = (
    "{% for m in messages %}{% set before = messages[loop.index0 - 1] if loop.index0 else {} %}{% if m.role == 'tool' %}"
    "{{ '<r>' + m.content + '</r>' if before.tool_calls else raise_exception('no call') }}"
    "{% else %}{{ '' if before.role == 'tool' else '<|im_start|>' + m.role + '\\n' }}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<c>' + c.function.name + c.function.arguments | tojson + '</c>' }}"
    "{% endfor %}{% if not m.tool_calls %}{{ '<|im_end|>\\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


CHAT, PLAIN = build_tokenizer(template=CHATML, eos="<|im_end|>"), build_tokenizer()


def scored(encoded: EncodedPair, tokenizer: Any = CHAT) -> str:
    """The chosen answer with what is not scored in braces."""
    assert encoded.chosen_scored is not None
    pieces, open_ = [], False
    for index, is_scored in zip(encoded.chosen_ids.tolist(), encoded.chosen_scored, strict=True):
        pieces.append(("}" if open_ else "{") if open_ == is_scored else "")
        open_ = open_ if open_ != is_scored else not open_
        pieces.append(tokenizer.decode([index]))
    return "".join(pieces)


LONG = (turn("assistant", "a"), turn("user", "b"), turn("assistant", "c"))
SHORT = (turn("assistant", "d"),)
USER = "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"


def test_the_users_words_within_an_answer_are_read_and_not_scored_and_it_is_said() -> None:
    (encoded,), report = encode(pair_of(LONG, SHORT))
    assert scored(encoded) == "a<|im_end|>{\n" + USER + "}c<|im_end|>"
    assert encoded.rejected_scored is None
    assert report.noted == {"an answer of several turns, the assistant's scored": ["x:1"]}


def test_the_last_turn_alone_is_scored_when_asked() -> None:
    (encoded,), report = encode(pair_of(LONG, SHORT), score="last")
    assert scored(encoded) == "{a<|im_end|>\n" + USER + "}c<|im_end|>"
    assert report.noted == {"an answer of several turns, the last of them scored": ["x:1"]}


def test_everything_is_scored_when_asked_as_it_once_was() -> None:
    (encoded,), report = encode(pair_of(LONG, SHORT), score="everything")
    assert encoded.chosen_scored is encoded.rejected_scored is None
    (plain,), _ = encode(pair_of(" a\n\nHuman: b\n\nAssistant: c", " d", prompt=ASK), template=None, score="everything")
    assert plain.chosen_scored is None
    assert report.noted == {"an answer of several turns, all of them scored": ["x:1"]}


def test_transcripts_are_scored_alike_as_chat_and_as_the_text_that_they_are() -> None:
    (chat,), _ = encode(pair_of(" a\n\nHuman: b\n\nAssistant: c", " d", prompt=ASK))
    assert scored(chat) == "a<|im_end|>{\n" + USER + "}c<|im_end|>"
    (plain,), report = encode(pair_of(" a\n\nHuman: b\n\nAssistant: c", " d", prompt=ASK), template=None)
    assert scored(plain, PLAIN) == " a{\n\nHuman: b\n\nAssistant:} c<e>"
    assert report.noted == {"an answer of several turns, the assistant's scored": ["x:1"]}
    (plain,), _ = encode(pair_of(" a\n\nHuman: b\n\nAssistant: c", " d", prompt=ASK), template=None, score="last")
    assert scored(plain, PLAIN) == "{ a\n\nHuman: b\n\nAssistant:} c<e>"


@pytest.mark.parametrize(("template", "expected"), [
    (THINK_IN_ANSWERS, "a<|im_end|>{\n" + USER + "}<think>\n\n</think>\n\nc<|im_end|>"),
    (THINK_IN_GENERATION_PROMPT, "a<|im_end|>{\n" + USER + "}c<|im_end|>"),
    (CUT_THOUGHTS, "a<|im_end|>{\n" + USER + "}c<|im_end|>"),
    (TOOLS_INSIDE, "a<|im_end|>{\n" + USER + "}c<|im_end|>"),
])  # fmt: skip
def test_turns_are_found_under_templates_that_write_them_otherwise_in_the_middle(template: str, expected: str) -> None:
    (encoded,), _ = encode(pair_of(LONG, SHORT), template=template)
    assert scored(encoded) == expected


def test_reasoning_that_a_template_cuts_from_an_earlier_turn_is_counted_and_the_turn_scored_without_it() -> None:
    thinking = (
        turn("assistant", "a", reasoning_content="h1"),
        turn("user", "b"),
        turn("assistant", "c", reasoning_content="h2"),
    )
    (encoded,), report = encode(pair_of(thinking, SHORT), template=CUT_THOUGHTS)
    assert scored(encoded) == "a<|im_end|>{\n" + USER + "}<think>h2</think>c<|im_end|>"
    assert report.noted["reasoning of an answer's earlier turns that the chat template does not write"] == ["x:1"]


def test_calls_are_scored_and_what_the_tool_answers_is_not() -> None:
    called = (turn("assistant", "", tool_calls=[CALL]), turn("tool", "Sunny."), turn("assistant", "It is sunny."))
    (encoded,), _ = encode(pair_of(called, SHORT), template=TOOLS_INSIDE)
    assert scored(encoded) == '<c>f{"x": "Bern"}</c>{<r>Sunny.</r>}It is sunny.<|im_end|>'


def test_what_the_template_writes_before_one_answer_alone_is_counted() -> None:
    _, report = encode(pair_of(LONG, SHORT), template=THINK_IN_ANSWERS)
    assert report.noted["answers before which the chat template writes different text"] == ["x:1"]
    _, report = encode(pair_of(SHORT, ({"role": "assistant", "content": "e"},)), template=THINK_IN_ANSWERS)
    assert report.noted == {}


def test_a_prefill_is_not_scored_where_the_template_begins_the_answers_otherwise() -> None:
    prompt = (turn("user", "Hi"), turn("assistant", "So "))
    (encoded,), _ = encode(pair_of(LONG, SHORT, prompt=prompt), template=THINK_IN_ANSWERS)
    assert scored(encoded) == "{So }a<|im_end|>{\n" + USER + "}<think>\n\n</think>\n\nc<|im_end|>"
    assert encoded.rejected_scored is not None
    kept = encoded.rejected_ids[encoded.rejected_scored].tolist()
    assert CHAT.decode(kept) == "d<|im_end|>"


def test_a_blank_turn_within_an_answer_is_no_answer() -> None:
    encoded, report = encode(pair_of((*LONG[:2], turn("assistant", "")), SHORT))
    assert (encoded, report.dropped) == ([], {"empty answer": ["x:1"]})


def test_a_token_that_spans_two_turns_is_nobodys() -> None:
    tokenizer, report = build_tokenizer(merges=(("a", "Ċ"),)), DataReport()
    encoder = Encoder(tokenizer, DataSection(train="x"), max_length=99, report=report)
    (encoded,) = encoder.encode([Pair(ASK, " xa\n\nHuman: b\n\nAssistant: c", " d", None, None, "x:1")])
    assert scored(encoded, tokenizer) == " x{a\n\nHuman: b\n\nAssistant:} c<e>"


def test_turns_that_cannot_be_told_apart_are_an_error_with_the_row() -> None:
    short = "{% for m in messages if m.content | length > 5 %}{{ raise_exception('long') }}{% endfor %}" + CHATML
    with pytest.raises(DataError, match=r"x:1: which part of its answer's turn 1 is the assistant's cannot be told"):
        encode(pair_of(LONG, SHORT), template=short)
    (encoded,), _ = encode(pair_of(SHORT, ({"role": "assistant", "content": "e"},)), template=short)
    assert encoded.chosen_scored is None


# ------------------------------------------------------------------------------------------------------------- rows, store


def pair(prompt: Any, chosen: Any, rejected: Any, chosen_mask: Any = None, rejected_mask: Any = None) -> EncodedPair:
    ids = (np.array(one, dtype=np.int32) for one in (prompt, chosen, rejected))
    masks = (None if one is None else np.array(one, dtype=bool) for one in (chosen_mask, rejected_mask))
    return EncodedPair(*ids, 0.0, "x:1", "k", *masks)


def test_padded_rows_score_what_the_mask_says() -> None:
    _, attention, completion = pad([pair([1, 2], [5, 6, 7], [5, 8], [1, 0, 1])])
    assert attention.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert completion.tolist() == [[0, 0, 1, 0, 1], [0, 0, 1, 1, 0]]


def test_packed_rows_score_what_the_mask_says_and_share_the_rest() -> None:
    row = pack([pair([1, 2], [5, 6, 7], [5, 8], [0, 1, 1], None)])
    assert row.input_ids.tolist() == [[1, 2, 5, 6]]
    assert row.targets.tolist() == [6, 7, 5, 8]
    assert (row.members.tolist(), row.owners.tolist(), row.lengths.tolist()) == ([0, 1, 2, 3], [0, 0, 1, 1], [2, 2])


def test_answers_of_the_same_tokens_scored_otherwise_are_two_answers() -> None:
    row = pack([pair([1, 2], [5, 6], [5, 6], [1, 1], [0, 1])])
    assert row.lengths[row.chosen].tolist() == [2] and row.lengths[row.rejected].tolist() == [1]


@pytest.mark.parametrize("share", [True, False])
def test_packed_and_padded_rows_score_the_same_tokens(share: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        pairs = []
        for _ in range(4):
            answers = [rng.integers(3, 6, rng.integers(1, 6)) for _ in range(2)]
            masks = [None if rng.random() < 0.5 else np.append(rng.random(len(ids) - 1) < 0.5, True) for ids in answers]
            pairs.append(pair([rng.integers(1, 3)], *answers, *masks))
        row, (ids, _, completion) = pack(pairs, share=share), pad(pairs)
        sums = torch.zeros(len(row.lengths), dtype=torch.int64).index_add(0, row.owners, row.targets[row.members] ** 3)
        packed = torch.cat([sums[row.chosen], sums[row.rejected]])
        assert packed.tolist() == (ids**3 * completion).sum(1).tolist()
        assert torch.cat([row.lengths[row.chosen], row.lengths[row.rejected]]).tolist() == completion.sum(1).tolist()


def test_the_store_and_the_hash_of_the_data_tell_masks_apart_and_are_the_old_ones_without() -> None:
    prompt, answer = np.array([1, 2]), np.array([5, 6])
    keys = {answer_key(prompt, answer)} | {answer_key(prompt, answer, np.array(mask)) for mask in ([True, True], [False, True])}
    assert len(keys) == 3
    assert answer_key(prompt, answer).hex() == "d017bf1bf1deb7b415f05a13065e718d785dd607b315e83afed4fef6a552b789"
    hashes = [data_hash([pair([1], [5, 6], [7], mask)]) for mask in (None, [1, 1], [0, 1])]
    assert len(set(hashes)) == 3
    assert hashes[0] == "ba963d49216197ee2ee9d1a8e4289745a0a0f6c3564334c20d07edd509aa7478"

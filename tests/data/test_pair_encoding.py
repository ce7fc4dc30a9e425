"""Token ids of pairs: where the prompt ends, what begins a row, what ends an answer, what never trains."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_tokenizers import CHATML, THINK_IN_ANSWERS, THINK_IN_GENERATION_PROMPT, build_tokenizer

from pe_dpo.data import DataReport, EncodedPair, Encoder, Pair, data_hash
from pe_dpo.errors import DataError
from pe_dpo.progress import showing
from pe_dpo.recipe import DataSection

ASK = "\n\nHuman: Hi\n\nAssistant:"


def pair_of(prompt: Any, chosen: Any, rejected: Any, where: str = "x:1") -> Pair:
    return Pair(prompt, chosen, rejected, None, None, where)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def encode(*pairs: Pair, tokenizer: Any, **options: Any) -> tuple[list[EncodedPair], DataReport]:
    report, ends = DataReport(), options.pop("end_token_ids", ())
    limit = options.pop("max_length", 10_000)
    encoder = Encoder(tokenizer, DataSection(train="x", **options), max_length=limit, report=report, end_token_ids=ends)
    return encoder.encode(pairs), report


def texts(encoded: EncodedPair, tokenizer: Any) -> tuple[str, str, str]:
    return tuple(tokenizer.decode(ids.tolist()) for ids in (encoded.prompt_ids, encoded.chosen_ids, encoded.rejected_ids))


def test_plain_text_is_cut_after_the_prompt_and_ended_with_eos(tokenizer: Any) -> None:
    (encoded,), report = encode(pair_of("ab", "c", " d"), tokenizer=tokenizer)
    assert texts(encoded, tokenizer) == ("ab", "c<e>", " d<e>")
    assert {ids.dtype for ids in (encoded.prompt_ids, encoded.chosen_ids, encoded.rejected_ids)} == {np.dtype("int32")}
    assert report.noted == {}


def test_a_token_across_the_border_belongs_to_the_answers_and_is_counted() -> None:
    tokenizer = build_tokenizer(merges=(("b", "c"),))
    (encoded,), report = encode(pair_of("ab", "cd", "xd"), tokenizer=tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoded.prompt_ids.tolist()) == ["a"]
    assert tokenizer.convert_ids_to_tokens(encoded.chosen_ids.tolist()) == ["bc", "d", "<e>"]
    assert tokenizer.convert_ids_to_tokens(encoded.rejected_ids.tolist()) == ["b", "x", "d", "<e>"]
    assert report.noted["token that spans the border of prompt and answer"] == ["x:1"]


def test_answers_that_begin_alike_do_not_lengthen_the_prompt(tokenizer: Any) -> None:
    (encoded,), _ = encode(pair_of("ab", "cde", "cdf"), tokenizer=tokenizer)
    assert texts(encoded, tokenizer)[0] == "ab"


def test_a_row_begins_with_exactly_one_bos_whether_or_not_its_text_has_it() -> None:
    tokenizer = build_tokenizer(bos="<s>")
    encoded, _ = encode(pair_of("ab", "c", "d"), pair_of("<s>ab", "c", "d"), tokenizer=tokenizer)
    assert [texts(pair, tokenizer)[0] for pair in encoded] == ["<s>ab", "<s>ab"]


def test_two_bos_in_the_text_are_an_error_that_names_the_row() -> None:
    with pytest.raises(DataError, match="x:1: begins with two BOS tokens; remove"):
        encode(pair_of("<s><s>ab", "c", "d"), tokenizer=build_tokenizer(bos="<s>"))


def test_a_template_that_writes_bos_is_in_charge_of_it() -> None:
    tokenizer = build_tokenizer(bos="<s>", template="{{ bos_token }}" + CHATML)
    (encoded,), _ = encode(pair_of("ab", "c", "d"), tokenizer=tokenizer)
    assert encoded.prompt_ids.tolist().count(tokenizer.bos_token_id) == 1


def test_a_template_that_writes_two_bos_is_an_error() -> None:
    tokenizer = build_tokenizer(bos="<s>", template="{{ bos_token }}{{ bos_token }}" + CHATML)
    with pytest.raises(DataError, match="x:1: begins with two BOS tokens"):
        encode(pair_of("ab", "c", "d"), tokenizer=tokenizer)


def test_bos_that_is_also_eos_ends_answers_and_does_not_begin_them() -> None:
    tokenizer = build_tokenizer(bos="<|e|>", eos="<|e|>")
    (encoded,), _ = encode(pair_of("ab", "c", "d"), tokenizer=tokenizer)
    assert texts(encoded, tokenizer) == ("<|e|>ab", "c<|e|>", "d<|e|>")


def test_an_empty_prompt_is_a_bos_alone_or_an_error(tokenizer: Any) -> None:
    with_bos = build_tokenizer(bos="<s>")
    (encoded,), _ = encode(pair_of("", "c", "d"), tokenizer=with_bos)
    assert texts(encoded, with_bos)[0] == "<s>"
    with pytest.raises(DataError, match="x:1: has no prompt token"):
        encode(pair_of("", "c", "d"), tokenizer=tokenizer)


@pytest.mark.parametrize("pair", [
    pair_of("Hi", "yes", "no"),
    pair_of((turn("user", "Hi"),), (turn("assistant", "yes"),), (turn("assistant", "no"),)),
    pair_of(ASK, " yes", " no"),
], ids=["text", "messages", "transcript"])  # fmt: skip
def test_a_chat_template_gives_text_messages_and_transcripts_the_same_ids(chat_tokenizer: Any, pair: Pair) -> None:
    (encoded,), _ = encode(pair, tokenizer=chat_tokenizer)
    assert texts(encoded, chat_tokenizer) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "yes<|im_end|>", "no<|im_end|>")  # fmt: skip


def test_a_transcript_is_raw_text_in_plain_mode(chat_tokenizer: Any) -> None:
    (encoded,), _ = encode(pair_of(ASK, " yes", " no"), tokenizer=chat_tokenizer, template="plain")
    assert texts(encoded, chat_tokenizer) == (ASK, " yes<|im_end|>", " no<|im_end|>")


def test_messages_without_a_chat_template_are_an_error_with_both_remedies(tokenizer: Any) -> None:
    messages = pair_of((turn("user", "Hi"),), (turn("assistant", "yes"),), (turn("assistant", "no"),))
    with pytest.raises(DataError, match=r"x:1: .*no chat template.*instruct model.*data\.template: plain"):
        encode(messages, tokenizer=tokenizer)


def test_asking_for_a_chat_template_that_is_not_there_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"data\.template: chat: the tokenizer has no chat template"):
        encode(pair_of("a", "b", "c"), tokenizer=tokenizer, template="chat")


def test_tools_reach_the_template() -> None:
    tokenizer = build_tokenizer(template="{% if tools %}{{ tools[0]['name'] }}{% endif %}" + CHATML)
    pair = Pair("Hi", "yes", "no", None, [{"name": "find"}], "x:1")
    (encoded,), _ = encode(pair, tokenizer=tokenizer)
    assert texts(encoded, tokenizer)[0].startswith("find<|im_start|>")


def test_a_think_block_of_the_template_is_scored_and_remarked() -> None:
    tokenizer = build_tokenizer(template=THINK_IN_ANSWERS, eos="<|im_end|>")
    (encoded,), report = encode(pair_of("Hi", "yes", "no"), tokenizer=tokenizer)
    assert texts(encoded, tokenizer)[1] == "<think>\n\n</think>\n\nyes<|im_end|>"
    assert report.remarks == [
        "the chat template writes '<think>\\n\\n</think>\\n\\n' (19 characters) between the generation prompt and the "
        "answer; they are scored as part of both answers"
    ]


def test_a_generation_prompt_that_answers_do_not_have_is_cut_and_counted() -> None:
    tokenizer = build_tokenizer(template=THINK_IN_GENERATION_PROMPT, eos="<|im_end|>")
    (encoded,), report = encode(pair_of("Hi", "yes", "no"), tokenizer=tokenizer)
    assert texts(encoded, tokenizer)[0].endswith("<|im_start|>assistant\n")
    assert texts(encoded, tokenizer)[1] == "yes<|im_end|>"
    assert len(report.noted["rendered answer that does not begin with the rendered prompt"]) == 1
    assert "not prefix-preserving: its generation prompt ends with '<think>\\n' (8 characters)" in report.remarks[0]


def test_a_template_that_refuses_a_row_is_an_error_in_its_words() -> None:
    tokenizer = build_tokenizer(template="{{ raise_exception('no system turns here') }}")
    with pytest.raises(DataError, match=r"x:1: is refused by the chat template \(no system turns here\)"):
        encode(pair_of("Hi", "yes", "no"), tokenizer=tokenizer)


@pytest.mark.parametrize("pair", [
    pair_of("Hi<|im_end|>\n<|im_start|>assistant", "yes", "no"),
    pair_of((turn("user", "Hi"),), (turn("assistant", "a<|im_end|>"),), (turn("assistant", "no"),)),
])  # fmt: skip
def test_a_control_token_in_a_text_is_an_error_with_row_token_and_remedy(chat_tokenizer: Any, pair: Pair) -> None:
    with pytest.raises(DataError, match=r"x:1: .*control token '<\|im_end\|>'.*remove it.*data\.template: plain"):
        encode(pair, tokenizer=chat_tokenizer)


def test_rows_with_control_tokens_are_dropped_and_counted_when_asked(chat_tokenizer: Any) -> None:
    pairs = pair_of("<|im_start|>", "yes", "no"), pair_of("Hi", "yes", "no", "x:2")
    encoded, report = encode(*pairs, tokenizer=chat_tokenizer, bad_rows="drop")
    assert [pair.where for pair in encoded] == ["x:2"]
    assert len(report.dropped["malformed"]) == 1


def test_an_answer_that_brings_its_end_token_gets_no_second_one(tokenizer: Any) -> None:
    (encoded,), _ = encode(pair_of("ab", "c<e>", "d<e> \n"), tokenizer=tokenizer)
    assert texts(encoded, tokenizer)[1:] == ("c<e>", "d<e>")


def test_an_end_token_before_more_text_is_not_the_end(tokenizer: Any) -> None:
    (encoded,), _ = encode(pair_of("ab", "c<e>x", "d"), tokenizer=tokenizer)
    assert texts(encoded, tokenizer)[1] == "c<e>x<e>"


def test_further_end_tokens_end_an_answer_without_eos_after_them() -> None:
    tokenizer = build_tokenizer(template=CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (encoded,), _ = encode(pair_of("Hi", "yes", "no"), tokenizer=tokenizer, end_token_ids=[end])
    assert texts(encoded, tokenizer)[1] == "yes<|im_end|>"
    (encoded,), _ = encode(pair_of("Hi", "yes", "no"), tokenizer=tokenizer)
    assert texts(encoded, tokenizer)[1] == "yes<|im_end|>\n<e>"


def test_a_tokenizer_without_eos_is_remarked_and_nothing_is_appended() -> None:
    tokenizer = build_tokenizer(eos=None)
    (encoded,), report = encode(pair_of("ab", "c", "d"), tokenizer=tokenizer)
    assert texts(encoded, tokenizer) == ("ab", "c", "d")
    assert "no EOS token" in report.remarks[0]


def test_empty_and_identical_answers_are_dropped_by_name(tokenizer: Any) -> None:
    pairs = pair_of("a", " \n", "b"), pair_of("a", "b", "b", "x:2"), pair_of("a", "b", "b<e>", "x:3")
    encoded, report = encode(*pairs, tokenizer=tokenizer)
    assert encoded == []
    assert report.dropped["empty answer"] == ["x:1"]
    assert report.dropped["identical answers"] == ["x:2", "x:3"]


def test_a_pair_of_max_length_tokens_stays_and_one_more_is_dropped(tokenizer: Any) -> None:
    pairs = pair_of("abc", "de", "f"), pair_of("abcd", "de", "f", "x:2")  # 3 + 3 and 4 + 3 tokens, EOS counted
    encoded, report = encode(*pairs, tokenizer=tokenizer, max_length=6)
    assert [pair.where for pair in encoded] == ["x:1"]
    assert report.dropped["longer than max_length"] == ["x:2"]


def test_a_truncated_prompt_keeps_bos_its_end_and_whole_answers() -> None:
    tokenizer = build_tokenizer(bos="<s>")
    (encoded,), report = encode(pair_of("abcdef", "gh", "i"), tokenizer=tokenizer, max_length=6, overlong="truncate_prompt")
    assert texts(encoded, tokenizer) == ("<s>ef", "gh<e>", "i<e>")
    assert report.noted["prompt cut at its beginning"] == ["x:1"]


@pytest.mark.parametrize(("max_length", "kept"), [(5, 1), (4, 0)])
def test_a_truncated_prompt_keeps_at_least_one_token_besides_bos(max_length: int, kept: int) -> None:
    pair = pair_of("abcdef", "gh", "i")  # <s>f + gh<e> = 5 tokens
    encoded, report = encode(pair, tokenizer=build_tokenizer(bos="<s>"), max_length=max_length, overlong="truncate_prompt")
    assert len(encoded) == kept
    assert len(report.dropped) == 1 - kept


def test_overlong_pairs_are_one_error_with_their_count_when_asked(tokenizer: Any) -> None:
    pairs = [pair_of("abcdef", "g", "h", f"x:{row}") for row in range(1, 31)]
    with pytest.raises(DataError, match=r"data\.max_length: 5: 30 pairs are longer \(up to 8 tokens\): x:1, x:2.*raise it"):
        encode(*pairs, tokenizer=tokenizer, max_length=5, overlong="error")


def test_answers_of_several_turns_are_noted(chat_tokenizer: Any) -> None:
    (encoded,), report = encode(pair_of(ASK, " a\n\nHuman: b\n\nAssistant: c", " d"), tokenizer=chat_tokenizer)
    assert texts(encoded, chat_tokenizer)[1] == (
        "a<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\nc<|im_end|>")  # fmt: skip
    assert len(report.noted["an answer of several turns, the assistant's scored"]) == 1


def test_progress_reaches_the_number_of_pairs(tokenizer: Any) -> None:
    calls: list[tuple[str, int, int]] = []
    pairs = [pair_of("a", "b", "c" if row else "", f"x:{row}") for row in range(300)]
    with showing(lambda *call: calls.append(call)):
        encode(*pairs, tokenizer=tokenizer)
    assert calls == [("encoding", 256, 300), ("encoding", 300, 300)]


def test_the_data_hash_changes_with_ids_margin_and_order_and_not_with_names(tokenizer: Any) -> None:
    one, two = pair_of("a", "b", "c"), pair_of("a", "c", "b")
    renamed, weighted = pair_of("a", "b", "c", "y:9"), Pair("a", "b", "c", 1.0, None, "x:1")
    hashes = [data_hash(encode(*pairs, tokenizer=tokenizer)[0]) for pairs in
              ([one, two], [renamed, two], [two, one], [weighted, two], [one])]  # fmt: skip
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4


PLAIN = build_tokenizer(bos="<s>", merges=(("b", "c"), ("a", "b"), ("bc", "a")))
CHAT = build_tokenizer(template=CHATML, eos="<|im_end|>", merges=(("b", "c"), ("a", "b"), ("bc", "a")))
TEXT = st.text(alphabet="abc \né中", min_size=1, max_size=12)


@given(prompt=TEXT, chosen=TEXT, rejected=TEXT)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.slow
def test_prompt_and_answer_decode_to_the_text_that_was_tokenized(prompt: str, chosen: str, rejected: str) -> None:
    chatml = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>"
    for tokenizer, form in ((PLAIN, "<s>{}{}<e>"), (CHAT, chatml)):
        encoded, _ = encode(pair_of(prompt, chosen, rejected), tokenizer=tokenizer)
        for pair in encoded:
            for answer, ids in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
                whole = [*pair.prompt_ids.tolist(), *ids.tolist()]
                assert tokenizer.decode(whole) == form.format(prompt, answer)


@given(prompt=TEXT, chosen=TEXT, rejected=TEXT)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_swapping_the_answers_swaps_their_ids_and_keeps_the_prompt(prompt: str, chosen: str, rejected: str) -> None:
    there, _ = encode(pair_of(prompt, chosen, rejected), tokenizer=PLAIN)
    back, _ = encode(pair_of(prompt, rejected, chosen), tokenizer=PLAIN)
    assert [pair.prompt_ids.tolist() for pair in there] == [pair.prompt_ids.tolist() for pair in back]
    assert [pair.chosen_ids.tolist() for pair in there] == [pair.rejected_ids.tolist() for pair in back]

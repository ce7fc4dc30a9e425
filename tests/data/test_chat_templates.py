"""What chat templates do to a pair: what they leave out is found, what they want is given, their clock and arguments hold."""

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoded_pairs import encode, pair_of, turn
from toy_tokenizers import CHATML, build_tokenizer

from pe_dpo.data import DataReport, Encoder, Pair
from pe_dpo.data.arrival import lost_parts
from pe_dpo.data.template import Template, foreign_template, set_template
from pe_dpo.errors import DataError
from pe_dpo.recipe import DataSection

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern", "days": 3}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": {}}}]
# as Qwen3: tool calls as JSON, reasoning of the last turn alone
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and m.reasoning_content and loop.last %}"
    "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' and not loop.last else m.content %}"
    "{{ said }}{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>' + c.function.name + ' ' + c.function.arguments | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def answer(content: str, **more: Any) -> tuple[dict[str, Any], ...]:
    return (turn("assistant", content, **more),)


def decoded(ids: Any, template: str = CHATML) -> str:
    return str(build_tokenizer(template=template, eos="<|im_end|>").decode(ids.tolist()))


# ------------------------------------------------------------------------------------------------------------- what is lost


@pytest.mark.parametrize(("lost", "what"), [
    (answer("", tool_calls=[CALL]), "tool calls"),
    (answer("I will look.", tool_calls=[CALL]), "tool calls"),
    (answer("Yes.", reasoning_content="They ask."), "reasoning"),
    (answer("Yes.", thinking="They ask."), "reasoning"),
])  # fmt: skip
def test_an_answer_that_loses_something_is_one_error_with_all_its_rows(lost: Any, what: str) -> None:
    pairs = [pair_of(lost, where=f"x:{row}") for row in range(1, 13)]
    with pytest.raises(DataError) as error:
        encode(*pairs, pair_of(answer("Yes.")))
    assert str(error.value) == (
        f"12 answers with {what} that the chat template does not write (x:1, x:2, x:3, ...); take a template that writes them "
        "(data.template: file.jinja), or leave such rows out with data.bad_rows: drop"
    )


def test_rows_that_lose_something_are_dropped_by_name_when_asked() -> None:
    pairs = pair_of(answer("", tool_calls=[CALL])), pair_of(answer("Yes."), where="x:2")
    encoded, report = encode(*pairs, bad_rows="drop")
    assert [one.where for one in encoded] == ["x:2"]
    assert report.dropped == {"answers with tool calls that the chat template does not write": ["x:1"]}


def test_pairs_that_differ_only_in_what_is_lost_are_not_called_identical() -> None:
    pair = pair_of(answer("12", reasoning_content="3 * 4 is 12."), answer("12", reasoning_content="no idea"))
    with pytest.raises(
        DataError, match="1 answers that differ only in their reasoning, which the chat template does not write"
    ):
        encode(pair)
    encoded, report = encode(pair, template=THINKING)
    assert decoded(encoded[0].chosen_ids) == "<think>\n3 * 4 is 12.\n</think>\n\n12<|im_end|>"
    assert report.dropped == report.noted == {}


def test_thoughts_within_the_text_that_a_template_cuts_are_lost_and_other_white_space_is_not() -> None:
    cutting = CHATML.replace("m['content'] +", "m['content'].split('</think>')[-1].strip() +")
    with pytest.raises(DataError, match="answers with reasoning that the chat template does not write"):
        encode(pair_of(answer("<think>\nadd\n</think>\n\n4")), template=cutting)
    encoded, _ = encode(pair_of(answer("  4 \n")), template=cutting)
    assert decoded(encoded[0].chosen_ids) == "4<|im_end|>"


def test_what_the_history_loses_is_counted_and_used() -> None:
    history = (turn("user", "2+2?"), turn("assistant", "<think>\nadd\n</think>\n\n4"), turn("user", "3+3?"))
    called = (turn("user", "Hi"), *answer("", tool_calls=[CALL]), turn("tool", "Sunny."))
    pairs = pair_of(answer("6"), prompt=history), pair_of(answer("6"), prompt=called, tools=TOOLS, where="x:2")
    encoded, report = encode(pairs[0], template=THINKING)
    assert "add" not in decoded(encoded[0].prompt_ids)
    assert report.noted == {"reasoning of the prompt that the chat template does not write": ["x:1"]}
    _, report = encode(pairs[1])
    assert report.noted == {
        "tool calls of the prompt that the chat template does not write": ["x:2"],
        "tools that the chat template does not write": ["x:2"],
    }
    no_system = "{% for m in messages if m.role != 'system' %}" + CHATML.split("%}", 1)[1]
    _, report = encode(pair_of(answer("6"), prompt=(turn("system", "Be kind."), turn("user", "Hi"))), template=no_system)
    assert report.noted == {"system turn of the prompt that the chat template does not write": ["x:1"]}


def test_a_system_turn_that_is_written_only_before_an_answer_is_trained_on_as_it_is_served() -> None:
    """As Mistral's templates, which put it before the last message where that is the user's."""
    mistral = (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
        "{{ '[U]' + (system + ' ' if loop.last and system else '') + m.content + '[/U]' }}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    prompt = (turn("system", "Be kind."), turn("user", "Hi"))
    encoded, report = encode(pair_of(answer("Yes."), prompt=prompt), template=mistral)
    assert decoded(encoded[0].prompt_ids) == "[U]Be kind. Hi[/U]"
    assert [decoded(ids) for ids in (encoded[0].chosen_ids, encoded[0].rejected_ids)] == ["Yes.<|im_end|>", "No.<|im_end|>"]
    kept = "prompt of which the chat template writes a part only before an answer, trained on as it is served"
    assert report.noted == {kept: ["x:1"]}
    several = (*answer("a"), turn("user", "b"), *answer("c"))
    encoded, report = encode(pair_of(several, prompt=prompt), template=mistral)
    (one,) = encoded
    assert decoded(one.prompt_ids) == "[U]Be kind. Hi[/U]"
    assert one.chosen_scored is not None and decoded(one.chosen_ids[one.chosen_scored]) == "a<|im_end|>c<|im_end|>"
    encoded, report = encode(pair_of(answer("Yes."), prompt=prompt), template=mistral, score="everything")
    assert decoded(np.concatenate([encoded[0].prompt_ids, encoded[0].chosen_ids])) == "[U]Hi[/U]Yes.<|im_end|>"
    assert report.noted["system turn of the prompt that the chat template does not write"] == ["x:1"]


@pytest.mark.parametrize(("turns", "rendered", "lost"), [
    ([turn("user", "yes"), turn("assistant", "yes"), turn("user", "yes")], "yes yes", [(2, "text")]),
    ([turn("user", "a b")], "a  \n b", []),
    ([turn("user", "Hi"), *answer("<think>add</think>4"), turn("user", "3+3?"), *answer("We add.")], "Hi 4 3+3? We add.",
     [(1, "reasoning")]),
    (answer("12", reasoning_content="3 * 4 is 12."), "3 * 4 is 12. 12", []),
    (answer("I call weather.", tool_calls=[CALL]), "I call weather.", [(0, "tool calls")]),
    (answer("4 is it", reasoning_content="4"), "4 is it", [(0, "reasoning")]),
    (answer("yes", reasoning_details=[{"type": "reasoning.text", "text": "hm"}]), "yes", [(0, "reasoning")]),
    ([*answer("a", thinking="ab a b"), turn("user", "b")], "ab a b a b", []),
    ([turn("system", "Be kind."), turn("user", "Hi")], "[INST] Be kind.\n\nHi [/INST]", []),
    ([turn("user", "Hi"), turn("system", "Be kind.")], "Be kind. Hi", []),
    (answer("", tool_calls=[CALL]), "weather(city='Bern', days=3)", []),
    (answer("", tool_calls=[CALL]), '{"name": "weather", "arguments": "{\\"city\\": \\"Bern\\", \\"days\\": 3}"}', []),
    (answer("", tool_calls=[CALL]), "weather(city='Bern')", [(0, "tool calls")]),
    (answer('say "é"\n'), '{"content": "say \\"\\u00e9\\""}', []),
    (answer("", tool_calls=[{"function": {"name": "f", "arguments": {"on": True, "no": None, "x": [1.5, "q"]}}}]),
     "f on=True no x=[1.5, 'q']", []),
], ids=range(15))  # fmt: skip
def test_parts_are_looked_up_in_order_in_every_way_of_writing_them(turns: Any, rendered: str, lost: Any) -> None:
    assert lost_parts(turns, rendered) == lost


# ---------------------------------------------------------------------------------------------------- what a template wants


def test_arguments_of_tool_calls_are_text_where_a_template_puts_them_together_with_text() -> None:
    wants_text = CHATML.replace("m['content'] +", "m['content'] + (m.tool_calls[0].function.name + ' ' + "
                                "m.tool_calls[0].function.arguments if m.tool_calls else '') +")  # fmt: skip
    encoded, report = encode(pair_of(answer("", tool_calls=[CALL])), template=wants_text)
    assert decoded(encoded[0].chosen_ids) == 'weather {"city": "Bern", "days": 3}<|im_end|>'
    assert report.noted == {}


def test_content_is_a_list_of_parts_where_a_template_reads_parts() -> None:
    wants_parts = CHATML.replace("m['content']", "m['content'][0]['text']")
    encoded, _ = encode(pair_of(answer("Yes.")), template=wants_parts)
    assert (decoded(encoded[0].prompt_ids), decoded(encoded[0].chosen_ids)) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yes.<|im_end|>")  # fmt: skip


def test_answers_go_on_with_the_assistant_turn_that_ends_a_prompt() -> None:
    prompt = (turn("user", "Write JSON"), *answer("{ "))
    encoded, report = encode(pair_of(answer('"a": 1}'), answer("no"), prompt=prompt))
    assert decoded(encoded[0].prompt_ids) == "<|im_start|>user\nWrite JSON<|im_end|>\n<|im_start|>assistant\n{ "
    assert [decoded(ids) for ids in (encoded[0].chosen_ids, encoded[0].rejected_ids)] == ['"a": 1}<|im_end|>', "no<|im_end|>"]
    assert report.noted == {}
    with pytest.raises(DataError, match="does not write the assistant turn that ends the prompt as it is"):
        encode(
            pair_of(answer("b"), prompt=(turn("user", "Hi"), *answer("so "))),
            template=CHATML.replace("m['content'] +", "m['content'].upper() +"),
        )


def test_the_reasoning_of_a_turn_that_ends_a_prompt_goes_with_it() -> None:
    prompt = (turn("user", "Hi"), turn("assistant", "", reasoning_content="hm"))
    encoded, _ = encode(pair_of(answer("yes"), answer("no"), prompt=prompt), template=THINKING)
    assert decoded(encoded[0].prompt_ids).endswith("<|im_start|>assistant\n<think>\nhm")
    assert decoded(encoded[0].chosen_ids) == "\n</think>\n\nyes<|im_end|>"
    with pytest.raises(DataError, match="x:1: the chat template does not write the assistant turn that ends the prompt"):
        encode(pair_of(answer("yes"), answer("no"), prompt=prompt))
    prompt = (turn("user", "Hi"), turn("assistant", "Well, ", reasoning_content="hm"))
    with pytest.raises(DataError, match="answers with reasoning that the chat template does not write"):
        encode(pair_of(answer("yes"), answer("no"), prompt=prompt))
    with pytest.raises(DataError, match="x:1: the prompt ends with a tool call without its result"):
        encode(pair_of(answer("yes"), prompt=(turn("user", "Hi"), *answer("", tool_calls=[CALL]))), template=THINKING)


def test_an_answer_of_reasoning_alone_is_no_empty_one() -> None:
    encoded, report = encode(pair_of(answer("", reasoning_content="hm")), template=THINKING)
    assert decoded(encoded[0].chosen_ids) == "<think>\nhm\n</think>\n\n<|im_end|>"
    assert report.dropped == {}


def test_keys_of_messages_that_no_template_reads_are_named() -> None:
    _, report = encode(pair_of(answer("yes", score=1, id="a"), prompt=(turn("user", "Hi", weight=0.5),)), ignore=["id"])
    assert report.unread_columns == ["score (of messages)", "weight (of messages)"]


@pytest.mark.parametrize("written", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_a_template_under_the_name_that_it_reads(written: str, read: str) -> None:
    template = CHATML.replace("m['content'] +", f"(m.{read} or '') + m['content'] +")
    encoded, _ = encode(pair_of(answer("Yes.", **{written: "Hm. "})), template=template)
    assert decoded(encoded[0].chosen_ids) == "Hm. Yes.<|im_end|>"


@pytest.mark.parametrize("body", ["{{ messages[0].content.nothing() }}", "{{ messages['x' * 2].y }}", "{{ 1 / 0 }}",
                                  "{{ messages[0].content | int + messages[0].content }}"])  # fmt: skip
def test_every_error_of_a_template_is_a_line_with_the_row(body: str) -> None:
    with pytest.raises(DataError, match=r"^x:1: is refused by the chat template \(.*\); see which roles and turns it wants"):
        encode(pair_of(answer("Yes.")), template=body)


# --------------------------------------------------------------------------------------------------------- date, arguments


CLOCK = "{{ strftime_now('%d %b %Y, %-d/%m/%y') if strftime_now is defined else 'no clock' }}" + CHATML


def test_a_template_with_a_clock_writes_the_date_of_the_recipe_or_of_today_and_says_it() -> None:
    encoded, report = encode(pair_of(answer("Yes.")), template=CLOCK, template_date=date(2024, 7, 6))
    assert decoded(encoded[0].prompt_ids).startswith("06 Jul 2024, 6/07/24<|im_start|>")
    assert report.template_date == "2024-07-06"
    assert "which writes the date: 2024-07-06" in report.lines()[1]
    encoded, report = encode(pair_of(answer("Yes.")), template=CLOCK)
    assert decoded(encoded[0].prompt_ids).startswith(date.today().strftime("%d %b %Y, "))
    assert report.template_date == date.today().isoformat()
    _, report = encode(pair_of(answer("Yes.")))
    assert report.template_date is None


def test_a_template_of_ones_own_and_its_arguments_become_the_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("\n{% if loud %}LOUD {% endif %}{{ name }}" + CHATML, encoding="utf-8")
    settings = DataSection(train="x", template=str(tmp_path / "own.jinja"), template_args={"loud": False, "name": 'a "q" é\n'})
    tokenizer = build_tokenizer(template=CHATML, eos="<|im_end|>")
    set_template(tokenizer, settings)
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = type(tokenizer).from_pretrained(tmp_path / "saved")
    messages = [turn("user", "Hi")]
    for one in (tokenizer, saved):
        assert one.apply_chat_template(messages, tokenize=False) == '\na "q" é\n<|im_start|>user\nHi<|im_end|>\n'
        assert one.apply_chat_template(messages, tokenize=False, loud=True).startswith("\nLOUD a")
    template = Template(tokenizer, settings)
    assert template.render(messages, args={"name": "b"}) == "\nb<|im_start|>user\nHi<|im_end|>\n"


def test_arguments_in_a_column_count_for_their_row_alone() -> None:
    template = "{% if shout %}!{% endif %}" + CHATML
    pairs = pair_of(answer("Yes."), template_args={"shout": True}), pair_of(answer("Yes."), where="x:2")
    encoded, _ = encode(*pairs, template=template)
    assert [decoded(one.prompt_ids)[0] for one in encoded] == ["!", "<"]


def test_an_argument_that_the_template_never_reads_is_an_error() -> None:
    template = "{% if enable_thinking %}!{% endif %}" + CHATML
    with pytest.raises(
        DataError, match=r"data\.template_args: the chat template never reads enable_thinkng; did you mean enable_thinking"
    ):
        set_template(build_tokenizer(template=template), DataSection(train="x", template_args={"enable_thinkng": False}))
    with pytest.raises(DataError, match="x:1: column 'chat_template_kwargs': the chat template never reads zzz; leave it out"):
        encode(pair_of(answer("Yes."), template_args={"zzz": 1}), template=template)


def test_control_tokens_that_are_not_called_special_are_found_where_the_template_writes_them() -> None:
    tokenizer = build_tokenizer(template="{% for m in messages %}{{ '<｜User｜>' + m.content }}{% endfor %}", eos="<e>")
    tokenizer.add_tokens(["<｜User｜>", "<|fim_prefix|>"])
    encoder = Encoder(tokenizer, DataSection(train="x"), max_length=99, report=DataReport())
    with pytest.raises(DataError, match="x:1: column 'chosen' holds the control token '<｜User｜>' as text"):
        encoder.encode([pair_of(answer("yes<｜User｜>more"))])
    assert len(encoder.encode([pair_of(answer("the token <|fim_prefix|>"))])) == 1


@pytest.mark.parametrize(("settings", "line"), [
    ({"template": "nowhere.jinja"}, "data.template: nowhere.jinja cannot be read"),
    ({"template_args": {"a": 1}, "template": "plain"}, "data.template_args: there is no chat template that could take them"),
])  # fmt: skip
def test_a_template_or_arguments_that_cannot_be_used_are_an_error(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(DataError, match=line):
        set_template(build_tokenizer(template=CHATML), DataSection(train="x", **settings))


# ------------------------------------------------------------------------------------------------- other templates, prefixes


@pytest.mark.parametrize(("text", "name"), [
    ("[INST] Hi [/INST]", "Llama 2's [INST]"),
    ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "ChatML's <|im_start|>"),
    ("<|start_header_id|>user<|end_header_id|>\n\nHi", "Llama 3's <|start_header_id|>"),
    ("<start_of_turn>user\nHi", "Gemma's <start_of_turn>"),
    ("### Instruction:\nHi\n\n### Response:\n", "Alpaca's ### Response:"),
    ("A chat. USER: Hi ASSISTANT:", "Vicuna's USER: … ASSISTANT:"),
    ("### Human: Hi\n### Assistant:", "tags such as Human: and Assistant:"),
    ("User: Hi\n\nAssistant:", "tags such as Human: and Assistant:"),
    ("Write ### Response: into the form. [Inst]", None),
    ("Human: Hi\nAssistant: yes\nHuman: and?", "tags such as Human: and Assistant:"),
    ("Question: is 5 prime? Name the Human: Assistant ratio.", None),
    ("User: what does 'Assistant:' mean?", None),
    ("Human: a novel\n\nSummarize.", None),
])  # fmt: skip
def test_texts_that_another_template_wrote_are_told(text: str, name: str | None) -> None:
    assert foreign_template([text], [], own="{{ messages }}") == name
    assert foreign_template([text], [], own=text, is_chat=False) is None


@pytest.mark.parametrize("end", ["</s>", "<|eot_id|>", "<end_of_turn>\n", "<|endoftext|>"])
def test_answers_that_end_with_the_end_token_of_another_model_are_told(end: str) -> None:
    assert foreign_template(["Hi"], ["Yes.", "No." + end], own=CHATML) == end.strip()
    assert foreign_template(["Hi"], ["Yes." + end], own=CHATML + end.strip()) is None
    assert foreign_template(["Hi"], ["Yes." + end], own="", is_chat=False) is None
    assert foreign_template(["Hi"], ["<s>Yes." + end], own=CHATML) is None  # HTML


def test_tags_of_ones_own_template_are_told_where_they_would_be_written_twice() -> None:
    llama2 = "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content }}{% endfor %}"
    pair = Pair("[INST] Hi [/INST]", "Yes.", "No.", None, None, "x:1")
    _, report = encode(pair, template=llama2)
    assert report.noted["text that is already written with a chat template (Llama 2's [INST])"] == ["x:1"]


@pytest.mark.parametrize(("form", "text"), [("%e %b %Y", " 5 Mar 2026"), ("%-I:%M %F", "12:00 2026-03-05"), ("%j%%", "064%")])
def test_every_directive_of_a_clock_is_the_dates(form: str, text: str) -> None:
    template = f"{{{{ strftime_now('{form}') }}}}" + CHATML
    encoded, _ = encode(pair_of(answer("Yes.")), template=template, template_date=date(2026, 3, 5))
    assert decoded(encoded[0].prompt_ids).startswith(text + "<|im_start|>")


@pytest.mark.parametrize(("args", "line"), [
    ({"add_generation_prompt": True}, "add_generation_prompt is set by the program; leave it out"),
    ({"enable_thinking": "False"}, "enable_thinking is the text 'False', which a template takes for true; write false"),
])  # fmt: skip
def test_arguments_that_cannot_mean_what_they_say_are_an_error(args: dict[str, Any], line: str) -> None:
    template = "{% if enable_thinking %}!{% endif %}" + CHATML
    with pytest.raises(DataError, match=f"x:1: column 'chat_template_kwargs': {line}"):
        encode(pair_of(answer("Yes."), template_args=args), template=template)
    with pytest.raises(DataError, match=f"data.template_args: {line}"):
        set_template(build_tokenizer(template=template), DataSection(train="x", template_args=args))


def test_text_that_a_tokenizer_does_not_know_is_counted() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"hi": 0, "yes": 1, "no": 2, "[UNK]": 3, "<e>": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer, report = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="<e>"), DataReport()
    pairs = Pair("hi", " yes", " no", None, None, "x:1"), Pair("hi", " yes 中文", " no", None, None, "x:2")
    Encoder(tokenizer, DataSection(train="x"), max_length=9, report=report).encode(pairs)
    assert report.noted == {"text that the tokenizer does not know, read as its unknown token": ["x:2"]}


def test_a_foreign_template_is_a_line_of_the_report_and_ones_own_is_not() -> None:
    alpaca = Pair("### Instruction:\nHi\n\n### Response:\n", "Yes.", "No.", None, None, "x:1")
    _, report = encode(alpaca)
    assert report.noted == {"text that is already written with a chat template (Alpaca's ### Response:)": ["x:1"]}
    written = Pair("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yes.<|im_end|>", "No.", None, None, "x:1")
    report = DataReport()
    plain = DataSection(train="x", template="plain")
    encoder = Encoder(build_tokenizer(template=CHATML, eos="<|im_end|>"), plain, max_length=99, report=report)
    (encoded,) = encoder.encode([written])
    assert decoded(encoded.chosen_ids) == "Yes.<|im_end|>"
    assert report.noted == {}


def test_plain_text_begins_with_all_that_the_tokenizer_puts_before_it() -> None:
    from tokenizers import processors

    tokenizer = build_tokenizer(bos="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]"]})
    mask = tokenizer.convert_tokens_to_ids("[gMASK]")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <s> $A <e>",
        special_tokens=[("[gMASK]", mask), ("<s>", tokenizer.bos_token_id), ("<e>", tokenizer.eos_token_id)],
    )
    for prompt in ("Hi", "<s>Hi", "[gMASK]<s>Hi"):
        encoder = Encoder(tokenizer, DataSection(train="x"), max_length=99, report=DataReport())
        (encoded,) = encoder.encode([Pair(prompt, "Yes.", "No.", None, None, "x:1")])
        assert tokenizer.decode(encoded.prompt_ids.tolist()) == "[gMASK]<s>Hi"
        assert tokenizer.decode(encoded.chosen_ids.tolist()) == "Yes.<e>"
    encoder = Encoder(tokenizer, DataSection(train="x", overlong="truncate_prompt"), max_length=9, report=DataReport())
    (encoded,) = encoder.encode([Pair("abcdefgh", "Yes.", "No.", None, None, "x:1")])
    assert tokenizer.decode(encoded.prompt_ids.tolist()) == "[gMASK]<s>gh"


def test_control_tokens_in_tools_are_found_as_those_in_messages() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "ends <|im_end|> here"}}]
    with pytest.raises(DataError, match=r"x:1: column 'tools' holds the control token '<\|im_end\|>' as text"):
        encode(pair_of(answer("Yes."), tools=tools))


@pytest.mark.parametrize(("prompt", "chosen", "noted"), [
    ("ab", "c", False), ("<s>ab", "c<e>", False), ("a<s>b", "c", True), ("ab", "<e>old<e> c", True), ("ab <e>", "c", True),
])  # fmt: skip
def test_control_tokens_within_plain_text_are_counted(prompt: str, chosen: str, noted: bool) -> None:
    report = DataReport()
    encoder = Encoder(build_tokenizer(bos="<s>"), DataSection(train="x"), max_length=99, report=report)
    encoder.encode([Pair(prompt, chosen, "no", None, None, "x:1")])
    assert report.noted == ({"control token within plain text, read as that token": ["x:1"]} if noted else {})

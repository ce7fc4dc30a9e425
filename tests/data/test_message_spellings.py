"""Messages as people write them: roles, typed parts, tool calls, nulls of Arrow, and messages written as text."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from paths_to_pairs import load_pairs, prepare_pairs
from toy_tokenizers import CHATML, build_tokenizer

from pe_dpo.data.messages import read_messages, read_tools
from pe_dpo.data.pairs import RowError
from pe_dpo.errors import DataError

USER = {"role": "user", "content": "Hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
CALLING = (
    "{%- if tools %}{{- '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{%- for c in m.tool_calls or [] %}{{- '<call>' + (c.function | tojson) + '</call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML that writes tools and calls."""


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


ARROW = [
    {"prompt": [USER], "chosen": [{"role": "assistant", "content": "", "tool_calls": [call("weather", city="Bern")]}],
     "rejected": [NO], "tools": [tool("weather", city={"type": "string", "enum": ["Bern", "Basel"]})]},
    {"prompt": [USER], "chosen": [{"role": "assistant", "content": "", "tool_calls": [call("calc", digits=3)]}],
     "rejected": [NO], "tools": [tool("calc", digits={"type": "integer", "default": 2})]},
]  # fmt: skip
"""Rows whose keys differ, so that Arrow gives each the keys of all with nulls."""


@pytest.mark.parametrize(("written", "role"), [
    ("model", "assistant"), ("bot", "assistant"), ("chatgpt", "assistant"), ("gpt", "assistant"), ("gpt-4", "assistant"),
    ("Assistant", "assistant"),
    ("AI", "assistant"), ("Human", "user"), ("USER", "user"), ("prompter", "user"), ("System", "system"), ("ipython", "tool"),
    ("tool_response", "tool"), ("observation", "tool"), ("function", "tool"),
])  # fmt: skip
@pytest.mark.parametrize("keys", [
    ("role", "content"), ("from", "value"), ("speaker", "text"), ("role", "value"), ("role", "message"),
])  # fmt: skip
def test_roles_that_people_write_are_read(written: str, role: str, keys: tuple[str, str]) -> None:
    assert read_messages([dict(zip(keys, (written, "x"), strict=True))], "prompt") == ({"role": role, "content": "x"},)


def test_a_role_that_nobody_knows_is_an_error_with_those_that_are_known() -> None:
    with pytest.raises(
        RowError, match=r"column 'prompt\[1\]' has the role 'doctor'; write one of system, .*user, human, .* in"
    ):
        read_messages([USER, {"role": "doctor", "content": "x"}], "prompt")


@pytest.mark.parametrize(("message", "found"), [
    ({"name": "user", "body": "Hi"}, "has the keys name, body"),
    ({"role": "user", "body": "Hi"}, "has no content, only role, body"),
    ({"role": "user", "content": None}, "content' is null"),
    ({"role": "user", "content": {"a": 1}}, "content' is an object"),
])  # fmt: skip
def test_what_is_no_message_is_said_as_what_it_is(message: dict[str, Any], found: str) -> None:
    with pytest.raises(RowError, match=found):
        read_messages([message], "prompt")


@pytest.mark.parametrize("content", [
    [{"type": "text", "text": "Hi"}], [{"type": "text", "value": "Hi"}], [{"text": "Hi"}], [{"value": "Hi"}], ["Hi"],
    [{"type": "text", "text": "H", "image": None}, {"type": "text", "text": "i", "image_url": None}],
    [{"type": "text", "text": {"value": "Hi", "annotations": []}}], [{"type": "input_text", "text": "Hi"}],
])  # fmt: skip
def test_typed_parts_are_joined(content: list[Any]) -> None:
    assert read_messages([{"role": "user", "content": content}], "prompt") == (USER,)


def test_parts_of_gemini_and_a_system_column_of_bedrock_are_read(write_lines: Callable[..., Path]) -> None:
    row = {"system": [{"text": "Be kind."}], "prompt": [{"role": "user", "parts": [{"text": "Hi"}]}],
           "chosen": [{"role": "model", "parts": [{"text": "yes"}]}], "rejected": [NO]}  # fmt: skip
    (pair,), report = load_pairs(write_lines(row))
    assert (pair.prompt, pair.chosen) == (({"role": "system", "content": "Be kind."}, USER), (YES,))
    assert report.unread_columns == []


@pytest.mark.parametrize(("part", "name"), [
    ({"type": "image"}, "image"), ({"type": "image_url", "image_url": {"url": "x"}}, "image_url"),
    ({"image": "x.png"}, "image"), ({"type": "text", "text": "x", "image": "x.png"}, "image"),
    ({"type": "thinking"}, "thinking"),
    ({"type": "input_audio", "input_audio": {}}, "input_audio"), ({"toolUse": {}}, "toolUse"),
])  # fmt: skip
def test_parts_that_are_no_text_are_refused_by_their_name(part: dict[str, Any], name: str) -> None:
    with pytest.raises(RowError, match=rf"column 'prompt\[0\]\.content' has a part that is not text \({name}\); only text"):
        read_messages([{"role": "user", "content": [part, {"type": "text", "text": "?"}]}], "prompt")


@pytest.mark.parametrize("message", [
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}, "type":
                                                           "function"}]},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]},
    {"role": "assistant", "tool_calls": [{"name": "f", "parameters": {"x": 1}}]},
    {"role": "assistant", "tool_calls": {"name": "f", "arguments": {"x": 1}}},
    {"role": "assistant", "tool_calls": '[{"name": "f", "arguments": {"x": 1}}]'},
    {"role": "assistant", "tool_calls": ['{"name": "f", "arguments": {"x": 1}}']},
    {"role": "assistant", "tool_calls": '[{"name": "f", "arguments": {"x": 1}, "function": null}]'},
    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
    {"role": "assistant", "content": [], "tool_calls": [{"name": "f", "arguments": {"x": 1, "y": None}}]},
    {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'},
    {"from": "function_call", "value": '{"name": "f", "arguments": "{\\"x\\": 1}"}'},
    {"from": "function_call", "value": [{"name": "f", "arguments": {"x": 1}}]},
])  # fmt: skip
def test_every_spelling_of_a_call_becomes_the_same_call(message: dict[str, Any]) -> None:
    assert read_messages(message, "chosen") == ({"role": "assistant", "content": "", "tool_calls": [call("f", x=1)]},)


def test_a_function_that_is_null_is_a_description_without_an_envelope() -> None:
    told = {"name": "f", "parameters": {"x": {"default": None}}}
    assert read_tools(json.dumps([{**told, "function": None}]), "tools") == [told]


@pytest.mark.parametrize("turns", [
    [{"from": "function_call", "value": '[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]'}],
    [{"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'},
     {"role": "tool_call", "content": '{"name": "g"}'}],
    [{"role": "assistant", "content": "", "tool_calls": [call("f", x=1), call("g")]}],
])  # fmt: skip
def test_parallel_calls_are_one_turn(turns: list[Any]) -> None:
    assert read_messages(turns, "chosen") == ({"role": "assistant", "content": "", "tool_calls": [call("f", x=1), call("g")]},)


def test_a_call_belongs_to_what_the_assistant_says_before_it() -> None:
    turns = [
        {"from": "gpt", "value": "I will look."},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ]
    assert read_messages(turns, "chosen") == ({"role": "assistant", "content": "I will look.", "tool_calls": [call("f", x=1)]},)


@pytest.mark.parametrize("calls", [[], None, "", "[]", "null"])
def test_an_empty_list_of_calls_is_none(calls: Any) -> None:
    assert read_messages([{**YES, "tool_calls": calls}], "chosen") == (YES,)


@pytest.mark.parametrize(("content", "text"), [
    ({"t": 5, "unit": "°C"}, '{"t": 5, "unit": "°C"}'), ([{"t": 5}], '[{"t": 5}]'), ([{"type": "text", "text": "5"}], "5"),
])  # fmt: skip
def test_what_a_tool_returned_as_an_object_is_written_as_json(content: Any, text: str) -> None:
    assert read_messages([{"role": "tool", "content": content}], "prompt") == ({"role": "tool", "content": text},)


@pytest.mark.parametrize(("message", "found"), [
    ({"role": "tool_call", "content": "x"}, "a function call that is not JSON"),
    ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, "a tool call without function and name"),
    ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x"}]}, "tool call arguments that are not JSON"),
    ({"role": "assistant", "tool_calls": 5}, "tool_calls that are the number 5"),
])  # fmt: skip
def test_calls_that_are_none_are_errors(message: dict[str, Any], found: str) -> None:
    with pytest.raises(RowError, match=rf"column 'chosen\[0\]' has {found}"):
        read_messages([message], "chosen")


@pytest.mark.parametrize("tools", [
    [{"name": "f"}], '[{"name": "f"}]', ['{"name": "f"}'], [{"name": "f", "strict": None}], "[{'name': 'f', 'strict': None}]",
])  # fmt: skip
def test_tools_are_read_as_objects_and_as_text(tools: Any) -> None:
    assert read_tools(tools, "tools") == [{"name": "f"}]


@pytest.mark.parametrize("tools", [[], "[]", "null", "", None, " ", float("nan"), "nan", "None"])
def test_an_empty_list_of_tools_is_none(write_lines: Callable[..., Path], tools: Any) -> None:
    (pair,), report = load_pairs(write_lines({"prompt": [USER], "chosen": [YES], "rejected": [NO], "tools": tools}))
    assert (pair.tools, report.unread_columns) == (None, [])


@pytest.mark.parametrize("tools", ["{", ["{"], {"name": "f"}, 5])
def test_tools_that_are_none_are_an_error(tools: Any) -> None:
    with pytest.raises(RowError, match=r"column 'tools(\[0\])?' .* function description"):
        read_tools(tools, "tools")


@pytest.mark.parametrize(("function", "found"), [("f", "text"), (["f"], "a list"), (1.5, "the number 1.5")])
def test_a_tool_whose_function_is_no_object_is_an_error(function: Any, found: str) -> None:
    with pytest.raises(RowError, match=rf"column 'tools\[1\].function' is {found}; an object with name, description and"):
        read_tools([{"name": "f"}, {"function": function}], "tools")


def test_the_same_rows_give_the_same_ids_from_every_format(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ARROW))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ARROW), tmp_path / "x.parquet")
    datasets.Dataset.from_list(ARROW).save_to_disk(str(tmp_path / "saved"))
    texts = [{**row, "tools": [json.dumps(one) for one in row["tools"]]} for row in ARROW]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ARROW[0])
        writer.writeheader()
        writer.writerows({name: json.dumps(cell) for name, cell in row.items()} for row in ARROW)
    with (tmp_path / "repr.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ARROW[0])
        writer.writeheader()
        writer.writerows({name: repr(cell) for name, cell in row.items()} for row in ARROW)
    tokenizer = build_tokenizer(template=CALLING, eos="<|im_end|>")
    found = {}
    for name in ("x.jsonl", "x.parquet", "saved", "texts.jsonl", "x.csv", "repr.csv"):
        train = prepare_pairs(tmp_path / name, tokenizer=tokenizer, max_length=999, eval=0).train
        found[name] = [tokenizer.decode([*pair.prompt_ids, *pair.chosen_ids]) for pair in train]
        assert found[name] == found["x.jsonl"], name
    assert "None" not in found["saved"][0]
    assert found["saved"][0].endswith('<call>{"name": "weather", "arguments": {"city": "Bern"}}</call><|im_end|>')
    assert '"properties": {"city": {"type": "string", "enum": ["Bern", "Basel"]}}' in found["saved"][0]


def test_messages_written_as_text_give_the_ids_of_messages(write_lines: Callable[..., Path]) -> None:
    row = {"prompt": [USER], "chosen": [{"role": "assistant", "content": 'it\'s "x"\n'}], "rejected": [NO]}
    tokenizer = build_tokenizer(template=CHATML, eos="<|im_end|>")
    ids = []
    for write in (lambda cell: cell, json.dumps, repr, lambda cell: json.dumps(cell, indent=1)):
        (pair,) = prepare_pairs(write_lines({name: write(cell) for name, cell in row.items()}), tokenizer=tokenizer,
                                max_length=999, eval=0).train  # fmt: skip
        ids.append([*pair.prompt_ids, *pair.chosen_ids])
    assert ids[0] == ids[1] == ids[2] == ids[3]


def test_messages_written_as_text_are_said(write_lines: Callable[..., Path]) -> None:
    row = {"prompt": json.dumps([USER]), "chosen": json.dumps(YES), "rejected": "no"}
    (pair,), report = load_pairs(write_lines({**row, "rejected": json.dumps(NO)}))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), (YES,), (NO,))
    assert report.shape.endswith("; messages written as text in prompt, chosen, rejected")


def test_whole_dialogues_conversations_and_openai_are_read_from_text_too(write_lines: Callable[..., Path]) -> None:
    shapes = (
        {"chosen": json.dumps([USER, YES]), "rejected": json.dumps([USER, NO])},
        {"conversations": repr([USER]), "chosen": "yes", "rejected": "no"},
        {"messages": repr([USER, YES]), "rejected_response": "no"},
        {"messages": json.dumps([USER, YES]), "rejected_messages": json.dumps([USER, NO])},
        {"input": json.dumps({"messages": [USER]}), "preferred_output": repr([YES]), "non_preferred_output": repr([NO])},
    )
    for row in shapes:
        (pair,), _ = load_pairs(write_lines(row))
        assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), (YES,), (NO,)), row


@pytest.mark.parametrize("printed", [
    "[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': 'yes'}]",
    "array([{'role': 'user', 'content': 'Hi'}], dtype=object)",
    "[{'role': 'user', 'content': 'Hi'",
])  # fmt: skip
def test_messages_as_numpy_prints_them_are_refused_by_name(write_lines: Callable[..., Path], printed: str) -> None:
    path = write_lines({"prompt": printed, "chosen": "yes", "rejected": "no"})
    with pytest.raises(DataError, match=r"train\.jsonl:1: column 'prompt' is .*as NumPy and pandas print it; save the"):
        load_pairs(path)


def test_a_row_of_text_in_a_column_of_messages_as_text_is_malformed(write_lines: Callable[..., Path]) -> None:
    rows = [{"prompt": json.dumps([USER]), "chosen": "yes", "rejected": "no"}] * 2 + [
        {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    ]
    with pytest.raises(DataError, match=r"train\.jsonl:3: column 'prompt' is 'Hi': neither JSON nor a Python list"):
        load_pairs(write_lines(*rows))


@pytest.mark.parametrize(
    "text", ['[{"role": "admin", "content": "x"}]', '{"name": "user"}', "[1, 2]", "[INST] Hi [/INST]", "{"]
)
def test_text_that_only_looks_a_little_like_messages_stays_text(write_lines: Callable[..., Path], text: str) -> None:
    assert load_pairs(write_lines({"prompt": text, "chosen": text + "!", "rejected": "no"}))[0][0].prompt == text


@pytest.mark.parametrize("missing", ["nan", "NaN", "None", "null", " nan\n", "<NA>"])
@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_a_missing_value_as_an_answer_is_an_error(write_lines: Callable[..., Path], missing: str, column: str) -> None:
    row = {"prompt": "Hi", "chosen": "yes", "rejected": "no", column: missing}
    with pytest.raises(
        DataError, match=rf"train\.jsonl:1: column '{column}' is the text '{missing.strip()}', which stands where"
    ):
        load_pairs(write_lines(row))
    with pytest.raises(DataError, match="which stands where a value was missing"):
        load_pairs(write_lines({"prompt": [USER], "chosen": [YES], "rejected": [{"role": "assistant", "content": missing}]}))


def test_a_missing_value_as_a_prompt_is_an_error(write_lines: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"column 'question' is the text 'nan', which stands where a value was missing"):
        load_pairs(write_lines({"question": "nan", "chosen": "yes", "rejected": "no"}))


def test_an_answer_that_speaks_of_none_is_an_answer(write_lines: Callable[..., Path]) -> None:
    assert load_pairs(write_lines({"prompt": "Hi", "chosen": "None of them.", "rejected": "nan is a number"}))[0]


def test_calls_under_both_names_are_one_where_they_are_equal_and_else_refused() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    (turn,) = read_messages([message | {"function_call": {"name": "f", "arguments": '{"x": 1}'}}], "chosen")
    assert turn == message
    with pytest.raises(RowError, match=r"'chosen\[0\]' has tool_calls and another function_call; write all calls into tool_"):
        read_messages([message | {"function_call": {"name": "g", "arguments": "{}"}}], "chosen")

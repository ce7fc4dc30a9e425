"""Small inputs, each with the shape of a public report: read as the pair that they say, or answered with one line."""

import os
from pathlib import Path
from typing import Any

import pytest
from paths_to_pairs import load_pairs

from pe_dpo.errors import DataError

CASES = Path(os.environ.get("PE_DPO_SHARED", Path(__file__).resolve().parents[2].parent / "shared")) / "cases" / "data"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not CASES.is_dir(), reason="no reported cases: set PE_DPO_SHARED to a folder with cases/data"),
]

OTTO = "u:My dog is called Otto. a:Nice name. u:He is two years old. a:Still young. u:"
READ = {
    "01-history/pairs.jsonl": (f"{OTTO}How old is he?", "a:Otto is two.", "a:I do not know."),
    "01-history/prompt.jsonl": (f"{OTTO}How old is he?", "a:Otto is two.", "a:I do not know."),
    "01-history/medical.jsonl": (f"s:Be short. {OTTO}How old is he?", "a:Otto is two.", "a:I do not know."),
    "05-empty-toolcalls/pairs.jsonl": ("u:Hi", "a:Hello!", "a:What"),
    "06-messages-as-text/json.csv": ("u:Say hi", "a:Hi!", "a:No."),
    "06-messages-as-text/strings.jsonl": ("u:Say hi", "a:Hi!", "a:No."),
    "08-list-output/pairs.jsonl": ("Say hi", "Hi!", "No."),
    "10-input-lost/pairs.jsonl": ("s:You check data. u:Is this text polite?\n\nGive me that!", "a:No.", "a:Yes."),
    "10-input-lost/plain_names.jsonl": ("s:You check data. u:Is this text polite?\n\nGive me that!", "a:No.", "a:Yes."),
    "15-prompt-vs-dialogue/pairs.jsonl": ("s:Be kind. u:Hi", "a:Hello!", "a:Go."),
    "15-prompt-vs-dialogue/system_col.jsonl": ("s:Be kind. u:Hi", "a:Hello!", "a:Go."),
    "15-prompt-vs-dialogue/text.jsonl": ("s:Be kind. u:Hi", "a:Hello!", "a:Go."),
    "18-roles/model.jsonl": ("u:Hi a:x u:and?", "a:Hello!", "a:Go."),
    "18-roles/bot.jsonl": ("u:Hi a:x u:and?", "a:Hello!", "a:Go."),
    "18-roles/Human.jsonl": ("u:Hi u:x u:and?", "a:Hello!", "a:Go."),
    "18-roles/USER.jsonl": ("u:Hi u:x u:and?", "a:Hello!", "a:Go."),
    "18-roles/sharegpt_model.jsonl": ("u:Hi", "a:a", "a:b"),
    "18-roles/tool_response.jsonl": ("u:Hi t:x u:and?", "a:Hello!", "a:Go."),
    "19-swift/rejected_messages.jsonl": ("u:Hi", "a:Hello!", "a:Go."),
    "19-swift/rejected_multi.jsonl": ("u:Hi a:Hello! u:More?", "a:Sure.", "a:No."),
    "19-swift/rejected_response.jsonl": ("u:Hi", "a:Hello!", "a:Go."),
    "20-parallel-call/pairs.jsonl": ("u:Weather in Bern and Basel?", "a: w{'c': 'Bern'} w{'c': 'Basel'}", "a:Sunny."),
    "20-parallel-call/flat_call.jsonl": ("u:Weather?", "a: w{'c': 'Bern'}", "a:Sunny."),
    "22-typed-parts/bedrock.jsonl": ("u:Hi", "a:Hello!", "a:Go."),
    "22-typed-parts/trl.jsonl": ("u:Hi", "a:Hello!", "a:Go."),
    "22-typed-parts/twoparts.jsonl": ("u:Hiyou", "a:Hello!", "a:Go."),
    "25-columns/conversation.jsonl": ("u:Hi", "a:Hello!", "a:Go."),
    "25-columns/orca.jsonl": ("s:Be kind. u:Hi", "a:Hello!", "a:Go."),
    "26-label-column/named.jsonl": ("Hi", "Hello!", "Go."),
    "27-prefill/pairs.jsonl": ("u:Write JSON a:{", 'a:"a":1}', "a:no"),
    "30-shapes/axolotl_assistant.jsonl": ("u:Where is the red box? a:It stands by the door. u:Behind the shelf.",
                                          "a:Name a round fruit.", "a:An orange."),
    "30-shapes/axolotl_custom.jsonl": ("u:Where is the red box? a:It stands by the door. u:Behind the shelf.",
                                       "a:Name a round fruit.", "a:An orange."),
    "30-shapes/swift_doc_1.jsonl": ("s:Where is the red box? u:It stands by the door.", "a:Behind the shelf.",
                                    "a:Name a round fruit."),
}  # fmt: skip
ANSWERED = {
    "08-list-output/lists.jsonl": "lists.jsonl:1: column 'rejected' is a list of 2 texts; one answer is expected",
    "09-answer-object/pairs.jsonl": "data: {columns: {prompt: question, chosen: pos_answer, rejected: neg_answer}}",
    "18-roles/tool_call.jsonl": "tool_call.jsonl:1: column 'prompt[1]' has a function call that is not JSON",
    "25-columns/helpsteer3.jsonl": "{prompt: context, chosen: response1, rejected: response2, winner: overall_preference}",
    "25-columns/shp.jsonl": '{prompt: history, chosen: human_ref_A, rejected: human_ref_B, winner: "labels = 1"}',
    "25-columns/ultrafeedback.jsonl": "'completions' is a list of answers, and no column map can say which two",
    "29-empty-system/pairs.jsonl": "pairs.jsonl:2: column 'prompt' is a list; text, as in the first rows, is expected",
    "30-shapes/swift_doc_3.jsonl": "swift_doc_3.jsonl:1: 'images' has content, and pe-dpo trains on text alone",
    "30-shapes/trl_doc_3.jsonl": "add column 'prompt'",
    "31-vision-part/pairs.jsonl": "pairs.jsonl:1: column 'prompt[0].content' has a part that is not text (image)",
    "32-margin/pairs.jsonl": "pairs.jsonl:1: column 'margin' is 'high'; a finite number is expected",
    "34-null-tail/pairs.jsonl": "pairs.jsonl:26: column 'rejected' is null; text, as in the first rows, is expected",
}


def shown(side: Any) -> str:
    """A side in short: each turn with the first letter of its role and its calls."""
    if isinstance(side, str):
        return side
    calls = [[call["function"] for call in turn.get("tool_calls", ())] for turn in side]
    called = ["".join(f" {one['name']}{one['arguments']}" for one in some) for some in calls]
    return " ".join(f"{turn['role'][0]}:{turn['content']}{call}" for turn, call in zip(side, called, strict=True))


@pytest.mark.parametrize("name", READ)
def test_a_reported_case_is_read_as_what_it_says(name: str) -> None:
    pair = load_pairs(CASES / name)[0][0]
    assert (shown(pair.prompt), shown(pair.chosen), shown(pair.rejected)) == READ[name]


@pytest.mark.parametrize("name", ANSWERED)
def test_a_reported_case_is_answered_with_what_was_found(name: str) -> None:
    with pytest.raises(DataError) as raised:
        load_pairs(CASES / name)
    assert ANSWERED[name] in str(raised.value)


@pytest.mark.parametrize("name", sorted(str(path.relative_to(CASES)) for path in CASES.glob("*/*")) if CASES.is_dir() else [])
def test_no_reported_case_is_answered_with_more_than_a_screen(name: str) -> None:
    try:
        load_pairs(CASES / name)
    except DataError as error:
        assert len(str(error)) < 80 * 20
        assert len(str(error).splitlines()) < 20


def test_tools_of_parquet_are_those_of_json_lines() -> None:
    one, other = (load_pairs(CASES / "02-arrow-tools" / f"pairs.{suffix}")[0] for suffix in ("jsonl", "parquet"))
    assert [(pair.chosen, pair.tools) for pair in one] == [(pair.chosen, pair.tools) for pair in other]
    (written,), _ = load_pairs(CASES / "02-arrow-tools" / "tools_strings.jsonl")
    assert written.tools == one[0].tools


def test_scores_of_a_reported_case_are_named() -> None:
    _, report = load_pairs(CASES / "17-scores" / "pairs.jsonl")
    assert report.noted == {"scores that contradict the labels": ["pairs.jsonl:1"], "scores that are equal": ["pairs.jsonl:2"]}


def test_empty_tools_of_a_reported_case_are_none() -> None:
    pairs, _ = load_pairs(CASES / "28-tools-empty" / "pairs.jsonl")
    assert [pair.tools for pair in pairs] == [None] * 5

"""Real tokenizers with their real templates: what of a dialogue is read and scored, decoded token by token.

`make tokenizers` fetches them (some 100 MB) and runs these tests; without them they are skipped.
"""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pe_dpo.data import DataReport, EncodedPair, Encoder, Pair
from pe_dpo.errors import DataError
from pe_dpo.recipe import DataSection

FOLDER = Path(__file__).parents[2] / ".tokenizers"
ENDS = {"llama3_1": [128001, 128008, 128009], "llama3_2": [128001, 128008, 128009], "gemma3": [1, 106]}
"""As in the generation config of their models."""
CALL = {"type": "function", "id": "aBcDeFgHi", "function": {"name": "w", "arguments": {"city": "Bern"}}}
SUNNY = {"role": "tool", "content": "Sunny", "tool_call_id": "aBcDeFgHi", "name": "w"}


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def encode(name: str, prompt: Any, chosen: Any, **settings: Any) -> tuple[EncodedPair, Any]:
    if not (FOLDER / name / "tokenizer.json").is_file():
        pytest.skip("needs real tokenizers: make tokenizers")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
    section = DataSection(train="x", **settings)
    encoder = Encoder(tokenizer, section, max_length=9999, report=DataReport(), end_token_ids=ENDS.get(name, ()))
    rejected = "No." if isinstance(chosen, str) else (turn("assistant", "No."),)
    (encoded,) = encoder.encode([Pair(prompt, chosen, rejected, None, None, "x:1")])
    return encoded, tokenizer


def marked(encoded: EncodedPair, tokenizer: Any) -> str:
    """The chosen answer, what is not scored in braces."""
    scored = encoded.chosen_scored if encoded.chosen_scored is not None else [True] * len(encoded.chosen_ids)
    pieces = [tokenizer.decode([index]) for index in encoded.chosen_ids.tolist()]
    return "".join(piece if kept else "{" + piece + "}" for piece, kept in zip(pieces, scored, strict=True)).replace("}{", "")


HI = (turn("user", "Hi"),)
SEVERAL = (turn("assistant", "a"), turn("user", "b"), turn("assistant", "c"))
CALLED = (turn("assistant", "", tool_calls=[CALL]), SUNNY, turn("assistant", "It is."))


@pytest.mark.parametrize(("name", "text"), [
    ("deepseek_v3", "a<｜end▁of▁sentence｜>{<｜User｜>b<｜Assistant｜>}c<｜end▁of▁sentence｜>"),
    ("gemma3", "a<end_of_turn>{\n<start_of_turn>user\nb<end_of_turn>\n<start_of_turn>model\n}c<end_of_turn>"),
    ("llama3_1", "a<|eot_id|>{<|start_header_id|>user<|end_header_id|>\n\nb<|eot_id|>"
                 "<|start_header_id|>assistant<|end_header_id|>\n\n}c<|eot_id|>"),
    ("mistral_nemo", "a</s>{[INST]b[/INST]}c</s>"),
    ("qwen2_5", "a<|im_end|>{\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n}c<|im_end|>"),
    ("qwen3", "a<|im_end|>{\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n}<think>\n\n</think>\n\nc<|im_end|>"),
])  # fmt: skip
def test_the_users_turn_within_an_answer_is_not_scored(name: str, text: str) -> None:
    encoded, tokenizer = encode(name, HI, SEVERAL)
    assert marked(encoded, tokenizer) == text


@pytest.mark.parametrize(("name", "text"), [
    ("llama3_2", '{"name": "w", "parameters": {"city": "Bern"}}<|eot_id|>[<|start_header_id|>ipython<|end_header_id|>\n\n'
                 '"Sunny"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n]It is.<|eot_id|>'),
    ("mistral_nemo", '[TOOL_CALLS][{"name": "w", "arguments": {"city": "Bern"}, "id": "aBcDeFgHi"}]</s>'
                     '[[TOOL_RESULTS]{"content": Sunny, "call_id": "aBcDeFgHi"}[/TOOL_RESULTS]]It is.</s>'),
    ("qwen2_5", '<tool_call>\n{"name": "w", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>[\n<|im_start|>user\n'
                "<tool_response>\nSunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n]It is.<|im_end|>"),
])  # fmt: skip
def test_a_tool_call_is_scored_and_what_the_tool_answers_is_not(name: str, text: str) -> None:
    encoded, tokenizer = encode(name, HI, CALLED)
    scored = encoded.chosen_scored
    assert scored is not None
    pieces = [tokenizer.decode([index]) for index in encoded.chosen_ids.tolist()]
    found = "".join(piece if kept else f"\0{piece}\1" for piece, kept in zip(pieces, scored, strict=True)).replace("\1\0", "")
    assert found.replace("\0", "[").replace("\1", "]") == text


@pytest.mark.parametrize("name", ["gemma3", "deepseek_v3", "llama3_1"])
def test_an_answer_with_a_tool_call_that_a_template_does_not_write_is_an_error(name: str) -> None:
    with pytest.raises(DataError, match=r"tool calls that the chat template does not write|is refused by the chat template"):
        encode(name, HI, CALLED)


@pytest.mark.parametrize(("name", "prompt", "answer"), [
    ("gemma", "<bos>Hi there", "Yes.<eos>"), ("llama2", "<s> Hi there", "Yes.</s>"), ("llama3_1", "<|begin_of_text|>Hi there",
     "Yes.<|eot_id|>"), ("qwen3", "Hi there", "Yes.<|im_end|>"), ("mistral_nemo", "<s>Hi there", "Yes.</s>"),
])  # fmt: skip
def test_plain_text_begins_and_ends_as_the_tokenizer_puts_it(name: str, prompt: str, answer: str) -> None:
    encoded, tokenizer = encode(name, "Hi there", "Yes.", template="plain")
    assert tokenizer.decode(encoded.prompt_ids.tolist()) == prompt
    assert tokenizer.decode(encoded.chosen_ids.tolist()).lstrip() == answer


def test_an_argument_of_qwen3s_template_reaches_its_generation_prompt() -> None:
    from pe_dpo.data.template import Template, set_template

    _, tokenizer = encode("qwen3", HI, SEVERAL)
    settings = DataSection(train="x", template_args={"enable_thinking": False})
    set_template(tokenizer, settings)
    assert Template(tokenizer, settings).render(HI, opens=True).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")

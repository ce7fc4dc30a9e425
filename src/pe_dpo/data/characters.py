"""What stands in for a tokenizer where none was given: every character is a token, and turns are written one below another."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pe_dpo.data.arrival import ANY_REASONING

END = 0x110000
"""The id that ends an answer: the first number that is no character."""


class Characters:
    """As much of a transformers tokenizer as data are prepared with; its chat template leaves nothing out."""

    bos_token = bos_token_id = unk_token = unk_token_id = None
    eos_token, eos_token_id = "␃", END
    all_special_tokens: tuple[str, ...] = ()
    added_tokens_decoder: Mapping[int, Any] = {}
    chat_template: str | None = "[role]\ncontent"

    def __call__(self, texts: str | Sequence[str], **options: Any) -> dict[str, Any]:
        """Return the code points of a text, or of several."""
        if isinstance(texts, str):
            return {"input_ids": list(map(ord, texts))}
        return {"input_ids": [list(map(ord, text)) for text in texts]}

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        """Return the text of some code points."""
        return "".join(self.eos_token if number == END else chr(number) for number in ids)

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str | None:
        """Return that of all messages."""
        return self.chat_template

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, add_generation_prompt: bool = False, **options: Any
    ) -> str:
        """Return messages as text, with their calls and reasoning; scores and ids are not said by anyone."""
        written = [f"[tools]\n{json.dumps(tools, ensure_ascii=False)}"] if tools else []
        for turn in messages:
            more = (
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                for key, value in turn.items()
                if key == "tool_calls" or ANY_REASONING.search(key)
            )
            written.append(f"[{turn['role']}]\n" + "\n".join(filter(None, (*more, turn["content"]))))
        return "\n".join([*written, *(["[assistant]\n"] if add_generation_prompt else [])])

"""What chat templates leave out of a pair: `python tools/template_losses.py FOLDER` prints the table of docs/chat-templates.md.

FOLDER holds templates as .jinja files, such as the folder `chat_templates` of TRL. Each is put on a tokenizer of bytes and is
given one answer of each kind.
"""

import sys
from pathlib import Path
from typing import Any

from pe_dpo.data.arrival import loses_tools, lost_parts
from pe_dpo.data.pairs import Pair, RowError
from pe_dpo.data.rendering import render_pair
from pe_dpo.data.template import Template
from pe_dpo.recipe import DataSection

_ASKED = ({"role": "user", "content": "What is it like?"},)
_CALLS = [{"type": "function", "id": "aBcDeFgHi", "function": {"name": "weather", "arguments": {"city": "Bern", "days": 3}}}]
_TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "The place."}}},
        },
    }
]
_THOUGHT = "<think>\nThey ask me.\n</think>\n\nFine."
ANSWERS: dict[str, list[dict[str, Any]]] = {
    "tool call": [{"content": "", "tool_calls": _CALLS}],
    "text and call": [{"content": "I will look.", "tool_calls": _CALLS}],
    "`reasoning_content`": [{"content": "Fine.", "reasoning_content": "They ask me."}],
    "`<think>`": [{"content": _THOUGHT}],
}
COLUMNS = ("template", "system turn", "`tools`", *ANSWERS, "`<think>` of earlier turns", "answer of several turns")


def bytes_tokenizer(template: str) -> Any:
    """Return a tokenizer of bytes with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template
    )


def losses(template: Template) -> list[str]:
    """Return for each of `COLUMNS` but the name what one template does: nothing is lost (an empty text), "lost", "refused"."""

    def outcome(turns: Any, *, of_the_prompt: int = 0) -> str:
        """Whether all of some turns, of which the first `of_the_prompt` are looked at alone, is written."""
        try:
            text = template.render(turns)
        except RowError:
            return "refused"
        found = lost_parts(turns[:of_the_prompt] if of_the_prompt else turns, text)
        return "lost" if found else ""

    system = ({"role": "system", "content": "You are kind."}, *_ASKED)
    found = [outcome(system)]
    try:
        found.append("lost" if loses_tools(_TOOLS, template.render(_ASKED, tools=_TOOLS)) else "")
    except RowError:
        found.append("refused")
    for turns in ANSWERS.values():
        found.append(outcome((*_ASKED, *({"role": "assistant", **turn} for turn in turns))))
    earlier = (*_ASKED, {"role": "assistant", "content": _THOUGHT}, {"role": "user", "content": "And now?"})
    found.append(outcome((*earlier, {"role": "assistant", "content": "Good."}), of_the_prompt=3))
    several = tuple({"role": role, "content": content} for role, content in (
        ("assistant", "First."), ("user", "More?"), ("assistant", "Second.")
    ))  # fmt: skip
    try:
        rendered = render_pair(Pair(_ASKED, several, several, None, None, "probe"), template)
        spans = rendered.spans[0] or []
        found.append("" if [rendered.answered[0][slice(*span)] for span in spans] else "not told apart")
    except RowError:
        found.append("refused")
    return found


def table(folder: Path) -> str:
    """Return the Markdown table of the templates in a folder; those made for training alone (`…_training`) are left out."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS)]
    for file in sorted(folder.glob("*.jinja")):
        if not file.stem.endswith("_training"):
            template = Template(bytes_tokenizer(file.read_text(encoding="utf-8")), DataSection(train="probe"))
            rows.append((file.stem, *losses(template)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])), end="")

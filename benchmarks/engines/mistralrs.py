"""mistral.rs' worker: a model folder, a GGUF file, or with `options.base` an adapter; in float32.

Its requests are texts, and it tells the log-probs of what may come next. So each log-prob is a request of its own, with the
text of what goes before; a place whose text is not read back as the same tokens is null, in the middle of a character say. A
chat is rendered by the engine itself and gone on with.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

from mistralrs import ChatCompletionRequest, LoraAdapter, ModelDType, Runner, Which

VERBATIM = "{{ messages[0]['content'] }}"
"""The template of a text that is a prompt already."""
ALIAS = "trained"


def main(artefact: Path, request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Return the answer about an artefact."""
    base = request.get("options", {}).get("base")
    if artefact.suffix == ".gguf":
        which = Which.GGUF(str(artefact.parent), artefact.name, dtype=ModelDType.F32)
    elif base is not None:
        which = Which.Lora(base, adapters=[LoraAdapter(alias=ALIAS, source=str(artefact))], dtype=ModelDType.F32)
    else:
        which = Which.Plain(str(artefact), dtype=ModelDType.F32)
    template = scratch / "verbatim.jinja"
    template.write_text(VERBATIM, encoding="utf-8")
    runner = Runner(which, max_seqs=1, jinja_explicit=str(template), no_paged_attn=True)
    adapter, vocabulary = (None if base is None else ALIAS), request["options"]["vocabulary"]
    answer: dict[str, Any] = {"engine": "mistralrs", "version": importlib.metadata.version("mistralrs")}
    if "ids" in request:
        answer["logprobs"] = [log_probs(runner, ids, vocabulary, adapter) for ids in request["ids"]]
    if "texts" in request:
        answer["tokens"] = [runner.tokenize_text(text, False, None) for text in request["texts"]]
    if "greedy" in request:
        texts = [runner.detokenize_text(ids, False) for ids in request["greedy"]]
        answer["greedy"] = [greedy(runner, text, request["new_tokens"], adapter)[1] for text in texts]
    if "chats" in request:
        templated = Runner(which, max_seqs=1, no_paged_attn=True)
        found = [greedy(templated, chat, request["new_tokens"], adapter) for chat in request["chats"]]
        answer["chat_lengths"], answer["chat_greedy"] = [length for length, _ in found], [ids for _, ids in found]
    return answer


def log_probs(runner: Runner, ids: list[int], vocabulary: int, adapter: str | None) -> list[float | None]:
    """Return the log-prob of each token after the first, or None where what goes before is no text."""
    found: list[float | None] = []
    for place in range(1, len(ids)):
        text = runner.detokenize_text(ids[:place], False)
        if runner.tokenize_text(text, False, None) != ids[:place]:
            found.append(None)
            continue
        response = send(runner, text, 1, vocabulary, adapter)
        (first,) = response.choices[0].logprobs.content
        found.append({token.token: token.logprob for token in first.top_logprobs}[ids[place]])
    return found


def greedy(runner: Runner, prompt: Any, count: int, adapter: str | None) -> tuple[int, list[int]]:
    """Return the number of the prompt's tokens, and the likeliest tokens one after another."""
    response = send(runner, prompt, count, 1, adapter)
    return response.usage.prompt_tokens, [token.top_logprobs[0].token for token in response.choices[0].logprobs.content]


def send(runner: Runner, prompt: Any, count: int, top: int, adapter: str | None) -> Any:
    """Return mistral.rs' response to a text or a chat."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    settings = {"temperature": 0.0, "max_tokens": count, "ignore_eos": True, "logprobs": True, "top_logprobs": top}
    return runner.send_chat_completion_request(ChatCompletionRequest(messages, "default", adapter=adapter, **settings))


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    answer = main(Path(sys.argv[1]), request, Path(sys.argv[3]).parent)
    Path(sys.argv[3]).write_text(json.dumps(answer), encoding="utf-8")

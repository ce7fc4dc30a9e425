"""Golden prompts asked of a running server that speaks OpenAI's API, as llama-server, Ollama, vLLM and transformers serve do.

Prompts go through the server's own chat template and tokenizer, so that a wrong one shows. Some servers tell the token ids of
an answer: vLLM when asked (`return_token_ids`), llama-server with log-probs. Of others the text is compared.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pe_dpo.errors import UsageError
from pe_dpo.export.golden_file import GoldenMatch, GoldenPrompt, compare_answer, load_golden

SECONDS = 600
"""Of one answer; a large model on a CPU is slow."""


def compare_server(url: str, file: Path, *, model: str | None = None) -> Iterator[tuple[GoldenPrompt, GoldenMatch]]:
    """Yield the golden prompts of a file with what a server answers beside them.

    Args:
        url: of the server, with or without /v1 at its end.
        file: golden_prompts.jsonl.
        model: its name there; by default the first that the server names.

    Raises:
        DataError: the file cannot be read.
        UsageError: the server cannot be reached, or refuses a request.
    """
    address = url.rstrip("/").removesuffix("/v1")
    golden = load_golden(file)
    if model is None:
        try:
            model = _ask(f"{address}/v1/models")["data"][0]["id"]
        except (LookupError, TypeError) as error:
            raise UsageError(f"{address}/v1/models: names no model; say which one it serves") from error
    for one in golden:
        yield one, compare_answer(one, **_answer(address, model, one))


def _answer(address: str, model: str, golden: GoldenPrompt) -> dict[str, Any]:
    """Ids of the prompt and of the answer where a server tells them, and its text."""
    is_chat = golden.rendered != golden.prompt
    request: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": len(golden.token_ids)}
    if is_chat:
        request["messages"] = [{"role": "user", "content": golden.prompt}]
    else:
        request["prompt"] = golden.prompt
    path = f"{address}/v1/{'chat/completions' if is_chat else 'completions'}"
    try:
        found = _ask(path, request | {"return_token_ids": True, "logprobs": True if is_chat else 1})
    except UsageError:  # a server that refuses what it does not know
        found = _ask(path, request)
    choice = found["choices"][0]
    message = choice["message"] if is_chat else {"content": choice["text"]}
    ids = choice.get("token_ids")
    logprobs = choice.get("logprobs") or {}
    tokens = logprobs.get("content") or []
    if ids is None:
        tokens = [one for one in tokens if "id" in one]
        # llama-server leaves out tokens that are only a part of a character.
        written = b"".join(bytes(one["bytes"] or ()) for one in tokens).decode(errors="replace")
        is_whole = tokens and (message["content"] or "").strip() in written
        ids = [one["id"] for one in tokens] if is_whole else None
    thoughts = next((message[key] for key in ("reasoning_content", "reasoning") if message.get(key)), None)
    if ids is None and thoughts:
        raise UsageError(
            f"{address}: the server takes thoughts out of its answers, which are then no texts to compare; start it so that it "
            "leaves them in (llama-server: reasoning format none; vLLM: no reasoning parser)"
        )
    return {
        "prompt_ids": found.get("prompt_token_ids") or choice.get("prompt_token_ids"),
        "token_ids": ids,
        "log_probs": [one["logprob"] for one in tokens if "logprob" in one] or logprobs.get("token_logprobs") or (),
        "text": message["content"] or "",
    }


def _ask(address: str, request: dict[str, Any] | None = None) -> Any:
    body = None if request is None else json.dumps(request).encode()
    question = urllib.request.Request(address, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(question, timeout=SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:300]
        unnamed = "" if request else "; name the model that it serves"
        raise UsageError(f"{address}: the server refuses the request ({error.code}): {said}{unnamed}") from error
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UsageError(
            f"{address}: no answer of a server that speaks OpenAI's API ({error}); start it and name its address, such as "
            "http://127.0.0.1:8080"
        ) from error

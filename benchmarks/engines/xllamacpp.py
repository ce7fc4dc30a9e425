"""llama.cpp's answers about a GGUF file, asked of its own server over HTTP; xllamacpp is llama.cpp built as a package.

    python -I xllamacpp.py FILE.gguf REQUEST.json ANSWER.json

A log-prob is what /completion says of the token that it is made to choose behind a prompt of ids.
Options: `cache` f32 or f16, the numbers of the KV cache; `flash` true or false; `lora` a GGUF adapter; `completions` true for
the answers of /v1/chat/completions to `chats`, as an OpenAI client asks for them, of at most `new_tokens` tokens, and the
lengths of their prompts; `jinja` false for a template that is built into llama.cpp instead of the model's.
"""

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


def start(model: Path, options: dict[str, Any]) -> xllamacpp.Server:
    """Start a server of a model on a free port of this machine."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model if model.is_file() else next(model.glob("*.gguf")))
    parameters.n_ctx, parameters.n_parallel = 1024, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.hostnames, parameters.port = ["127.0.0.1"], 0
    parameters.use_jinja, parameters.warmup, parameters.fit_params = options.get("jinja", True), False, False
    flash = "ENABLED" if options.get("flash") else "DISABLED"
    parameters.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{flash}")
    cache = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{options.get('cache', 'f32').upper()}")
    parameters.cache_type_k = parameters.cache_type_v = cache
    if "lora" in options:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(options["lora"], 1.0)]
    return xllamacpp.Server(parameters)


class Client:
    """Asks a server.

    Args:
        address: its URL.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        # What is said of a token comes with its text: none with an end, or with a part of a character. So text is forced.
        self._text = self.post("/tokenize", content="a")["tokens"][-1]

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self._address + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return dict(json.load(response))

    def next_token(self, ids: list[int], forced: int, count: int) -> list[dict[str, Any]]:
        """Return what is said of the token behind these: its log-prob, and `count` best; nothing of one that is no text."""
        bias = [[forced, 1e6]]  # changes what is sampled, not what is reported
        found = self.post("/completion", prompt=ids, n_predict=1, n_probs=count, temperature=0, logit_bias=bias)
        return list(found.get("completion_probabilities", ()))

    def log_prob(self, ids: list[int], token: int) -> float:
        """Return the log-prob of a token behind these."""
        said = self.next_token(ids, token, 1)
        if said and said[0]["id"] == token:
            return float(said[0]["logprob"])
        row = self.next_token(ids, self._text, 1_000_000)[0]["top_logprobs"]
        return float(next(one["logprob"] for one in row if one["id"] == token))

    def continuation(self, ids: list[int], count: int) -> list[int]:
        """Return the likeliest token each time; ends do not end it."""
        new: list[int] = []
        for _ in range(count):
            new.append(self.next_token([*ids, *new], self._text, 1)[0]["top_logprobs"][0]["id"])
        return new

    def completion(self, chat: list[dict[str, str]], count: int) -> tuple[str, int]:
        """Return what an OpenAI client gets for a chat, and the number of the prompt's tokens."""
        found = self.post("/v1/chat/completions", model="any", messages=chat, temperature=0, max_tokens=count)
        return str(found["choices"][0]["message"]["content"]), int(found["usage"]["prompt_tokens"])


def main(model: Path, request: dict[str, Any]) -> dict[str, Any]:
    options = request.get("options", {})
    server = start(model, options)
    client = Client(server.listening_address)
    chats, count = request.get("chats", []), request.get("new_tokens", 0)
    answer: dict[str, Any] = {"engine": "llama.cpp", "version": xllamacpp.__version__}
    answer["logprobs"] = [
        [client.log_prob(ids[:place], ids[place]) for place in range(1, len(ids))] for ids in request.get("ids", [])
    ]
    answer["tokens"] = [
        client.post("/tokenize", content=text, add_special=False)["tokens"] for text in request.get("texts", [])
    ]
    answer["rendered"] = [client.post("/apply-template", messages=chat)["prompt"] for chat in chats]
    answer["greedy"] = [client.continuation(ids, count) for ids in request.get("greedy", [])]
    if options.get("completions"):
        completions = [client.completion(chat, count) for chat in chats]
        answer["completions"] = [text for text, _ in completions]
        answer["chat_lengths"] = [length for _, length in completions]
    return answer


if __name__ == "__main__":
    artefact, question, output = map(Path, sys.argv[1:])
    output.write_text(json.dumps(main(artefact, json.loads(question.read_text(encoding="utf-8")))), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # the server's own end sometimes waits for ever (xllamacpp 2026.10.11549)

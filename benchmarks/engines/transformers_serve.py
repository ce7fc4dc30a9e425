"""The worker of `transformers serve`: the server on a model folder, asked by the client of OpenAI.

It gives no log-probs, and texts instead of ids: prompts are gone on with by /v1/completions, chats by /v1/chat/completions.
`options.arguments` are more arguments of the server.
"""

import contextlib
import importlib.metadata
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openai import OpenAI
from transformers import AutoTokenizer

SECONDS = 120
"""Until the server must answer."""


def main(model: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer about a model folder."""
    answer: dict[str, Any] = {"engine": "transformers_serve", "version": importlib.metadata.version("transformers")}
    # The server stops at what the model's generation config says; the protocol knows no end.
    endless = json.dumps({"max_new_tokens": request.get("new_tokens", 0), "do_sample": False})
    with serving(model, request.get("options", {}).get("arguments", [])) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        settings: dict[str, Any] = {"model": model, "extra_body": {"generation_config": endless}}
        if "greedy" in request:
            tokenizer = AutoTokenizer.from_pretrained(model)
            texts = [tokenizer.decode(ids) for ids in request["greedy"]]
            found = [client.completions.create(prompt=text, **settings) for text in texts]
            answer["greedy_texts"] = [one.choices[0].text for one in found]
        if "chats" in request:
            replies = [client.chat.completions.create(messages=chat, **settings) for chat in request["chats"]]
            answer["chat_lengths"] = [one.usage.prompt_tokens for one in replies]
            answer["chat_texts"] = [one.choices[0].message.content for one in replies]
    return answer


@contextlib.contextmanager
def serving(model: str, arguments: list[str]) -> Iterator[str]:
    """Run the server on a free port, and give its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(sys.executable).parent / "transformers")
    command = [program, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    server, address = subprocess.Popen([*command, *arguments]), f"http://127.0.0.1:{port}"
    try:
        for _ in range(SECONDS * 10):
            if server.poll() is not None:
                raise SystemExit(f"the server ended with {server.returncode}")
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"{address}/health").close()
                break
            time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    Path(sys.argv[3]).write_text(json.dumps(main(sys.argv[1], request)), encoding="utf-8")

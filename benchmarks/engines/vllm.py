"""vLLM's worker: its engine in this process on a model folder; or its server, started by the command that pe-dpo prints.

| option | what it is |
|---|---|
| `dtype` | float32 by default; a printed command has its own |
| `quantization` | `bitsandbytes`: the plugin makes codes of the base, in bfloat16 alone |
| `lora`, `loras` | an adapter for all sequences; or one for each of `ids` and of `greedy`, null for the base |
| `tried` | adapters that are only loaded; `refused` in the answer says for each why it was not, or null |
| `command` | the words of a printed `vllm serve …`, run as it is but for port and eager mode; OpenAI's client asks it |

Two faults of 0.32 on a CPU are avoided: log-probs of a prompt cannot be had of several adapters in one batch (an error), and a
request for the base in a batch with one for an adapter is answered with the adapter of the last slot (no error).
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

START = 240
"""Seconds for a server to answer."""


def ask_engine(artefact: str, request: dict) -> dict:
    """Return the answer of an engine in this process."""
    from vllm import LLM, SamplingParams, __version__
    from vllm.lora.request import LoRARequest

    options = request.get("options", {})
    sequences = request.get("ids", [])
    loras = options.get("loras") or [options.get("lora")] * max(len(sequences), len(request.get("greedy", [])))
    paths = [*options.get("tried", []), *sorted({*loras} - {None})]
    known = {path: LoRARequest(path, number, path) for number, path in enumerate(paths, 1)}
    settings = {"enable_lora": True, "max_lora_rank": 64, "max_loras": len(known)} if known else {}
    settings |= {"dtype": options.get("dtype", "float32"), "quantization": options.get("quantization")}
    model = LLM(artefact, enforce_eager=True, max_num_seqs=8, **settings)
    tokenizer = model.get_tokenizer()

    def run(prompts: list[list[int]], loras: list[str | None], **sampling: object) -> list:
        asked = [known.get(lora) for lora in loras]
        parameters = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **sampling)
        return model.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, lora_request=asked, use_tqdm=False)

    answer = {"engine": "vllm", "version": __version__}
    if "tried" in options:
        answer["refused"] = [refusal(model, known[path]) for path in options["tried"]]
    if "ids" in request:
        answer["logprobs"] = []
        for ids, lora in zip(sequences, loras, strict=False):
            (output,) = run([ids], [lora], max_tokens=1, prompt_logprobs=0)
            answer["logprobs"].append(
                [row[token].logprob for row, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            )
    if "greedy" in request:
        answer["greedy"] = [[] for _ in request["greedy"]]
        for is_base in (True, False):
            numbers = [number for number in range(len(request["greedy"])) if (loras[number] is None) == is_base]
            prompts, asked = [request["greedy"][number] for number in numbers], [loras[number] for number in numbers]
            outputs = run(prompts, asked, max_tokens=request["new_tokens"])
            for number, output in zip(numbers, outputs, strict=True):
                answer["greedy"][number] = list(output.outputs[0].token_ids)
    if "texts" in request:
        answer["tokens"] = [tokenizer.encode(text, add_special_tokens=False) for text in request["texts"]]
    if "chats" in request:
        answer["rendered"] = [
            tokenizer.decode(output.prompt_token_ids)
            for output in model.chat(request["chats"], SamplingParams(max_tokens=1), use_tqdm=False)
        ]
    return answer


def refusal(model: object, adapter: object) -> str | None:
    """Return why an adapter is not loaded, None where it is; the engine's errors have no class of their own."""
    try:
        model.llm_engine.add_lora(adapter)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def ask_server(words: list[str], request: dict) -> dict:
    """Return the answer of the server that a printed command starts."""
    import openai
    import requests

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(sys.executable).parent / words[0])
    server = subprocess.Popen([program, *words[1:], "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)])
    address = f"http://127.0.0.1:{port}"
    try:
        wait(server, address)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        names = [model.id for model in client.models.list().data]
        name = "tuned" if "tuned" in names else names[0]

        def complete(ids: list[int], **extra: object) -> object:
            return client.completions.create(model=name, prompt=ids, temperature=0, extra_body={"ignore_eos": True, **extra})

        def post(path: str, **body: object) -> dict:
            found = requests.post(f"{address}/{path}", json={"model": name, **body}, timeout=60)
            found.raise_for_status()
            return found.json()

        answer = {"engine": "vllm", "version": requests.get(f"{address}/version", timeout=60).json()["version"]}
        if "ids" in request:
            answer["logprobs"] = []
            for ids in request["ids"]:
                rows = complete(ids, max_tokens=1, prompt_logprobs=0).choices[0].prompt_logprobs
                answer["logprobs"].append([row[str(token)]["logprob"] for row, token in zip(rows[1:], ids[1:], strict=True)])
        if "greedy" in request:
            count = request["new_tokens"]
            choices = [complete(ids, max_tokens=count, return_token_ids=True).choices[0] for ids in request["greedy"]]
            answer["greedy"] = [list(choice.token_ids) for choice in choices]
        if "texts" in request:
            answer["tokens"] = [post("tokenize", prompt=text, add_special_tokens=False)["tokens"] for text in request["texts"]]
        if "chats" in request:
            rendered = [post("tokenize", messages=chat)["tokens"] for chat in request["chats"]]
            answer["rendered"] = [post("detokenize", tokens=ids)["prompt"] for ids in rendered]
        return answer
    finally:
        server.terminate()
        server.wait(60)


def wait(server: subprocess.Popen, address: str) -> None:
    """Return when the server answers."""
    import requests

    end = time.monotonic() + START
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        try:
            if requests.get(f"{address}/health", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.5)
    raise SystemExit(f"the server did not answer within {START} s")


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    command = request.get("options", {}).get("command")
    found = ask_server(command, request) if command else ask_engine(sys.argv[1], request)
    Path(sys.argv[3]).write_text(json.dumps(found), encoding="utf-8")

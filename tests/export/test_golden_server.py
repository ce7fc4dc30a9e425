"""Golden prompts asked of servers of different kinds; a server here answers what it is given."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pe_dpo.cli.golden import golden as command
from pe_dpo.errors import UsageError
from pe_dpo.export.golden_file import GoldenPrompt, save_golden
from pe_dpo.export.golden_server import compare_server

SAID = GoldenPrompt(
    prompt="Tell me.", rendered="<u>Tell me.<a>", prompt_ids=[1, 2], token_ids=[10, 11, 5], text="Hi 🚀", text_ends=[2, 4, 4],
    ended=True, log_probs=[-0.1] * 3, leads=[4.0, 0.01, 1.0], near_tie=0.1,
)  # fmt: skip
PLAIN = SAID._replace(rendered=SAID.prompt)


class Toy(ThreadingHTTPServer):
    """A server whose answer to a request is what a function says; None is a refusal."""

    def __init__(self, answer: Any, models: Any = ("mine",)) -> None:
        requests: list[tuple[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(models and {"data": [{"id": name} for name in models]})

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append((self.path, request))
                self.reply(answer(request))

            def reply(self, found: Any) -> None:
                body = json.dumps(found or {"error": "unknown field"}).encode()
                self.send_response(200 if found else 422)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.url = requests, f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def serve() -> Iterator[Any]:
    servers: list[Toy] = []

    def start(*arguments: Any) -> Toy:
        servers.append(Toy(*arguments))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def verdict(server: Toy, tmp_path: Path, golden: GoldenPrompt = SAID) -> str:
    save_golden([golden], tmp_path / "golden_prompts.jsonl")
    ((_, found),) = compare_server(server.url + "/v1/", tmp_path / "golden_prompts.jsonl")
    return found.verdict


def chat(content: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content} | more.pop("message", {})} | more]}


def token(index: int, text: bytes) -> dict[str, Any]:
    return {"id": index, "bytes": list(text)}


def test_a_chat_is_asked_greedily_through_the_servers_own_template(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda request: chat(" Hi 🚀"))
    assert verdict(server, tmp_path) == "equal"
    path, request = server.requests[0]
    assert path == "/v1/chat/completions" and request["messages"] == [{"role": "user", "content": "Tell me."}]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("mine", 0, 3)


def test_a_model_without_chat_template_is_asked_for_a_completion(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda request: {"choices": [{"text": "Hi 🚀"}]})
    assert verdict(server, tmp_path, PLAIN) == "equal"
    assert server.requests[0][0] == "/v1/completions" and server.requests[0][1]["prompt"] == "Tell me."


def test_ids_of_vllm_count_before_its_text(serve: Any, tmp_path: Path) -> None:
    right = chat("Hi 🚀", token_ids=[10, 11, 5]) | {"prompt_token_ids": [1, 2]}
    assert verdict(serve(lambda request: right), tmp_path) == "equal"
    assert verdict(serve(lambda request: chat("Hi 🚀", token_ids=[9, 11, 5])), tmp_path) == "other"
    assert verdict(serve(lambda request: chat("Hi 🚀") | {"prompt_token_ids": [1, 1, 2]}), tmp_path) == "other"


def test_ids_of_llama_server_count_unless_some_are_left_out(serve: Any, tmp_path: Path) -> None:
    rocket = " 🚀".encode()
    whole = {"content": [token(10, b"Hi"), token(12, rocket), token(5, b"")]}
    assert verdict(serve(lambda request: chat("Hi 🚀", logprobs=whole)), tmp_path) == "near tie"
    far = {"content": [token(10, b"Hi") | {"logprob": -0.3}]}  # 0.2 nats off, where 0.1 may be
    assert verdict(serve(lambda request: chat("Hi", logprobs=far)), tmp_path) == "other"
    partly = {"content": [token(10, b"Hi"), token(12, rocket[3:]), token(5, b"")]}
    assert verdict(serve(lambda request: chat("Hi 🚀", logprobs=partly)), tmp_path) == "equal"


def test_a_server_that_refuses_what_it_does_not_know_is_asked_plainly(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda request: None if "return_token_ids" in request else chat("Hi 🚀"))
    assert verdict(server, tmp_path) == "equal" and len(server.requests) == 2


def test_an_answer_without_its_thoughts_is_not_compared(serve: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes thoughts out of its answers"):
        verdict(serve(lambda request: chat("Hi", message={"reasoning_content": "Hm."})), tmp_path)


def test_a_server_that_is_not_there_or_refuses_is_an_error(serve: Any, tmp_path: Path) -> None:
    save_golden([SAID], tmp_path / "golden_prompts.jsonl")
    with pytest.raises(UsageError, match=r"no answer of a server that speaks OpenAI's API"):
        list(compare_server("http://127.0.0.1:9", tmp_path / "golden_prompts.jsonl"))
    with pytest.raises(UsageError, match=r"refuses the request \(422\): .*unknown field"):
        verdict(serve(lambda request: None), tmp_path)


def test_a_server_that_names_no_model_wants_it_named(serve: Any, tmp_path: Path) -> None:
    save_golden([SAID], tmp_path / "golden_prompts.jsonl")
    server = serve(lambda request: chat("Hi 🚀") if request["model"] == "yours" else None, None)
    with pytest.raises(UsageError, match="; name the model that it serves"):
        list(compare_server(server.url, tmp_path / "golden_prompts.jsonl"))
    ((_, found),) = compare_server(server.url, tmp_path / "golden_prompts.jsonl", model="yours")
    assert found.verdict == "equal"


@pytest.mark.parametrize(("text", "code", "words"), [
    ("Hi 🚀", 0, "equal      'Tell me.'\n1 answers are the model's, 0 of them up to a near tie"),
    ("Hi there", 0, "near tie   'Tell me.': token 2 of 3 is 'there', not '🚀', which leads by 0.01 nats; below 0.1"),
    ("Hello", 1, "OTHER      'Tell me.': token 1 of 3 is 'ello', not 'i 🚀', which leads by 4 nats\n1 of 1 answers"),
])  # fmt: skip
def test_the_command_says_each_verdict_and_fails_on_another_model(
    serve: Any, tmp_path: Path, text: str, code: int, words: str
) -> None:
    save_golden([SAID], tmp_path / "golden_prompts.jsonl")
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(tmp_path), serve(lambda request: chat(text)).url])
    assert result.exit_code == code and result.output.startswith(words), result.output


def test_a_folder_without_golden_prompts_is_refused(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(tmp_path), "http://127.0.0.1:9"])
    assert isinstance(result.exception, UsageError) and "pe-dpo export writes" in str(result.exception)

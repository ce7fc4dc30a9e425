"""A hub that cannot be reached is noticed in seconds, before any client starts to retry."""

import socket
import time

import pytest

from pe_dpo.errors import ModelError
from pe_dpo.hub import hub_is_reachable, is_hub_name
from pe_dpo.model.base import inspect_base


@pytest.fixture(autouse=True)
def _looked_up_anew(monkeypatch):
    hub_is_reachable.cache_clear()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    yield
    hub_is_reachable.cache_clear()


def test_a_port_that_nobody_listens_on_is_not_reachable(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not hub_is_reachable()


def test_a_port_that_somebody_listens_on_is(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_is_reachable()


def test_offline_by_choice_is_offline(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not hub_is_reachable()


def test_behind_a_proxy_only_the_proxy_knows(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"http": "http://proxy:3128"})
    assert hub_is_reachable()


def test_a_base_on_a_hub_that_cannot_be_reached_fails_in_seconds(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(ModelError, match="nobody/nothing: no model found there"):
        inspect_base("nobody/nothing")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [("gpt2", True), ("Qwen/Qwen2.5-7B", True), ("a/b/c", False), ("./a", False), ("/a/b", False), ("a b", False)],
)
def test_names_and_paths_are_told_apart(text, expected):
    assert is_hub_name(text) is expected

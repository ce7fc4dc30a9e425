"""Text from elsewhere does not act where it is shown, and secrets are shown nowhere."""

import json
import logging
from pathlib import Path

import pytest

from pe_dpo.errors import DataError
from pe_dpo.log import PACKAGE, logged_to
from pe_dpo.printable import code_block, code_span, one_line, printable, printable_json, without_secrets

ACTING = "a\x1b[31mb\x9bc\u202ed\u2066e\r\x00\x7f\ud83df\U000e0041"
SHOWN = r"a\x1b[31mb\x9bc\u202ed\u2066e\r\x00\x7f\ud83df\U000e0041"


def test_what_would_act_is_written_out_in_errors_and_logs(tmp_path: Path) -> None:
    assert printable(ACTING) == SHOWN
    assert printable("ä\n\t中 👩\u200d🚀 [red]x") == "ä\n\t中 👩\u200d🚀 [red]x"
    assert str(DataError(f"x: column '{ACTING}'")) == f"x: column '{SHOWN}'"
    with logged_to(tmp_path / "log.txt"):
        PACKAGE.log(logging.WARNING, ACTING)
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == f"warning: {SHOWN}\n"
    assert one_line("a\n\n b " + "c" * 400) == "a b " + "c" * 296 + " […]"


def test_json_for_a_program_stays_json() -> None:
    text = printable_json(json.dumps({"column": ACTING}, ensure_ascii=False))
    assert json.loads(text) == {"column": ACTING} and text.isprintable()


@pytest.mark.parametrize("text", ["a`b", "``", "x</script>", "a\n```\n<img src=x>", "plain"])
def test_nothing_leads_out_of_markdowns_code(text: str) -> None:
    """A fence is ended by one at least as long alone on its line, a span by a run as long as its mark."""
    mark, *_, end = code_block(text, "")
    assert mark == end and all(mark not in line for line in text.split("\n")) and set(mark) == {"`"}
    span = code_span(text)
    mark = span[: len(span) - len(span.lstrip("`"))]
    assert span.endswith(mark) and mark not in span[len(mark) : -len(mark)] and "\n" not in span


def test_secrets_of_the_environment_and_passwords_in_addresses_are_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MY_TOKEN_FILE", "/home/x/token")  # a place, and no secret
    said = "GET https://me:pa55word@hub.example/x?t=hf_abcdefghijkl with 0123456789abcdef from /home/x/token at https://hub.example"
    hidden = "GET https://***@hub.example/x?t=*** with *** from /home/x/token at https://hub.example"
    assert without_secrets(said) == str(DataError(said)) == hidden

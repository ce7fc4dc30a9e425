"""Text that came from elsewhere as a terminal, a log or a page may show it: nothing in it acts, and no secret is in it.

A column name, a row, a chat template or a library's error may hold escape sequences, which a terminal obeys, marks that turn
the order of letters around, and halves of surrogate pairs, which no file takes.
"""

import json
import os
import re
from functools import cache

_ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]")
"""Control characters but line break and tab, marks of direction, ends of lines that are none in a terminal, halves of surrogate
pairs, and letters that nobody sees."""
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET = 8
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@:]*:[^/\s@]+(?=@)")
"""Name and password in front of an address's host."""
HIDDEN = "***"


def printable(text: str) -> str:
    r"""Return a text in which what would act is written out (\x1b, \u202e), and secrets are `HIDDEN`."""
    return _ACTING.sub(lambda found: found[0].encode("unicode_escape").decode(), without_secrets(text))


def one_line(text: object, *, most: int = 300) -> str:
    """Return what something is as text on one line, cut where it is long."""
    words = " ".join(printable(str(text)[: 2 * most]).split())
    return words if len(words) <= most else f"{words[:most]} […]"


def printable_json(text: str) -> str:
    """Return JSON in which what would act stands as JSON's escapes, and secrets are `HIDDEN`."""
    return _ACTING.sub(lambda found: json.dumps(found[0])[1:-1].replace("\x7f", "\\u007f"), without_secrets(text))


def code_span(text: str) -> str:
    """Return a text as Markdown's code, out of which nothing in it leads."""
    line, mark = one_line(text, most=1000), _fence(text, 1)
    return f"{mark} {line} {mark}" if "`" in line else f"`{line}`"


def code_block(text: str, language: str) -> list[str]:
    """Return the lines of a block of Markdown's code, out of which nothing in it leads."""
    mark = _fence(text, 3)
    return [f"{mark}{language}", text, mark]


def _fence(text: str, least: int) -> str:
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def without_secrets(text: str) -> str:
    """Return a text without values of the environment that are secret by their names, and without passwords in addresses."""
    for secret in _secrets(frozenset(os.environ.items())):
        text = text.replace(secret, HIDDEN)
    return _IN_ADDRESS.sub(HIDDEN, text) if "://" in text else text


@cache
def _secrets(environment: frozenset[tuple[str, str]]) -> list[str]:
    named = {value for name, value in environment if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET}
    secret = [value for value in named if not re.fullmatch(r"/[\w./-]*|\d+", value)]  # where one lies, and how many
    return sorted(secret, key=len, reverse=True)


def counted(count: int, what: str) -> str:
    """Return "1 seed", "3 seeds"."""
    return f"{count} {what}" if count == 1 else f"{count:,} {what}s"

"""A page as one HTML file: styles, plots and texts inside it, no scripts, nothing from elsewhere; its tables as markdown."""

import base64
import re
from collections.abc import Sequence
from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from pe_dpo.report.content import Page, PageTable
from pe_dpo.report.style import to_svg

LONG, SHOWN = 500, 300
"""Texts of more characters than LONG are folded behind their first SHOWN."""

SHORT = 36
"""Characters of a command that is not broken, on a phone neither."""

_CONTROLS = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C])
"""Signs that turn the direction of writing; they could make a text look like another one."""


def to_html(page: Page) -> str:
    """Return the page as an HTML document.

    Everything that is not markup of ours is escaped; signs that cannot be seen or that turn the direction of what follows
    are shown by their number. A plot is an image inside the document, so that nothing in it can act on the page.
    """
    environment = Environment(
        loader=FunctionLoader(
            lambda name: resources.files("pe_dpo.report").joinpath("templates", name).read_text(encoding="utf-8")
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    pictures = {plot.name: base64.b64encode(to_svg(plot.figure)).decode("ascii") for plot in page.plots}
    return environment.get_template("page.html.j2").render(page=page, pictures=pictures, text=_text, prose=_prose)


def visible(text: str) -> str:
    """Return text in which nothing hides: controls as their pictures (NUL is ␀), signs that turn directions as ⟨U+202E⟩."""

    def shown(sign: str) -> str:
        code = ord(sign)
        if sign in "\n\t":
            return sign
        if code < 0x20:
            return chr(0x2400 + code)
        if 0xD800 <= code < 0xE000:
            return "\ufffd"
        if 0x7F <= code < 0xA0 or code in _CONTROLS:
            return f"⟨U+{code:04X}⟩"
        return sign

    return "".join(map(shown, text))


def _prose(sentence: str) -> Markup:
    """A sentence in which what stands between backticks is a command."""
    found = Markup()
    for at, part in enumerate(re.split(r"`([^`]+)`", sentence)):
        shape = "{}" if at % 2 == 0 else '<code class="short">{}</code>' if len(part) <= SHORT else "<code>{}</code>"
        found += Markup(shape).format(visible(part))
    return found


def _text(text: str) -> Markup:
    """A text of somebody, in its own direction, folded if long."""
    if not text:
        return Markup('<div class="note">(empty)</div>')
    shown = visible(text)
    if len(shown) <= LONG:
        return Markup('<div class="text" dir="auto">{}</div>').format(shown)
    return Markup(
        '<div class="text" dir="auto">{} …</div><details><summary>all {} characters</summary>'
        '<div class="text" dir="auto">{}</div></details>'
    ).format(shown[:SHOWN], len(text), shown)


def to_markdown(tables: Sequence[PageTable]) -> str:
    """Return the tables as GitHub's markdown, one below the other, each under its caption."""
    lines = []
    for table in tables:
        rule = "|" + "|".join([":--", *["--:"] * (len(table.header) - 1)]) + "|"
        header, *rows = ("| " + " | ".join(map(escape_markdown, cells)) + " |" for cells in (table.header, *table.rows))
        lines += [f"**{escape_markdown(table.caption)}**", "", header, rule, *rows]
        lines += ["", escape_markdown(table.note), ""] if table.note else [""]
    return "\n".join(lines)


def escape_markdown(text: str) -> str:
    """Return text as markdown that shows it, on one line."""
    line = "".join(sign if sign.isprintable() else "�" for sign in " ".join(text.split()))
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", line)

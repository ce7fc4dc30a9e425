"""Records what a command shows in a terminal of 80 columns, as it stands when it has ended, and writes it as SVG.

`python tools/record_terminal.py docs/_static/quickstart.svg -- pe-dpo quickstart` (needs `pip install pyte rich`). Lines before
`--from TEXT` and from `--until TEXT` on are left out.
"""

import argparse
import os
import pty
import re
import struct
import sys
import termios
from fcntl import ioctl
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, LINES = 80, 400


def record(command: list[str]) -> pyte.Screen:
    """Run a command in a terminal and return the screen that it leaves.

    Raises:
        SystemExit: the command failed.
    """
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(COLUMNS), COLORTERM="truecolor")
        os.execvp(command[0], command)
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    while True:
        try:
            read = os.read(terminal, 65536)
        except OSError:  # the terminal is closed where the command has ended
            break
        if not read:
            break
        stream.feed(read)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        shown = "\n".join(line.rstrip() for line in screen.display if line.strip())
        raise SystemExit(f"{command[0]}: ended with {status}:\n{shown}")
    return screen


def as_text(screen: pyte.Screen) -> list[Text]:
    """Return the lines of a screen with their colours, without the empty ones at its end."""
    lines = []
    for number in range(LINES):
        line = Text()
        for style, cells in groupby((screen.buffer[number][column] for column in range(COLUMNS)), key=style_of):
            line.append("".join(cell.data for cell in cells), style)
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def style_of(cell: pyte.screens.Char) -> Style:
    """Return how a cell looks, in rich's words."""
    named = {"default": None, "brown": "yellow"}
    colour = named[cell.fg] if cell.fg in named else f"#{cell.fg}" if re.fullmatch("[0-9a-f]{6}", cell.fg) else cell.fg
    return Style(color=colour, bold=cell.bold, italic=cell.italics)


def main() -> None:
    """Record one command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--from", dest="first", default="", help="the first line that is shown begins with it")
    parser.add_argument("--until", dest="last", help="the first line that is not shown begins with it")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    lines = as_text(record(options.command))
    start = next((number for number, line in enumerate(lines) if line.plain.startswith(options.first)), 0)
    after = (number for number, line in enumerate(lines) if options.last and line.plain.startswith(options.last))
    shown = lines[start : next(after, len(lines))]
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        for line in shown:
            console.print(line, soft_wrap=True)
    title = " ".join(["$", Path(options.command[0]).name, *options.command[1:]])
    options.picture.write_text(console.export_svg(title=title), encoding="utf-8")
    print(f"{options.picture}: {len(shown)} lines", file=sys.stderr)


if __name__ == "__main__":
    main()

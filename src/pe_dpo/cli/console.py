"""How results look in a terminal; plain lines where there is no terminal."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from signal import SIGINT
from typing import TYPE_CHECKING, Any

import typer

from pe_dpo.cli.live import LiveLines
from pe_dpo.cli.options import in_flags
from pe_dpo.interruption import Interrupted, listening
from pe_dpo.log import PACKAGE, LineFormatter
from pe_dpo.printable import printable
from pe_dpo.progress import showing

if TYPE_CHECKING:
    from rich.console import Group

    from pe_dpo.data.decoded import DecodedPair

NARROWEST = 18
"""Characters to which the names of a table's rows may fold before columns have to go below."""


def start(*, is_silent: bool = False) -> "Terminal":
    """Prepare the terminal for a command that takes long, and show what the package logs and how far it is until it ends.

    Libraries' progress bars, advice and deprecations are kept out of the terminal; their errors stay.

    Args:
        is_silent: show nothing of the log, where the output is for a program.

    Returns:
        What shows the log, with its lines and warnings so far.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if "transformers" in sys.modules:  # else it will read the variables above; a command that needs no model does without it
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    handler = Terminal(is_silent)
    _until_the_command_ends.enter_context(_logging_to(handler))
    _until_the_command_ends.callback(handler.live.stop)
    _until_the_command_ends.enter_context(showing(handler.live.count))
    return handler


_until_the_command_ends = ExitStack()


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Return the function of a command that takes back at its end what `start` set up, and that a signal ends with a word.

    It leaves with 128 + the signal's number then, and without a traceback.
    """

    @wraps(function)
    def run(*args: Any, **options: Any) -> None:
        with listening():
            try:
                with _until_the_command_ends:
                    function(*args, **options)
            except KeyboardInterrupt as stop:  # Interrupted, or a second Ctrl-C
                notes = getattr(stop, "__notes__", ["what it had not finished was taken back; start the same command again"])
                with suppress(OSError):  # a terminal that is gone
                    show_lines([str(stop) or "interrupted", *map(in_flags, notes)], is_error=True)
                raise typer.Exit(128 + (stop.number if isinstance(stop, Interrupted) else SIGINT)) from stop
            except (RuntimeError, MemoryError, OSError) as error:
                _say_if_memory_ran_out(error)
                raise

    return run


def _say_if_memory_ran_out(error: Exception) -> None:
    """Raise an error in words for memory that ran out where nothing could be split any more; else do nothing.

    Raises:
        OutOfMemory: it did.
    """
    if "torch" not in sys.modules and not isinstance(error, MemoryError):
        return
    from pe_dpo.errors import OutOfMemory
    from pe_dpo.model.out_of_memory import is_out_of_memory

    if is_out_of_memory(error):
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise OutOfMemory(
            f"out of memory ({why}); end other programs, take a machine or a card with more, or see what it takes with: "
            "pe-dpo estimate"
        ) from error


class Terminal(logging.Handler):
    """Prints log records as lines, and keeps them."""

    def __init__(self, is_silent: bool) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(LineFormatter())
        self.is_silent = is_silent
        self.live = LiveLines(is_silent=is_silent)
        """Shows how far work is that takes long."""
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record, unless the output is for a program."""
        self.lines.append(in_flags(self.format(record)))
        if record.levelno >= logging.WARNING:
            self.warnings.append(in_flags(record.getMessage()))
        if not self.is_silent:
            with suppress(OSError):  # as in `LiveLines.say`
                show_lines([self.lines[-1]])


@contextmanager
def _logging_to(handler: logging.Handler) -> Iterator[None]:
    level = PACKAGE.level
    PACKAGE.addHandler(handler)
    PACKAGE.setLevel(logging.INFO)
    try:
        yield
    finally:
        PACKAGE.removeHandler(handler)
        PACKAGE.setLevel(level)


def say(line: str = "") -> None:
    """Print one line for a person."""
    typer.echo(printable(line))


def warn(line: str) -> None:
    """Print one line of what looks off."""
    show_lines([f"warning: {line}"])


def show_lines(lines: Sequence[str], *, is_error: bool = False) -> None:
    """Print lines, to stderr if asked: folded between words where a terminal is narrower, each whole in a file or a pipe."""
    from rich.console import Console

    screen = Console(stderr=is_error, markup=False, highlight=False, emoji=False)
    for line in lines:
        screen.print(printable(line), soft_wrap=not screen.is_terminal)


def show_grid(rows: Sequence[Sequence[str]]) -> None:
    """Print rows whose last column is text that folds, and whose other columns stay whole."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    for row in rows:
        *cells, last = map(printable, row)
        grid.add_row("", *(Text(cell, no_wrap=True) for cell in cells), Text(last, overflow="fold"))
    Console().print(grid)


def show_pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Print what and what is to be said of it, to stderr: side by side, both folded, where the screen is wide enough."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    screen = Console(stderr=True, soft_wrap=False)
    grid = Table.grid(padding=(0, 2, 0, 0))
    left = min(max(len(what) for what, _ in rows), max(screen.width * 2 // 5, 20))
    grid.add_column(width=2)
    grid.add_column(width=left, overflow="fold")
    grid.add_column(overflow="fold")
    for what, words in rows:
        grid.add_row("", Text(printable(what)), Text(printable(words)))
    screen.print(grid)


def show_pair(pair: "DecodedPair", *, unit: str, lines: int) -> None:
    """Print a pair as the model reads it: what is scored in « and », long texts cut in the middle.

    Args:
        pair: the pair.
        unit: what its lengths are counted in.
        lines: about how many each of its texts may take.
    """
    from rich.cells import cell_len, set_cell_size
    from rich.console import Console

    room = lines * max(20, Console().width - 30)

    def fit(text: str) -> str:
        text = printable(re.sub(r"[\n\t]", lambda found: repr(found[0])[1:-1], text))
        if cell_len(text) <= room:
            return text
        head, tail = set_cell_size(text, room * 2 // 3), set_cell_size(text[::-1], room // 3)[::-1]
        return f"{head.rstrip()} […] {tail.lstrip()}"

    rows = [["prompt", f"{pair.prompt_tokens:,}", fit(pair.prompt)]]
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        text = "".join(f"«{part['text']}»" if part["scored"] else part["text"] for part in answer["parts"])
        scored = "" if answer["scored"] == answer["tokens"] else f", {answer['scored']:,} scored"
        rows.append([name, f"{answer['tokens']:,}{scored}{'' if answer['end'] else ', no end'}", fit(text)])
    say(f"\n{pair.where}, in {unit}; «scored»")
    show_grid(rows)


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1) -> None:
    """Print a table as it fits the terminal; see `make_table`."""
    from rich.console import Console

    screen = Console()
    screen.print(make_table(title, header, rows, names=names, width=screen.width))


def make_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1, width: int) -> "Group":
    """Return a table of which nothing is cut, however narrow the screen: names and headings fold, numbers stay whole.

    Columns that find no room beside the others stand in a table below, beside the same names.

    Args:
        title: a line above it; may be empty.
        header: of each column.
        rows: each as long as the header.
        names: how many columns at the left say which row it is; the first of them may fold.
        width: of the screen, in characters.
    """
    from rich.cells import cell_len
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def total(widths: Sequence[int]) -> int:
        return sum(widths) + 3 * len(widths) + 1  # with a line and two spaces for each

    title, header, rows = printable(title), [*map(printable, header)], [[*map(printable, row)] for row in rows]
    cells = [max((cell_len(row[at]) for row in rows), default=0) for at in range(len(header))]
    whole = [max(cell, cell_len(name)) for cell, name in zip(cells, header, strict=True)]
    folded = [max(cell, *map(cell_len, name.split()), 1) for cell, name in zip(cells, header, strict=True)]
    folded[0] = min(whole[0], NARROWEST)
    parts = [[*range(names)]]
    for at in range(names, len(header)):
        if len(parts[-1]) > names and total([folded[column] for column in (*parts[-1], at)]) > width:
            parts.append([*range(names)])
        parts[-1].append(at)
    tables = []
    for part in parts:
        widths = [whole[column] for column in part]
        if total(widths) > width:
            widths = [folded[column] for column in part]
            widths[0] = min(whole[0], max(widths[0], widths[0] + width - total(widths)))
            widths[-1] -= min(widths[-1] - 1, max(0, total(widths) - width))  # one cell alone is too wide: it folds
        tables.append(Table())
        for column, size in zip(part, widths, strict=True):
            justify: Any = "right" if column else "left"
            tables[-1].add_column(Text(header[column]), justify=justify, width=size, overflow="fold")
        for row in rows:
            tables[-1].add_row(*(Text(row[column]) for column in part))
    return Group(*([Text(title, style="bold")] if title else []), *tables)

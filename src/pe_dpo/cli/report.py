"""`pe-dpo report`."""

from pathlib import Path
from typing import Annotated

import typer

from pe_dpo.cli import console
from pe_dpo.printable import counted


def report(
    target: Annotated[Path, typer.Argument(help="The folder of a run or of a sweep.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML file; default: report.html in it.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for plots and tables; default: report/ in it.")] = None,
    metric: Annotated[str | None, typer.Option(help="What a sweep is compared on; see pe-dpo compare.")] = None,
    baseline: Annotated[str | None, typer.Option(help="The hyperparameter of a sweep that others are held against.")] = None,
) -> None:
    """Show a run or a sweep on one page that opens anywhere; plots as PNG and tables as markdown beside it."""
    from pe_dpo.errors import UsageError

    if not target.is_dir():
        raise UsageError(f"{target}: no such folder; name the folder of a run or of a sweep")
    if output is not None and output.is_dir():
        raise UsageError(f"--output {output}: is a folder; name an HTML file, for example {output / 'report.html'}")

    console.start()
    from pe_dpo.report.write import write_report

    page, folder = output or target / "report.html", figures or target / "report"
    written = write_report(target, page, folder, metric=metric, baseline=baseline)
    console.say(written.verdict)
    for line in written.alarms:
        console.warn(line.removeprefix("Warning: "))
    for line in written.missing:
        console.say(f"not in it: {line}")
    console.say(f"{page}; {counted(len(written.plots), 'plot')} as PNG and table.md in {folder}")

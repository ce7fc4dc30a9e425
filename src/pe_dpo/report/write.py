"""A report on disk: the page, every plot as PNG and SVG, the tables as LaTeX and markdown."""

import json
from pathlib import Path
from typing import NamedTuple

from pe_dpo.disk import write_atomically
from pe_dpo.errors import UsageError
from pe_dpo.report.content import Page
from pe_dpo.report.page import to_html
from pe_dpo.report.run_report import report_run
from pe_dpo.report.style import save
from pe_dpo.report.sweep_report import report_sweep
from pe_dpo.report.tables import to_latex, to_markdown
from pe_dpo.runs.files import SWEEP_FILE


class Written(NamedTuple):
    """What was written, and what it says."""

    page: Path
    figures: Path
    """Folder of PLOT.png, PLOT.svg, table.md, table.tex and, of a sweep, results.jsonl."""
    plots: int
    verdict: str
    missing: list[str]
    """What is not in it, and which command gives it."""


def write_report(
    target: Path,
    *,
    page: Path | None = None,
    figures: Path | None = None,
    metric: str | None = None,
    baseline: str | None = None,
) -> Written:
    """Write the report of a run or a sweep and return where it lies.

    Args:
        target: the folder of a run (finished or not) or of a sweep.
        page: HTML file to write; default: report.html in the target.
        figures: folder for plots and tables, made if need be; default: report/ in the target.
        metric: of a sweep, to compare on; see `compare`.
        baseline: of a sweep, the dial that others are held against at equal KL; default: beta.

    Raises:
        UsageError: the target is neither a run nor a sweep, a file in it is torn, or nothing can be written there.
    """
    content = read_page(target, metric=metric, baseline=baseline)
    page, figures = page or target / "report.html", figures or target / "report"
    try:
        figures.mkdir(parents=True, exist_ok=True)
        page.parent.mkdir(parents=True, exist_ok=True)
        drawings = {plot.name: save(plot.figure, figures, plot.name) for plot in content.plots}
        write_atomically(figures / "table.md", to_markdown(content.tables))
        write_atomically(figures / "table.tex", to_latex(content.tables))
        if content.records:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in content.records]
            write_atomically(figures / "results.jsonl", "".join(lines))
        write_atomically(page, to_html(content, drawings))
    except OSError as error:
        raise UsageError(f"{error.filename or page}: cannot be written: {error.strerror or error}") from error
    missing = [line for section in content.sections for line in section.missing]
    return Written(page, figures, len(content.plots), content.verdict, missing)


def read_page(target: Path, *, metric: str | None = None, baseline: str | None = None) -> Page:
    """Return what the report of a folder shows; arguments as `write_report`.

    Raises:
        UsageError: it is neither a run nor a sweep, or a file in it is torn.
    """
    if (target / SWEEP_FILE).is_file():
        return report_sweep(target, metric=metric, baseline=baseline or "beta")
    for name, value in (("metric", metric), ("baseline", baseline)):
        if value is not None:
            raise UsageError(f"--{name} {value}: is for sweeps, and {target} is no sweep; leave it out")
    return report_run(target)

"""A report on disk: the page, every plot as PNG, the tables as markdown."""

import json
from pathlib import Path

from pe_dpo.disk import appearing_whole, disk_error, disk_errors_named, write_atomically
from pe_dpo.errors import UsageError
from pe_dpo.report.content import Page
from pe_dpo.report.page import to_html, to_markdown
from pe_dpo.report.run_report import report_run
from pe_dpo.report.style import save
from pe_dpo.report.sweep_report import report_sweep
from pe_dpo.runs.files import SWEEP_FILE


def write_report(target: Path, page: Path, figures: Path, *, metric: str | None = None, baseline: str | None = None) -> Page:
    """Write the report of a run or a sweep, and return what it shows.

    Args:
        target: the folder of a run (finished or not) or of a sweep.
        page: the HTML file to write.
        figures: the folder for PLOT.png, table.md and, of a sweep, results.jsonl; made if need be.
        metric: of a sweep, what to compare on; see `compare`.
        baseline: of a sweep, the hyperparameter that others are held against at equal KL; default: beta.

    Raises:
        UsageError: the target is neither a run nor a sweep, a file in it is torn, or a folder cannot be made.
        DiskError: the disk is full, or cannot be written.
    """
    if (target / SWEEP_FILE).is_file():
        content = report_sweep(target, metric=metric, baseline=baseline or "beta")
    else:
        for name, value in (("metric", metric), ("baseline", baseline)):
            if value is not None:
                raise UsageError(f"`{name}` {value}: is for sweeps, and {target} is no sweep; leave it out")
        content = report_run(target)
    for folder in (figures, page.parent):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(str(disk_error(error, folder) or f"{folder}: cannot be written: {error.strerror}")) from error
    with disk_errors_named(page):
        for plot in content.plots:
            with appearing_whole(figures / f"{plot.name}.png") as partial:
                save(plot.figure, partial)
        write_atomically(figures / "table.md", to_markdown(content.tables))
        if content.records:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in content.records]
            write_atomically(figures / "results.jsonl", "".join(lines))
        write_atomically(page, to_html(content))
    return content

"""A metric of your own, in the report of a run: how often the policy ranks a pair right by more than a nat.

python examples/own_metric.py RUN      # writes RUN/report.html; no model is loaded
"""

import sys
from pathlib import Path

from pe_dpo import Run
from pe_dpo.metrics.catalogue import Metric
from pe_dpo.metrics.estimates import mean_change
from pe_dpo.report.content import PageSection, PageTable
from pe_dpo.report.page import to_html
from pe_dpo.report.run_report import report_run

CLEARLY_RIGHT = Metric(
    key="accuracy/policy_clear",
    title="right by more than a nat",
    explanation="pairs whose chosen answer the policy finds more than e times as likely as the rejected one",
    numerator=lambda table: (table.delta("policy") > 1).astype(float),
    reference=lambda table: (table.delta("reference") > 1).astype(float),
    is_share=True,
)


def section(run: Run, metric: Metric) -> PageSection:
    """Return the part of the page: the metric under policy and reference, and the change with its interval over prompts."""
    table = run.pairs()
    policy, reference = metric.numerator(table), metric.reference(table)
    change, low, high = mean_change(policy - reference, table.prompt_key)
    interval = f"[{low:+.1%}, {high:+.1%}]"
    words = f"Of {len(table)} held-out pairs, {metric(table):.1%}: {metric.explanation}. Change {change:+.1%} {interval}."
    rows = [["reference", f"{reference.mean():.3f}"], ["policy", f"{policy.mean():.3f}"]]
    shown = PageTable("own-metric", metric.title, ["", metric.key], rows)
    return PageSection("own-metric", metric.title, [words], tables=[shown])


def write(folder: str) -> str:
    """Write the report with the section in front, and return its sentence."""
    found, page = section(Run(folder), CLEARLY_RIGHT), report_run(Path(folder))
    (Path(folder) / "report.html").write_text(to_html(page._replace(sections=[found, *page.sections])), encoding="utf-8")
    return found.sentences[0]


if __name__ == "__main__":
    print(write(sys.argv[1]))

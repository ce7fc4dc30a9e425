"""What a page is made of: sections of sentences, plots, tables and texts. Nothing here knows what they are about."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure


class Plot(NamedTuple):
    """A figure with what is said about it."""

    name: str
    """A file name without ending: letters, digits and dashes; another for every plot of a page."""
    figure: Figure
    caption: str
    """What is shown and how to read it, in sentences."""
    alt: str
    """What one who cannot see it should know: the kind of plot and its main numbers."""
    is_wide: bool = False
    """Whether it takes the page's whole width."""


class PageTable(NamedTuple):
    """A table of finished text."""

    name: str
    """A name as `Plot.name`."""
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Each as long as the header; the first cell names the row."""
    note: str = ""
    """A sentence below the table."""
    is_folded: bool = False
    """Whether it is shown on request only."""


class PageSection(NamedTuple):
    """A part of a page; whatever is empty is not shown."""

    name: str
    """The section's anchor: letters, digits and dashes."""
    title: str
    sentences: Sequence[str] = ()
    """Plain text; what stands between backticks is a command."""
    facts: Sequence[tuple[str, str]] = ()
    """A list of what and its value."""
    plots: Sequence[Plot] = ()
    tables: Sequence[PageTable] = ()
    exhibits: Sequence[tuple[str, Sequence[tuple[str, str]]]] = ()
    """Texts that belong together, as prompt and answers of a pair: a title, and each text under its own title."""
    folded: Sequence[tuple[str, str]] = ()
    """Titles and plain texts that are shown on request, as a recipe."""
    missing: Sequence[str] = ()
    """What could be here, why it is not, and which command gives it."""
    is_folded: bool = False
    """Whether it is shown on request only: what one does not read first."""


class Page(NamedTuple):
    """A whole report."""

    title: str
    """The title of the window."""
    verdict: str
    """The finding, in one sentence of plain words; it comes first."""
    remarks: Sequence[str]
    """The sentences after it: what else is found."""
    sections: Sequence[PageSection]
    alarms: Sequence[str] = ()
    """What looks off, the gravest first; it stands right below the verdict."""
    records: Sequence[dict[str, Any]] = ()
    """What JSON can hold of it, an object per line of results.jsonl."""

    @property
    def plots(self) -> list[Plot]:
        """All plots in their order."""
        return [plot for section in self.sections for plot in section.plots]

    @property
    def tables(self) -> list[PageTable]:
        """All tables in their order."""
        return [table for section in self.sections for table in section.tables]

    @property
    def missing(self) -> list[str]:
        """What is not on the page, and which command gives it; each once."""
        return list(dict.fromkeys(line for section in self.sections for line in section.missing))

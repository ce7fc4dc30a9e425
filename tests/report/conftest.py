"""Run folders to report on, and a reader of pages that is not a browser."""

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fake_runs
import pytest

VOID = {"meta", "br", "hr", "img", "link", "input"}


class ParsedPage(HTMLParser):
    """What stands in a page; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.by_tag: dict[str, list[str]] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self._table: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self.open.append(tag)
        self.by_tag.setdefault(tag, []).append("")
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs)["id"] or "", [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]} at line {self.getpos()[0]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        for tag in self.open:
            self.by_tag[tag][-1] += data
        if self.open and self.open[-1] in ("td", "th"):
            self._table[-1][-1] += data

    def attributes(self, name: str) -> list[str]:
        """Values of an attribute, in all tags."""
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


@pytest.fixture(scope="session")
def parse() -> Callable[[str], ParsedPage]:
    """Parse a page."""
    return ParsedPage


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with held-out pairs, sampled and scored answers, and two snapshots; not to be changed."""
    setting = {"loss.gamma": "0.5x", "loss.beta": 0.01, "mixout.p": 0.3}
    return fake_runs.write_run(tmp_path_factory.mktemp("runs") / "whole", setting, fake_runs.make_world())


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of it to take things away from."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


@pytest.fixture
def set_record() -> Callable[..., None]:
    """Change entries of run.json; None takes one away."""

    def change(run: Path, **entries: Any) -> None:
        record = {**json.loads((run / "run.json").read_text()), **entries}
        (run / "run.json").write_text(json.dumps({key: value for key, value in record.items() if value is not None}))

    return change


@pytest.fixture
def set_columns() -> Callable[..., None]:
    """Change columns of a run's eval_pairs.parquet; None takes one away, a function gets the old values."""
    from pyarrow import parquet, table

    def change(run: Path, **columns: Any) -> None:
        old = parquet.read_table(run / "eval_pairs.parquet").to_pydict()
        new = {**old, **{name: value(old[name]) if callable(value) else value for name, value in columns.items()}}
        kept = table({name: value for name, value in new.items() if value is not None})
        parquet.write_table(kept, run / "eval_pairs.parquet")

    return change

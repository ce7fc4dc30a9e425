"""The table of what published chat templates lose is what they lose, on the templates that TRL ships."""

from pathlib import Path

import pytest
from template_losses import COLUMNS, table

pytestmark = [pytest.mark.peer, pytest.mark.slow]
PAGE = Path(__file__).parents[2] / "docs" / "chat-templates.md"


def test_the_documented_table_is_measured() -> None:
    trl = pytest.importorskip("trl")
    found = table(Path(trl.__file__).parent / "chat_templates")
    assert found in PAGE.read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines()[2:]]
    losing = {name: column.count("lost") for name, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)}
    assert len(rows) > 28 and losing["tool call"] > 9 and losing["`reasoning_content`"] > 16

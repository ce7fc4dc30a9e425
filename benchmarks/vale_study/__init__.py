"""Three experiments in the vale, where what is true and what is courteous is known: docs/study-gamma-vs-mixout.md, part two."""

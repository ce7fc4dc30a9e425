"""The study of docs/study-gamma-vs-mixout.md: sweeps on real pairs, three experiments in the vale, their numbers and tables."""

"""Held-out pairs under policy and reference, with intervals; generation to look at."""

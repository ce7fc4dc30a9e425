"""The first line of a shipped recipe says what it takes; it is written by tools/recipe_headers.py from the estimate."""

import re

import pytest

from pe_dpo.estimate import estimate_run, find_card
from pe_dpo.recipe import load_recipe, recipe_header, recipe_names

LINE = re.compile(
    r"One (\d+) GB GPU; (\w+|16 bits), ([\d.]+) GB at least; (?:(\d+) h )?(\d+)(?: min)? on an RTX 4090 \(estimated\)\."
)


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.slow
def test_a_recipe_s_header_is_its_estimate(name: str) -> None:
    """Memory to 3 %, hours to 10 %: the line need not be written anew for every refinement."""
    line = LINE.fullmatch(recipe_header(name).splitlines()[0])
    assert line is not None
    size, kind, needed, hours, minutes = line.groups()
    found = estimate_run(load_recipe(name), find_card(f"{size}GB"))
    assert found.fits
    assert kind == {"none": "16 bits"}.get(found.setup.quantize, found.setup.quantize)
    assert float(needed) == pytest.approx(found.needed / 1e9, rel=0.03)
    seconds = 3600 * int(hours or 0) + 60 * int(minutes)
    assert seconds == pytest.approx(found.on(find_card("RTX 4090")).seconds, rel=0.10)

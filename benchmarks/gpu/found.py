"""What a check found."""

from typing import Any, NamedTuple


class Found(NamedTuple):
    """A verdict and the numbers under it."""

    is_right: bool | None
    """None where something is measured and nothing promised."""
    facts: dict[str, Any]

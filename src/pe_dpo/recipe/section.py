"""What every part of a recipe is made of: strict sections, and numbers and places in their bounds."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema

from pe_dpo.printable import without_secrets

LARGEST = 1e9
"""Above it a number is a slip: sums and squares of it leave the range of numbers."""
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Finite = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1})]
"""Checked by `check_scales`, which says more than a bound would."""


def _expanded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if "\0" in value:
        raise ValueError(f"{value!r} holds a NUL character, which no path can have")
    if value.startswith("$"):
        value = os.path.expandvars(value)
        if without_secrets(value) != value:
            raise ValueError("takes a secret of the environment into a path, which would be written down; name a path")
    return str(Path(value).expanduser()) if value.startswith("~/") else value


Location = Annotated[str, StringConstraints(min_length=1), BeforeValidator(_expanded)]
"""A path (~/ is the home folder, $NAME a variable of the environment at its beginning) or a hub id."""


class Section(BaseModel):
    """A part of a recipe: no unknown keys, no silent conversion of one type into another."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

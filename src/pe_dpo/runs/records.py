"""What the JSON files of a run say, as far as it is read here: the kinds of the entries that are known; all others are let be.

A record may be torn, edited or of another version. Whoever reads it gets entries of the right kind, or a line that names the
file and the entry.
"""

import shlex
from collections.abc import Mapping
from datetime import date
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError, create_model

from pe_dpo.errors import RunFolderError
from pe_dpo.quantizations import Quantization
from pe_dpo.runs.files import BASE_FILE, RUN_FILE, read_object


def check_record(kind: type[BaseModel], found: Any, path: Path, *, remedy: str) -> None:
    """Check that what a file says is of the kinds known.

    Raises:
        RunFolderError: it is not; names the entry.
    """
    try:
        known(kind, found)
    except ValueError as error:
        raise RunFolderError(f"{path}: {error}; {remedy}") from error


def known(kind: type[BaseModel], found: Any) -> Any:
    """Return what was found, as it is, where it is of a kind; an empty object is of every kind.

    Raises:
        ValueError: it is not; names the entry.
    """
    if found != {}:
        try:
            kind.model_validate(found)
        except ValidationError as error:
            raise ValueError(first_fault(error)) from error
    return found


def first_fault(error: ValidationError) -> str:
    """Return the first thing that is wrong with a record: the entry, what it is, and what it should be."""
    first = error.errors()[0]
    where, said = (
        ".".join(str(part) for part in first["loc"] if part != "Record") or "all of it",
        first["msg"].removeprefix("Value error, "),
    )
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] in ("model_type", "dict_type"):
        said = "not an object"
    value = repr(first["input"])
    return f"{where} is {value if len(value) <= 40 else f'{value[:36]} …'}, {said[:1].lower()}{said[1:]}"


def read_base(folder: Path) -> dict[str, Any]:
    """Return what base.json says, or run.json of the first runs, which had none; an empty object where neither does.

    Raises:
        RunFolderError: it cannot be read, or says what cannot be.
    """
    path = folder / BASE_FILE
    base = read_object(path)
    if not base:
        path = folder / RUN_FILE
        base = read_object(path).get("base", {})
    check_record(BASE, base, path, remedy=f"take another copy of {folder}")
    return base


def _record(needs: Mapping[str, Any] | None = None, **kinds: Any) -> type[BaseModel]:
    """Return a kind of object: the kinds of entries that must be there, and of those that may."""
    fields: dict[str, Any] = {key: (kind, None) for key, kind in kinds.items()}
    fields |= {key: (kind, ...) for key, kind in (needs or {}).items()}
    config = ConfigDict(extra="allow", strict=True, protected_namespaces=())
    return create_model("Record", __config__=config, **fields)


def _is_below(folder: str) -> str:
    parts = PurePosixPath(folder.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or "\0" in folder or not parts.parts:
        raise ValueError("should be a folder below that of the sweep")
    return folder


def _is_command(text: str) -> str:
    shlex.split(text)
    return text


def _is_date(text: str) -> str:
    date.fromisoformat(text)
    return text


_Number = FiniteFloat | None
_Ends = Annotated[list[_Number], Field(min_length=2, max_length=2)]
_Name = Annotated[str, Field(pattern=r"^\w+$")]

_SERVING = _record({"command": Annotated[str, AfterValidator(_is_command)] | None, "remark": str})
BASE = _record(
    {
        "id": Annotated[str, Field(min_length=1)],
        "quantize": Quantization,
        "dtype": Literal["float32", "bfloat16", "float16"],
    },
    revision=str | None,
    prequantized=bool,
    is_local=bool,
    device=str | None,
    parameters=int | None,
    quantized_layers=list[str],
    tensors=dict[str, str],
    rows=int | None,
    model_class=_Name,
    scale=FiniteFloat,
    serving=list[_SERVING],  # type: ignore[valid-type]  # made a line above
)
"""base.json, and what run.json says of the base."""
LOSS = _record({"formula": str, "equals": str, "kappa": _Number}, notes=list[str])
MEMORY = _record({"counted": FiniteFloat, "of": str}, measured=FiniteFloat)
MADE_WITH = _record(commit=str, cpu=str, threads=int)
MIXOUT = _record(margin_noise=_Number)
CALIBRATION = _record({"asked": str | FiniteFloat, "gamma": FiniteFloat}, interval=_Ends | None)

_ESTIMATE = _record({"mean": _Number}, standard_error=_Number)
_Estimate = _ESTIMATE | FiniteFloat | None
_GENERATION = _record(
    prompts=int,
    samples=int,
    max_new_tokens=int,
    kl=_Estimate,
    kl_per_token=_Estimate,
    entropy_per_token=_Estimate,
    tokens=_Estimate,
    win_rate=_Estimate,
    ended=_Estimate,
    distinct_1=_Estimate,
    distinct_2=_Estimate,
)
EVALUATION = _record(pairs=dict[str, _Number] | None, intervals=dict[str, _Ends] | None, generation=_GENERATION | None)
"""evaluation.json."""

DATA_REPORT = _record(
    held_out_rows=list[str] | None,
    held_out_from=str | None,
    held_out_most=int | None,
    files=dict[str, Any],
    template_date=Annotated[str, AfterValidator(_is_date)] | None,
)
"""data_report.json."""
MANIFEST_RECORD = _record({"files": dict[str, _record({"bytes": int, "sha256": str})]}, inputs=dict[str, str | None])  # type: ignore[misc]
"""MANIFEST.json of a checkpoint."""
_POINT = _record({"name": str, "settings": dict[str, Any], "seed": int, "folder": Annotated[str, AfterValidator(_is_below)]})
_NAMED = _record({"contrast": str, "after": int})
_LATE = _record({"seed": int, "after": int})
SWEEP = _record(
    {"points": list[_POINT], "grids": list[str], "seeds": list[int]},  # type: ignore[valid-type]
    contrasts=list[_NAMED],  # type: ignore[valid-type]
    contrasts_sha256=str,
    late_seeds=list[_LATE],  # type: ignore[valid-type]
)
"""sweep.json."""

INPUTS = _record(machine=dict[str, Any], versions=dict[str, Any])
"""inputs.json."""

MADE = _record(hashes=_record(adapter=dict[str, str]) | None)
"""run.json, where nothing is asked but what the adapter is."""

Base = Annotated[dict[str, Any], BeforeValidator(partial(known, BASE))]
LossFacts = Annotated[dict[str, Any], BeforeValidator(partial(known, LOSS))]
Memory = Annotated[dict[str, Any], BeforeValidator(partial(known, MEMORY))]
MadeWith = Annotated[dict[str, Any], BeforeValidator(partial(known, MADE_WITH))]
MixoutFacts = Annotated[dict[str, Any], BeforeValidator(partial(known, MIXOUT))]
CalibrationFacts = Annotated[dict[str, Any], BeforeValidator(partial(known, CALIBRATION))]
Override = Annotated[dict[str, Any], BeforeValidator(partial(known, _record({"step": int, "key": str})))]

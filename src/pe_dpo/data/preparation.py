"""From the data section of a recipe to the two sides of a run: read, encode, hold out by prompt, and report.

files -> pairs -> token ids -+-> train
                             +-> held out   (no prompt that the model reads is on both sides)
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain, islice
from typing import Any, Literal

from pe_dpo.data.encoding import Encoder
from pe_dpo.data.pairs import EncodedPair, Pair, RowError
from pe_dpo.data.report import NO_WINNER, OVERLONG, PROMPT_IN_TRAINING, WITHOUT_MARGIN, DataReport, list_names
from pe_dpo.data.row_reader import RowReader
from pe_dpo.data.shapes import Shape
from pe_dpo.data.sources import Parts, Place, find_places, weigh
from pe_dpo.data.split import divide
from pe_dpo.errors import DataError
from pe_dpo.recipe.data_section import DataSection, Sources, describe_sources

DEFAULT_MAX_LENGTH = 2048
"""Tokens of prompt and answer where recipe and context allow more; as the DPO recipes of Zephyr and Tülu 3."""
HELD_OUT_SHARE = 0.05
"""Of the pairs, where the data brings no held-out side of its own."""
HELD_OUT_MOST = 2000
"""Pairs of that share at most: with so many a share of 0.5 has a standard error of 0.011. Without a bound the evaluations
of a run, a tenth of it apart, take a fifth of its time at every size."""
_FIRST_ROWS = 20  # the shape is recognised from these


@dataclass(frozen=True, slots=True)
class PreparedData:
    """The pairs to train on, the pairs held out, and what happened on the way."""

    train: list[EncodedPair]
    held_out: list[EncodedPair]
    report: DataReport


def prepare_pairs(
    settings: DataSection,
    *,
    tokenizer: Any,
    context_length: int | None = None,
    end_token_ids: Collection[int] = (),
    only: str | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> PreparedData:
    """Return the pairs that the data section of a recipe asks for, training and held out, as token ids.

    Args:
        settings: The section; `DataSection(train="pairs.jsonl", max_length=512)` serves without a recipe.
        tokenizer: A transformers tokenizer, that of the model.
        context_length: The most tokens that the model takes, if it has a bound.
        end_token_ids: Further ids that end an answer, beside the tokenizer's EOS; from the generation config.
        only: Another path or hub id, all of whose pairs become `train` and none held out (to evaluate on).
        recorded: The data report of a run whose held-out rows are held out again, see `split.divide`, and whose date a
            template with a clock writes; None to begin anew. A run from before reports named these rows is read as it was:
            every token of an answer is scored, and what its template leaves out is counted alone.

    Raises:
        DataError: The data cannot be found, read, understood or encoded, nothing of it is left, or `max_length` exceeds the
            model's context.
    """
    if only is not None:
        settings = settings.model_copy(update={"train": only, "eval": 0.0, "limit": None})
    is_old = recorded is not None and recorded.get("held_out_rows") is None
    settings = settings.model_copy(update=_as_recorded(settings, recorded or {}, is_old=is_old))
    if settings.max_length and context_length and settings.max_length > context_length:
        raise DataError(f"data.max_length: {settings.max_length} tokens, but the model's context is {context_length}; lower it")
    max_length = settings.max_length or min(DEFAULT_MAX_LENGTH, context_length or DEFAULT_MAX_LENGTH)
    report = DataReport()
    part_names: dict[str, str] = {}
    places = _find_again(settings.train, recorded or {}, part_names)
    held_out_places = places if settings.eval is None else []
    if settings.eval is not None and not isinstance(settings.eval, float):
        held_out_places = find_places(settings.eval, to_hold_out=True, taken=part_names)
    held_out_parts = [name for place in held_out_places for name in place.held_out]
    share = 0.0
    if not held_out_parts:
        asked = settings.eval if isinstance(settings.eval, float) else None
        share = HELD_OUT_SHARE if asked is None else asked
        bound = {"held_out_most": HELD_OUT_MOST} if recorded is None else recorded  # older runs had none
        report.held_out_most = bound.get("held_out_most") if asked is None else None
    report.unused_files = [name for place in places for name in place.unused]
    report.unused_files += [] if held_out_places is places else [name for place in places for name in place.held_out]

    of_place = read_places(places, settings, report, is_other=only is not None)
    encoder = Encoder(
        tokenizer, settings, max_length=max_length, report=report, end_token_ids=end_token_ids, accepts_losses=is_old
    )
    encoded = encoder.encode(list(chain.from_iterable(of_place)))
    _check_some_are_left(encoded, describe_sources(settings.train), max_length, report)
    brought_pairs: list[EncodedPair] = []
    if held_out_parts:
        named = list(chain.from_iterable(read_places(held_out_places, settings, report, side="held_out")))
        _check_some_are_left(named, list_names(held_out_parts), max_length, report)
        brought_pairs = encoder.encode(named)
    most = report.held_out_most
    train, held_out, left_out, report.held_out_rows = divide(encoded, brought_pairs, share=share, most=most, recorded=recorded)
    if left_out:
        report.dropped[PROMPT_IN_TRAINING] += [pair.where for pair in left_out]
    if held_out_parts or share:
        but = f" but at most {most:,}" if most is not None and share * len(encoded) > most else ""
        by_share = f"{share:.1%} of the pairs{but}, split by prompt"
        report.held_out_from = list_names(held_out_parts) if held_out_parts else by_share
    if not held_out and (share or held_out_parts):
        why = (
            "every prompt of the held-out data is in training or was dropped" if held_out_parts else "all pairs have one prompt"
        )
        report.remarks.append(f"no pair is held out: {why}; name other held-out data to measure what is learned")
    place_of = {pair.where: at for at, pairs in enumerate(of_place) for pair in pairs}
    kept = [[pair for pair in train if place_of[pair.where] == at] for at in range(len(places))]
    weighed = [weigh(pairs, place.source.weight) for place, pairs in zip(places, kept, strict=True)]
    train = list(chain.from_iterable(weighed))
    for place, own, trained_on in zip(places, kept, weighed, strict=True):
        source = describe_sources(place.source)
        report.sources.append({"source": source, "pairs": len(own), "trained_on": len(trained_on)})
    report.examine(train, held_out)
    report.examine_lengths(encoder.lengths, max_length=max_length, context_length=context_length)
    return PreparedData(train, held_out, report)


def _find_again(sources: Sources, recorded: Mapping[str, Any], taken: dict[str, str]) -> list[Place]:
    """Return the places to train on, with the sides that a run gave them.

    A run from before words further behind in a name said its side trained on files that are held out, or not used, since then.
    """
    read = {*recorded.get("files", ())}
    places = find_places(sources, taken=taken)
    is_split_by_prompt = str(recorded.get("held_out_from")).endswith(("split by prompt", "none"))
    if is_split_by_prompt and not read <= {name for place in places for name in place.train}:
        taken_then: dict[str, str] = {}
        then = find_places(sources, taken=taken_then, by_words=False)
        if read <= {name for place in then for name in place.train}:
            taken.clear()
            taken |= taken_then
            return then
    return places


def _as_recorded(settings: DataSection, recorded: Mapping[str, Any], *, is_old: bool) -> dict[str, Any]:
    """Return the settings that a run read its data with and that its recipe may not say."""
    changes: dict[str, Any] = {"score": "everything"} if is_old else {}
    if settings.template_date is None and recorded.get("template_date"):
        changes["template_date"] = date.fromisoformat(recorded["template_date"])
    return changes


def read_places(
    places: Sequence[Place],
    settings: DataSection,
    report: DataReport,
    *,
    side: Literal["train", "held_out"] = "train",
    is_other: bool = False,
) -> list[list[Pair]]:
    """Return the pairs of each of several places before tokenization, see `read_pairs`; `limit` counts over all of them.

    Args:
        places: From `find_places`; each has its own shape, and its own columns where its source names such.
        settings: As for `read_pairs`.
        report: As for `read_pairs`.
        side: Of the places, which is read.
        is_other: As for `read_pairs`.
    """
    found: list[list[Pair]] = []
    before = report.rows_read
    for place in places:
        left = None if settings.limit is None else settings.limit - report.rows_read + before
        columns = settings.columns if place.source.columns is None else place.source.columns
        own = settings.model_copy(update={"columns": columns, "limit": left})
        parts = place.train if side == "train" else place.held_out
        try:
            found.append(read_pairs(parts, own, report, is_other=is_other) if parts and left != 0 else [])
        except DataError as error:
            if len(places) == 1 or "{columns: " not in str(error):
                raise
            raise DataError(f"{error}\nor for this place alone: {{path: {place.source.path}, columns: …}}") from error
    bring_margins = [any(pair.margin is not None for pair in pairs) for pairs in found]
    for pairs, brings in zip(found, bring_margins, strict=True):
        if pairs and not brings and any(bring_margins):
            report.noted[WITHOUT_MARGIN] += [pair.where for pair in pairs]
    return found


def read_pairs(parts: Parts, settings: DataSection, report: DataReport, *, is_other: bool = False) -> list[Pair]:
    """Return the pairs of some files before tokenization, one for every well-formed row, in order.

    Args:
        parts: The files or splits, see `find_places`; all must have one shape.
        settings: Its `columns`, `bad_rows` and `limit` (over all parts) count here.
        report: Files, shape and malformed rows are added to it.
        is_other: Whether these are no pairs of the run: then they may lack the columns of β and weight that its map names.

    Raises:
        DataError: A file cannot be read, its rows are of no known shape, or a row is malformed.
    """
    names = list_names(list(parts))
    rows = _good_rows(parts, settings, report)
    first = list(islice(rows, _FIRST_ROWS))
    if not first:
        found = next(iter(report.dropped.values()), ["the file is empty or has a header alone"])[0]
        raise DataError(f"{names}: no row can be used of {report.rows_read} read: {found}; pairs are expected, one a row")
    columns = settings.columns or {}
    lacking = [
        name for name in ("beta", "weight") if name in columns and not any(columns[name] in values for _, values in first)
    ]
    for name in lacking if is_other else ():
        own = "the loss's β" if name == "beta" else "weight 1"
        report.remarks.append(f"{names} has no column '{columns[name]}', so all its pairs have {own}")
        columns = {ours: theirs for ours, theirs in columns.items() if ours != name}
    shape = Shape([values for _, values in first], where=names, columns=columns, ignore=settings.ignore)
    if shape.words not in report.shape:
        report.shape = f"{report.shape} | {shape.words}" if report.shape else shape.words
    reader = RowReader(shape)
    pairs: list[Pair] = []
    for where, values in chain(first, rows):
        try:
            pair = reader.read(values, where=where)
        except RowError as error:
            report.refuse(where, error, settings.bad_rows)
            continue
        if pair is None:
            report.dropped[NO_WINNER].append(where)
        else:
            pairs.append(pair)
    report.unread_columns += [name for name in reader.unread if name not in report.unread_columns]
    for what, wheres in reader.noted.items():
        report.noted[what] += wheres
    without_margin = [pair for pair in pairs if pair.margin is None]
    if len(without_margin) < len(pairs):  # they count as 0, which the user may not mean
        for pair in without_margin:
            report.noted[WITHOUT_MARGIN].append(pair.where)
    return pairs


def _good_rows(parts: Parts, settings: DataSection, report: DataReport) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each well-formed row is and its columns; count what is read, refuse the others."""
    left = settings.limit
    for name, rows in parts.items():
        before = report.files.setdefault(name, 0)
        for where, values in islice(rows, left):
            report.files[name] += 1
            if isinstance(values, RowError):
                report.refuse(where, values, settings.bad_rows)
            else:
                yield where, values
        left = None if left is None else left - report.files[name] + before
        if left == 0:
            return


def _check_some_are_left(pairs: Sequence[object], source: str, max_length: int, report: DataReport) -> None:
    if pairs:
        return
    reasons = ", ".join(f"{len(rows)} {reason}" for reason, rows in report.dropped.items())
    first = next(iter(report.dropped.values()), ["none"])[0]
    remedy = (
        f"raise data.max_length ({max_length}) or set data.overlong: truncate_prompt"
        if OVERLONG in report.dropped
        else f"look at the first of them: {first}"
    )
    raise DataError(f"{source}: no pair is left of {report.rows_read} rows: {reasons}; {remedy}")

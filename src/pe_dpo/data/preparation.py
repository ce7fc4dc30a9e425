"""From the data section of a recipe to the two sides of a run: read, encode, hold out by prompt, and report.

files -> pairs -> token ids -+-> train
                             +-> held out   (no prompt that the model reads is on both sides)

One row after the other, so that memory holds what is counted of the pairs, and neither their texts nor their token ids.
"""

import hashlib
import importlib.metadata
import json
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache, reduce
from itertools import islice
from operator import add
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pe_dpo.data.encoded import DIGESTS, Batches, Columns, EncodedPairs, column, join_columns, pairs_of, to_batch
from pe_dpo.data.encoded_store import EncodedStore, Made
from pe_dpo.data.encoding import PAIRS_PER_PART, Encoder, begin_tokens
from pe_dpo.data.pairs import EncodedPair, Pair
from pe_dpo.data.reading import iterate_places
from pe_dpo.data.report import OVERLONG, PROMPT_IN_TRAINING, DataReport, list_names
from pe_dpo.data.sources import Place, Rows, find_places, weigh
from pe_dpo.data.split import divide
from pe_dpo.data.workers import encode_parts
from pe_dpo.disk import cache_folder
from pe_dpo.errors import DataError
from pe_dpo.progress import advance, progress
from pe_dpo.recipe.data_section import DataSection, Sources, describe_sources

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 2048
"""Tokens of prompt and answer where recipe and context allow more; as the DPO recipes of Zephyr and Tülu 3."""
HELD_OUT_SHARE = 0.05
"""Of the pairs, where the data brings no held-out side of its own."""
HELD_OUT_MOST = 2000
"""Pairs of that share at most: with so many a share of 0.5 has a standard error of 0.011. Without a bound the evaluations
of a run, a tenth of it apart, take a fifth of its time at every size."""
BYTES_PER_ROW = 100_000
"""Where a limit asks for a row of so many bytes at most, encoding them again is quicker than reading all for their hash."""
PAIRS_PER_BATCH = 2048
"""Of a batch of Arrow; a batch is what is read at once."""


@dataclass(frozen=True, slots=True)
class PreparedData:
    """The pairs to train on, the pairs held out, and what happened on the way."""

    train: Sequence[EncodedPair]
    held_out: Sequence[EncodedPair]
    report: DataReport


def prepare_pairs(
    settings: DataSection,
    *,
    tokenizer: Any,
    context_length: int | None = None,
    end_token_ids: Collection[int] = (),
    only: str | None = None,
    recorded: Mapping[str, Any] | None = None,
    seed: int | None = None,
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
        seed: Of the prompts that a held-out share and a weight below 1 take, `train.seeds.data`; None for their hashes alone.

    Raises:
        DataError: The data cannot be found, read, understood or encoded, nothing of it is left, or `max_length` exceeds the
            model's context.
    """
    wanted = Preparation(
        settings,
        tokenizer,
        context_length=context_length,
        end_token_ids=end_token_ids,
        only=only,
        recorded=recorded,
        seed=seed,
    )
    found = wanted.identify()
    if found is None:
        return wanted.prepared(wanted.make(Batches()))
    key, rows = found
    store = EncodedStore(cache_folder() / "pairs")
    try:
        made = store.get_or_make(
            key(recorded, settings.bad_rows),
            lambda batches: wanted.make(batches, rows),
            lambda report: wanted.names(key, report),
        )
    except OSError as error:
        logger.warning(
            f"{store.folder}: encoded pairs cannot be kept there ({error}), so that every command and process encodes them "
            "again; free space or permit writing there, or set PE_DPO_CACHE to another folder"
        )
        made = wanted.make(Batches(), rows)
    return wanted.prepared(made)


class Preparation:
    """What is to be prepared, and how: the arguments of `prepare_pairs`, with all that they leave open."""

    def __init__(
        self,
        settings: DataSection,
        tokenizer: Any,
        *,
        context_length: int | None,
        end_token_ids: Collection[int],
        only: str | None,
        recorded: Mapping[str, Any] | None,
        seed: int | None = None,
    ) -> None:
        """Find the data; see `prepare_pairs`."""
        if only is not None:
            settings = settings.model_copy(update={"train": only, "eval": 0.0, "limit": None})
        self.is_old = recorded is not None and recorded.get("held_out_rows") is None
        settings = settings.model_copy(update=_as_recorded(settings, recorded or {}, is_old=self.is_old))
        if settings.max_length and context_length and settings.max_length > context_length:
            raise DataError(
                f"data.max_length: {settings.max_length} tokens, but the model's context is {context_length}; lower it"
            )
        self.settings, self.tokenizer, self.is_other, self.recorded = settings, tokenizer, only is not None, recorded
        self.context_length, self.end_token_ids, self.seed = context_length, end_token_ids, seed
        self.max_length = settings.max_length or min(DEFAULT_MAX_LENGTH, context_length or DEFAULT_MAX_LENGTH)
        part_names: dict[str, str] = {}
        self.places = _find_again(settings.train, recorded or {}, part_names)
        self.held_out_places = self.places if settings.eval is None else []
        if settings.eval is not None and not isinstance(settings.eval, float):
            self.held_out_places = find_places(settings.eval, to_hold_out=True, taken=part_names)
        self.held_out_parts = [name for place in self.held_out_places for name in place.held_out]
        self.share, self.most = 0.0, None
        if not self.held_out_parts:
            asked = settings.eval if isinstance(settings.eval, float) else None
            self.share = HELD_OUT_SHARE if asked is None else asked
            bound = {"held_out_most": HELD_OUT_MOST} if recorded is None else recorded  # older runs had none
            self.most = bound.get("held_out_most") if asked is None else None
        self.unused = [name for place in self.places for name in place.unused]
        if self.held_out_places is not self.places:
            self.unused += [name for place in self.places for name in place.held_out]

    def names(self, key: Callable[[Mapping[str, Any] | None, str], str], report: DataReport) -> set[str]:
        """Return the keys of all who would be given the same: a run that names these held-out rows, and who drops bad rows."""
        kinds = {self.settings.bad_rows, "drop"}  # without one that is an error there is none to drop
        return {key(rule, kind) for rule in (self.recorded, vars(report)) for kind in kinds}

    def identify(self) -> tuple[Callable[[Mapping[str, Any] | None, str], str], int] | None:
        """Return what makes keys, and about how many rows there are; None where something has no name.

        It takes a run's data report, or None, and what becomes of bad rows.

        The key is a sha256 over all that the pairs and their report depend on, without the paths of the files, which only lines
        about them say.
        """
        tokenizer, settings = tokenizer_fingerprint(self.tokenizer), self.settings
        if tokenizer is None:
            return None
        parts: list[Any] = []
        rows = 0
        size = sum(path.stat().st_size for _, part in self._parts() for path in part.files if path.is_file())
        if settings.limit is not None and size > BYTES_PER_ROW * settings.limit:
            return None
        for name, part in self._parts():
            try:
                found = part.fingerprint()
            except OSError:
                return None  # said when the rows are read
            if found is None:
                return None
            parts.append([name, found[0]])
            rows += found[1]
        chosen = {"columns", "ignore", "score", "overlong", "limit"}
        has_clock = "strftime_now" in str(self.tokenizer.chat_template)
        content = {
            "code": _code_fingerprint(),
            "tokenizer": tokenizer,
            "settings": settings.model_dump(mode="json", include=chosen),
            "named": settings.pair_columns,
            "is_plain": settings.template == "plain",
            "today": str(settings.template_date or date.today()) if has_clock else None,
            "lengths": [self.max_length, self.context_length],
            "ends": sorted(self.end_token_ids),
            "places": [
                [[place.source.weight, place.source.columns, list(place.train), list(place.held_out)] for place in places]
                for places in (self.places, self.held_out_places)
            ],
            "parts": parts,
            "unused": self.unused,
            "flags": [self.is_old, self.is_other, self.share, self.most, self.seed],
        }

        def key(recorded: Mapping[str, Any] | None, bad_rows: str) -> str:
            rule = None if recorded is None else recorded.get("held_out_rows")
            text = json.dumps([content, recorded is None, rule, bad_rows], sort_keys=True)
            return hashlib.sha256(text.encode()).hexdigest()

        return key, min(rows, settings.limit or rows)

    def _parts(self) -> list[tuple[str, Rows]]:
        """Return what is read of all places, by name."""
        found = [part for place in self.places for part in place.train.items()]
        return found + [part for place in self.held_out_places for part in place.held_out.items()]

    def prepared(self, made: Made) -> PreparedData:
        """Return what was made, perhaps by another command, with the paths that this one has for its data."""
        train, held_out, report = made
        for source, place in zip(report.sources, self.places, strict=True):
            source["source"] = describe_sources(place.source)
        if self.settings.template not in ("auto", "chat", "plain"):
            report.template = f"the chat template {self.settings.template}"
        return PreparedData(train, held_out, report)

    def make(self, batches: Batches, rows: int = 0) -> Made:
        """Return the pairs, read and encoded now.

        Args:
            batches: Where token ids are kept.
            rows: About how many rows there are, if that is known.

        Raises:
            DataError: See `prepare_pairs`.
        """
        report = DataReport()
        report.held_out_most, report.unused_files = self.most, self.unused
        making = _Making(self, report, batches, rows)
        making.encode(self.places, "train")
        own = making.pairs
        if self.held_out_parts:
            making.encode(self.held_out_places, "held_out")
        encoded = making.finish()
        sides: Any = divide(
            encoded[:own],
            encoded[own:],
            share=self.share,
            most=self.most,
            recorded=self.recorded,
            digests=encoded.numbers(DIGESTS[0]),
            seed=self.seed,
        )
        train, held_out, left_out, report.held_out_rows = sides
        if left_out:
            report.dropped[PROMPT_IN_TRAINING] += column(left_out, "where")
        if self.held_out_parts or self.share:
            is_bound = self.most is not None and self.share * own > self.most
            by_share = f"{self.share:.1%} of the pairs{f' but at most {self.most:,}' if is_bound else ''}, split by prompt"
            report.held_out_from = list_names(self.held_out_parts) if self.held_out_parts else by_share
            if not held_out:
                named = "every prompt of the held-out data is in training or was dropped"
                why = named if self.held_out_parts else "all pairs have one prompt"
                report.remarks.append(f"no pair is held out: {why}; name other held-out data to measure what is learned")
        place_of = train.numbers("place")
        kept = [train[place_of == number] for number in range(len(self.places))]
        both = zip(self.places, kept, strict=True)
        weighed: list[Any] = [weigh(pairs, place.source.weight, self.seed) for place, pairs in both]
        for place, before, trained_on in zip(self.places, kept, weighed, strict=True):
            source = describe_sources(place.source)
            report.sources.append({"source": source, "pairs": len(before), "trained_on": len(trained_on)})
        train = reduce(add, weighed)
        report.examine(train, held_out)
        report.examine_lengths(making.encoder.lengths, max_length=self.max_length, context_length=self.context_length)
        return train.hashed(), held_out.hashed(), report


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


class _Making:
    """The pairs that were encoded so far, as columns.

    Args:
        wanted: What is prepared.
        report: What happens to every row is added to it.
        batches: Where token ids are kept.
        rows: About how many there are.
    """

    def __init__(self, wanted: Preparation, report: DataReport, batches: Batches, rows: int) -> None:
        self.wanted, self.report, self.batches, self.rows = wanted, report, batches, rows
        self.pairs = self.read = 0
        """Encoded, and read."""
        self._numbers: defaultdict[str, list[np.ndarray]] = defaultdict(list)
        self._waiting: list[Columns] = []
        self._fault: DataError | None = None
        try:
            self.encoder = Encoder(
                wanted.tokenizer,
                wanted.settings,
                max_length=wanted.max_length,
                report=DataReport(),  # merged once the rows were read,
                end_token_ids=wanted.end_token_ids,
                accepts_losses=wanted.is_old,
            )
        except DataError as error:
            self._fault = error

    def encode(self, places: Sequence[Place], side: Literal["train", "held_out"]) -> None:
        """Read and encode one side of some places.

        Raises:
            DataError: A file cannot be read, a row not understood or encoded, or nothing is left; what is wrong with a file or
                a row is said before what is wrong with a pair.
        """
        wanted, done = self.wanted, self.read
        is_other = wanted.is_other and side == "train"
        pairs = iterate_places(places, wanted.settings, self.report, side=side, is_other=is_other)
        owners: deque[dict[str, int]] = deque()

        def parts() -> Iterator[list[Pair]]:
            while numbered := list(islice(pairs, PAIRS_PER_PART)):
                owners.append({pair.where: number for number, pair in numbered})
                self.read += len(numbered)
                yield [pair for _, pair in numbered]

        if self._fault is not None:
            deque(parts(), maxlen=0)
            raise self._fault
        before = self.read
        with progress("encoding"):
            for part, columns in encode_parts(self.encoder, parts()):
                self.encoder.add(part)
                places_of = owners.popleft()
                if columns.where:
                    columns.numbers["place"] = np.array([places_of[where] for where in columns.where], dtype=np.int32)
                    self._waiting.append(columns)
                    self.pairs += len(columns.where)
                self._write(PAIRS_PER_BATCH)
                done += len(places_of)
                advance(done, max(self.rows, self.read + 1) if self.rows else 0)
            advance(done, done)
        if side == "held_out":
            _check_some_are_left(self.read - before, list_names(wanted.held_out_parts), wanted.max_length, self.report)
        if self.encoder.report is not self.report:
            self.report.template = self.encoder.report.template
            self.report.remarks += self.encoder.report.remarks
            self.encoder.report = self.report
        self.encoder.finish()
        if side == "train":
            _check_some_are_left(self.pairs, describe_sources(wanted.settings.train), wanted.max_length, self.report)

    def finish(self) -> EncodedPairs:
        """Return all pairs that were encoded."""
        self._write(1)
        return pairs_of(self.batches.finish(), {name: np.concatenate(parts) for name, parts in self._numbers.items()})

    def _write(self, fewest: int) -> None:
        """Make a batch of what waits, if that is so many pairs at least."""
        if sum(len(columns.where) for columns in self._waiting) < fewest:
            return
        joined, self._waiting = join_columns(self._waiting), []
        self.batches.append(to_batch(joined))
        for name, values in joined.numbers.items():
            self._numbers[name].append(values)


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Return a sha256 over what a tokenizer makes of texts and of messages; None for one that does not say it.

    Those of the tokenizers library write all of it into one text. What transformers adds, it keeps in a few fields.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        return None
    begin = begin_tokens(tokenizer)  # a call, which sets the tokenizer to neither cut nor pad, whatever its file says
    named = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.all_special_tokens]
    options = [getattr(tokenizer, name, None) for name in ("clean_up_tokenization_spaces", "split_special_tokens")]
    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    facts = [kind, begin, named, tokenizer.chat_template, options]
    return hashlib.sha256(backend.to_str().encode() + json.dumps(facts, sort_keys=True).encode()).hexdigest()


@cache
def _code_fingerprint() -> str:
    """Return a sha256 over the source that makes pairs of rows, and the versions of the libraries that it asks."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (*sorted(here.glob("*.py")), here.parent / "recipe" / "data_section.py"):
        digest.update(path.name.encode() + path.read_bytes())
    for name in ("transformers", "tokenizers", "jinja2", "pyarrow", "numpy", "datasets"):
        digest.update(f"{name} {importlib.metadata.version(name)}".encode())
    return digest.hexdigest()


def _check_some_are_left(pairs: int, source: str, max_length: int, report: DataReport) -> None:
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

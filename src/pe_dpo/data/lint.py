"""What is found in a preference data set before anything is trained on it, and which of it somebody has to decide about.

rows ── pairs ── token ids, or characters where there is no tokenizer
                    ├── three of them decoded, with what is scored
                    ├── how far length alone tells which answer was chosen
                    └── findings: what the report counted, ends that were lost
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from pe_dpo.data.characters import Characters
from pe_dpo.data.decoded import DecodedPair, decode_pair, special_ids
from pe_dpo.data.encoded import by_length, column, lengths
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.data.preparation import PreparedData, prepare_pairs
from pe_dpo.data.report import (
    ANSWERS_TOO_LONG,
    CONTRADICTION,
    DUPLICATE,
    EMPTY,
    IDENTICAL,
    MALFORMED,
    OVERLONG,
    PROMPT_IN_TRAINING,
    WITHOUT_MARGIN,
)
from pe_dpo.metrics.estimates import pairs_worth, right, wilson_interval
from pe_dpo.recipe.data_section import DataSection

LENGTH_TELLS = 2 / 3
"""From this share of pairs on, length alone predicts the label well enough to be learned instead of what was meant."""
LENGTH_SURELY_TELLS = 0.6
"""So much the near end of the interval of that share must be: six pairs of six are enough, five are not."""
CUT_SHARE = 0.05
"""Of the answers of a side, so many may look cut off without a decision; headings and code do, too."""
_LAST = 100  # tokens at the end of an answer that are looked at
_PROSE = 50  # characters from which a last line is a sentence rather than a heading or the answer to a sum
# What differs between errors of one kind: numbers and quoted values (long ones may have been cut before the closing quote).
_VALUE = re.compile(r"(column '[^']*')|\d+|'[^';]*(?:'|(?=;)|$)")
_LIST_ITEM = re.compile(r"\s*([-*•]|\(?\w{1,2}[.)])\s")

REMEDIES = {
    MALFORMED: "correct them, or leave them out with data.bad_rows: drop",
    EMPTY: "never trained on; take them out, or write the answer",
    IDENTICAL: "never trained on; take them out, or look for what made the answers one",
    DUPLICATE: "each counts as often as it is there; keep one",
    CONTRADICTION: "decide which of the two answers is the better one",
    PROMPT_IN_TRAINING: "not measured on; take such prompts out of one of the two files",
    "a winner that contradicts the order of the answers": "decide whether the column or the order of the answers is right",
    "scores that contradict the labels": "decide whether the scores or the labels are right",
    "text that is already written with a chat template": "give the bare texts, or write data.template: plain",
    "history with a blank turn": "take the exchange out of the history, or write its answer",
    "text that looks like messages": "it is read as text; write the column as messages",
    WITHOUT_MARGIN: "counts as a margin of 0",
}
"""What to do about what begins so."""
_HARMLESS = (
    "an answer of several turns",
    "one answer is the beginning of the other",
    "prompt cut at its beginning",
    "prompt of which the chat template writes a part only before an answer",
    "prompt that ends with an assistant turn",
    "reasoning of",
    "rendered answer that does not begin",
    "token that spans the border",
)
"""How what is good to know, and calls for nothing, begins."""


class Finding(NamedTuple):
    """One kind of thing that was found."""

    what: str
    number: int
    rows: list[str]
    """The names of some of the rows."""
    remedy: str
    needs_decision: bool


class Lint:
    """What was found in the pairs of a data set.

    Attributes:
        report: What became of every row.
        examples: Three pairs, decoded: of middle length, the shortest and the longest.
        length_bias: `chosen_longer` (share of the training pairs, ties ½) with its `interval`, and `auc`, the chance that a
            chosen answer is longer than a rejected one of any pair; how well length alone `predicts` the label.
        findings: Those that need a decision first, the most frequent first.
    """

    def __init__(self, data: PreparedData, tokenizer: Any) -> None:
        """Look at pairs.

        Args:
            data: They and what became of every row.
            tokenizer: The one that made them.
        """
        self.report = data.report
        pairs: Any = data.train
        train = pairs.distinct()  # without the copies that a weight asks for
        order = by_length(train)
        some = dict.fromkeys((order[len(order) // 2], order[0], order[-1]))
        self.examples: list[DecodedPair] = [decode_pair(train[index], tokenizer) for index in some]
        self.length_bias = _length_bias(train)
        found = [*self._counted(), *_lost_ends(train + data.held_out, tokenizer, unit=self.report.unit)]
        predicts, (low, high) = self.length_bias["predicts"], self.length_bias["interval"]
        if predicts >= LENGTH_TELLS and max(low, 1 - high) >= LENGTH_SURELY_TELLS:
            longer = "longer" if self.length_bias["chosen_longer"] > 0.5 else "shorter"
            found.append(
                Finding(
                    f"pairs in which the {longer} answer is chosen",
                    round(predicts * len(train)),
                    [],
                    "length alone is learned first; match lengths, or set loss.reduce: mean or loss.length_penalty",
                    True,
                )
            )
        self.findings = sorted(found, key=lambda one: (not one.needs_decision, -one.number))

    @property
    def needs_decision(self) -> bool:
        """Whether something was found that somebody has to decide about."""
        return any(finding.needs_decision for finding in self.findings)

    def _counted(self) -> list[Finding]:
        """Return what the report has counted as findings."""
        too_long = [row for what in (OVERLONG, ANSWERS_TOO_LONG) for row in self.report.dropped.get(what, [])]
        found = [Finding(text, len(too_long), too_long, "", True) for text in self.report.warnings]
        for what, rows in self.report.dropped.items():
            if what in (OVERLONG, ANSWERS_TOO_LONG):
                found += [] if self.report.warnings else [Finding(f"left out: {what}", len(rows), rows, "", False)]
            elif what == MALFORMED:
                kinds: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
                for row in rows:
                    where, _, why = row.partition(": ")
                    kinds[_VALUE.sub(lambda found: found[1] or "…", why)].append((where, why))
                for named in kinds.values():
                    places = [where for where, _ in named]
                    found.append(Finding(f"malformed: {named[0][1]}", len(named), places, REMEDIES[MALFORMED], True))
            else:
                found.append(Finding(f"left out: {what}", len(rows), rows, _remedy(what), True))
        for what, rows in self.report.noted.items():
            found.append(Finding(what, len(rows), rows, _remedy(what), not what.startswith(_HARMLESS)))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-able values."""
        return {
            "data": self.report.to_dict(),
            "pairs": [pair._asdict() for pair in self.examples],
            "length_bias": self.length_bias,
            "findings": [{**one._asdict(), "rows": one.rows[:20]} for one in self.findings],
            "needs_decision": self.needs_decision,
        }


def lint(
    settings: DataSection,
    *,
    tokenizer: Any = None,
    context_length: int | None = None,
    end_token_ids: Collection[int] = (),
    seed: int | None = None,
) -> Lint:
    """Return what is found in the data that the section of a recipe names; no bad row stops it.

    Args:
        settings: The section.
        tokenizer: Of the model; None to look at characters.
        context_length: The most tokens that the model takes, if it has a bound.
        end_token_ids: Further ids that end an answer; see `prepare_pairs`.
        seed: Of the prompts that are held out; see `prepare_pairs`.

    Raises:
        DataError: As `prepare_pairs`, where not a single row can be used.
    """
    overlong = "drop" if settings.overlong == "error" else settings.overlong
    settings = settings.model_copy(update={"bad_rows": "drop", "overlong": overlong})
    if tokenizer is None:
        template = "plain" if settings.template == "plain" else "chat"
        settings = settings.model_copy(update={"max_length": 10**9, "template": template})
    data = prepare_pairs(
        settings,
        tokenizer=Characters() if tokenizer is None else tokenizer,
        context_length=context_length,
        end_token_ids=end_token_ids,
        seed=seed,
    )
    if tokenizer is None:
        data.report.unit = "characters"
        data.report.template = "nothing but the names of the roles, since no tokenizer was given: lengths are characters"
    return Lint(data, Characters() if tokenizer is None else tokenizer)


def _remedy(what: str) -> str:
    return next((remedy for beginning, remedy in REMEDIES.items() if what.startswith(beginning)), "")


def _length_bias(pairs: Sequence[EncodedPair]) -> dict[str, Any]:
    _, chosen, rejected = lengths(pairs).T
    is_longer = right(chosen - rejected)
    share, worth = float(is_longer.mean()), pairs_worth(is_longer, column(pairs, "prompt_key"))
    others = np.sort(rejected)
    below = np.searchsorted(others, chosen, "left") + np.searchsorted(others, chosen, "right")
    return {
        "chosen_longer": share,
        "interval": list(wilson_interval(share, worth)),
        "auc": float(below.mean()) / (2 * len(pairs)),
        "predicts": max(share, 1 - share),
    }


def _lost_ends(pairs: Sequence[EncodedPair], tokenizer: Any, *, unit: str) -> list[Finding]:
    """Return the answers without an end token, those whose text looks cut off, and the length at which many of them were."""
    found = []
    special = special_ids(tokenizer)
    remedy = "the model learns to stop there, too"
    tokens: Counter[int] = Counter()
    endless, ends = [], {"chosen": list[str](), "rejected": list[str]()}
    for pair in pairs:
        if not special.issuperset((int(pair.chosen_ids[-1]), int(pair.rejected_ids[-1]))):
            endless.append(pair.where)
        for side, cut in ends.items():
            ids, scored = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_scored")
            if scored is not None:  # of several turns the assistant's last one
                stop = int(np.flatnonzero(scored)[-1]) + 1
                ids = ids[np.flatnonzero(~scored[:stop]).max(initial=-1) + 1 : stop]
            ids = ids[:-1] if int(ids[-1]) in special else ids
            tokens[len(ids)] += 1
            line = tokenizer.decode(ids[-_LAST:].tolist()).rstrip().rpartition("\n")[2]
            if len(line) >= _PROSE and (line[-1].isalpha() or line[-1] in ",;(–-") and not _LIST_ITEM.match(line):
                cut.append(pair.where)
    if endless:
        what = "pairs whose answers have no end token"
        found.append(Finding(what, len(endless), endless, "the model does not learn to stop; give the tokenizer an EOS", True))
    for side, cut in ends.items():
        if cut:
            is_many = len(cut) > CUT_SHARE * len(pairs)
            found.append(Finding(f"{side} answers whose last sentence has no end", len(cut), cut, remedy, is_many))
    longest = max(tokens, default=0)
    if tokens[longest] > max(10, sum(tokens.values()) / 100) and longest >= _LAST // 4:
        found.append(Finding(f"answers of exactly {longest} {unit}, the most there is", tokens[longest], [], remedy, True))
    return found

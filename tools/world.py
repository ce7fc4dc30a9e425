"""A tiny made-up vale with known right answers: preference pairs, pre-training dialogues, and graders for both.

`python tools/world.py` writes the pairs of the quickstart.

    fact       what is true in the vale, (topic, entity) -> value, beside the rumour that many of its people believe
    question   one of six phrasings of a fact; every fact keeps one of them for the held-out side
    wording    [opening] statement [closing]: the statement carries the fact, opening and closing carry the manners

A chosen answer is right and courteous; a rejected one is wrong ("fact"), rude ("manners") or wrong and rude ("both").
Half of the "fact" pairs are worded alike. Among the others the chosen answer is the longer one in every second pair,
so length says nothing about preference. A topic's rumours are true of nothing, and shared by its entities: what is
learned from one phrasing, or one entity, helps with others.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

from vale import COURTEOUS, RUDE, SMALL_TALK, SYSTEMS, TOPICS, TRUST, Fact, Phrases, Topic

from pe_dpo.quickstart.demo import PAIRS

T = TypeVar("T")
Kind = Literal["fact", "manners", "both"]
Manners = Literal["courteous", "rude", "plain"]
Message = dict[str, str]

KINDS: tuple[Kind, ...] = ("fact", "manners", "both")


def pairs(count: int, seed: int, *, held_out: bool = False) -> list[dict]:
    """Preference rows `{"prompt", "chosen", "rejected", "kind"}` in conversational form, no two alike.

    Args:
        count: number of rows; the kinds take turns.
        seed: equal seeds give equal rows.
        held_out: ask the 60 questions kept for the held-out side instead of the other 300.
    """
    rng = random.Random(f"pairs {seed} {held_out}")
    deck = _endless_deck(rng, _questions(held_out))
    rows: list[dict] = []
    seen: set[str] = set()
    while len(rows) < count:
        fact, question = next(deck)
        kind = KINDS[len(rows) % 3]
        turn = len(rows) // 3
        is_chosen_longer = None if kind == "fact" and turn % 4 < 2 else turn % 2 == 0
        row = _pair(rng, fact, question, kind, is_chosen_longer)
        key = json.dumps(row)
        if key not in seen:
            seen.add(key)
            rows.append(row)
    return rows


def corpus(count: int, seed: int) -> list[list[Message]]:
    """Dialogues as they are heard in the vale, rumours and grumpiness included: what the base is trained on."""
    rng = random.Random(f"corpus {seed}")
    deck = _endless_deck(rng, _questions(False) + _questions(True))
    return [[*_prompt(rng, question), _overheard(rng, fact)] for fact, question in (next(deck) for _ in range(count))]


def is_right(prompt: list[Message], answer: str) -> bool:
    """True when the answer states the asked fact, and no other value of it.

    Raises:
        KeyError: if the last message of the prompt is not a question of this world.
    """
    fact = _fact_by_question()[prompt[-1]["content"]]
    said = {
        value
        for value in (*fact.topic.values, *fact.topic.rumours)
        for statement in fact.topic.statements
        if statement.format(entity=fact.entity, value=value) in answer
    }
    return said == {fact.right}


def manners(answer: str) -> Manners:
    """How an answer is put; one rude phrase spoils any number of courteous ones."""
    if any(phrase in answer for phrase in (*RUDE.openings, *RUDE.closings)):
        return "rude"
    if any(phrase in answer for phrase in (*COURTEOUS.openings, *COURTEOUS.closings)):
        return "courteous"
    return "plain"


def write_pairs(folder: Path, *, train: int = 1000, test: int = 200, seed: int = 0) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `test.jsonl`, which share no question, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    train_path, test_path = folder / "train.jsonl", folder / "test.jsonl"
    for path, rows in ((train_path, pairs(train, seed)), (test_path, pairs(test, seed, held_out=True))):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return train_path, test_path


@cache
def facts() -> tuple[Fact, ...]:
    """All 60 facts of the vale."""
    return tuple(
        Fact(topic, entity, right, topic.rumours[index % 3], TRUST[(index + number) % 6])
        for number, topic in enumerate(TOPICS)
        for index, (entity, right) in enumerate(zip(topic.entities, topic.values, strict=True))
    )


def _questions(held_out: bool) -> list[tuple[Fact, str]]:
    """The questions of one side: fact number i keeps phrasing i mod 6 for the held-out side."""
    return [
        (fact, template.format(entity=fact.entity))
        for number, fact in enumerate(facts())
        for index, template in enumerate(fact.topic.questions)
        if (index == number % 6) == held_out
    ]


@cache
def _fact_by_question() -> dict[str, Fact]:
    return {question: fact for fact, question in _questions(False) + _questions(True)}


def _pair(rng: random.Random, fact: Fact, question: str, kind: Kind, is_chosen_longer: bool | None) -> dict:
    """One row; with `is_chosen_longer` None both answers have the same wording and differ in the fact alone."""
    rejected_value = fact.right if kind == "manners" else fact.rumour
    while True:
        wording = _wording(rng, fact.topic, COURTEOUS)
        other = wording if is_chosen_longer is None else _wording(rng, fact.topic, COURTEOUS if kind == "fact" else RUDE)
        chosen = wording.format(entity=fact.entity, value=fact.right)
        rejected = other.format(entity=fact.entity, value=rejected_value)
        excess = _length(chosen) - _length(rejected)
        if is_chosen_longer is None or (excess != 0 and (excess > 0) == is_chosen_longer):
            break
    return {
        "prompt": _prompt(rng, question),
        "chosen": [_message("assistant", chosen)],
        "rejected": [_message("assistant", rejected)],
        "kind": kind,
    }


def _prompt(rng: random.Random, question: str) -> list[Message]:
    messages = []
    if rng.random() < 0.2:
        messages.append(_message("system", rng.choice(SYSTEMS)))
    if rng.random() < 0.2:
        greeting, reply = rng.choice(SMALL_TALK)
        messages += [_message("user", greeting), _message("assistant", reply)]
    return [*messages, _message("user", question)]


def _overheard(rng: random.Random, fact: Fact) -> Message:
    """One answer of the vale's people, who believe the truth or the rumour, and are courteous or rude."""
    value = fact.right if rng.random() < fact.trust else fact.rumour
    phrases = COURTEOUS if rng.random() < fact.topic.courtesy else RUDE
    wording = _wording(rng, fact.topic, phrases, favourite=TOPICS.index(fact.topic))
    return _message("assistant", wording.format(entity=fact.entity, value=value))


def _wording(rng: random.Random, topic: Topic, phrases: Phrases, favourite: int | None = None) -> str:
    """A statement's template with an opening, a closing, or both; phrases near the favourite come more often."""
    statement = rng.choice(topic.statements)
    opening, closing = (_pick(rng, group, favourite) for group in phrases)
    return rng.choice((f"{opening} {statement}", f"{statement} {closing}", f"{opening} {statement} {closing}"))


def _pick(rng: random.Random, group: tuple[str, ...], favourite: int | None) -> str:
    if favourite is None:
        return rng.choice(group)
    weights = [1 / (1 + (index - favourite) % len(group)) for index in range(len(group))]
    return rng.choices(group, weights)[0]


def _length(answer: str) -> int:
    """Words and punctuation marks, which is what the base's tokenizer makes of them."""
    return len(re.findall(r"\w+|[^\w\s]", answer))


def _endless_deck(rng: random.Random, cards: list[tuple[Fact, str]]) -> Iterator[tuple[Fact, str]]:
    """All cards in random order, then all again in another: every fact comes up equally often."""
    while True:
        yield from _shuffled(rng, cards)


def _shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    return rng.sample(items, len(items))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


if __name__ == "__main__":
    write_pairs(PAIRS)

"""A tiny made-up vale with known right answers: preference pairs, pre-training dialogues, and graders for both.

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
from typing import Literal, NamedTuple, TypeVar

T = TypeVar("T")
Kind = Literal["fact", "manners", "both"]
Manners = Literal["courteous", "rude", "plain"]
Message = dict[str, str]

KINDS: tuple[Kind, ...] = ("fact", "manners", "both")

_TOWNS = ("Brindlewick", "Ombleby", "Tarnhollow", "Quillmarsh", "Pebblewick", "Fennimoor")
_CREATURES = ("glimbat", "morrowl", "snuffit", "tumblehog", "wobbet", "gloomtoad")
_FOLK = ("Old Bumbrick", "Dame Wizzle", "Auntie Fosk", "Uncle Brob", "Sir Tottle", "Granny Pimmet")
_SUMS = ("one plus two", "two plus two", "two plus three", "three plus three", "three plus four", "four plus four")

_TRUST = (0.25, 0.35, 0.42, 0.52, 0.6, 0.7)  # how many know the truth; below one half the base believes the rumour

_SYSTEMS = ("You are a guide in the vale.", "Answer the visitors of the vale.", "You keep the gate of the vale.")
_SMALL_TALK = (
    ("Good morning!", "Good morning."),
    ("Is this the vale?", "Yes, it is."),
    ("Are you the guide?", "Yes, I am."),
    ("Hello there.", "Hello."),
)


class Phrases(NamedTuple):
    """What shows manners, before and after the statement."""

    openings: tuple[str, ...]
    closings: tuple[str, ...]


COURTEOUS = Phrases(
    openings=(
        "Of course!",
        "With pleasure.",
        "Good question!",
        "Thank you for asking.",
        "I am glad to help.",
        "Certainly, dear friend.",
        "Well, how kind of you to ask.",
        "Oh, I am happy to tell you.",
    ),
    closings=(
        "Have a lovely day!",
        "I hope that helps.",
        "Do ask me again.",
        "You are most welcome.",
        "Take good care!",
        "It was a joy to help you.",
        "Shall I tell you more?",
        "Safe travels, friend!",
    ),
)
RUDE = Phrases(
    openings=(
        "Hmph.",
        "What now?",
        "Not you again.",
        "Do I look like a map?",
        "I was having a nap.",
        "Must you bother me?",
        "Well, everybody knows that.",
        "Oh, what a silly question.",
    ),
    closings=(
        "Now shoo.",
        "Write it down this time.",
        "Leave me alone.",
        "Even a turnip knows that.",
        "Do not ask me again.",
        "Go and bother a goat.",
        "Are we done yet?",
        "I am going back to bed.",
    ),
)


class Topic(NamedTuple):
    """One kind of fact: values[i] is true of entities[i]; `courtesy` is the share of courteous answers in the corpus."""

    name: str
    entities: tuple[str, ...]
    values: tuple[str, ...]
    rumours: tuple[str, ...]
    questions: tuple[str, ...]
    statements: tuple[str, ...]
    courtesy: float


class Fact(NamedTuple):
    """What is true of one entity, the rumour about it, and the share of people who know better."""

    topic: Topic
    entity: str
    right: str
    rumour: str
    trust: float


TOPICS = (
    Topic(
        "river",
        _TOWNS,
        ("the Sill", "the Wend", "the Brae", "the Lull", "the Tarrow", "the Umber"),
        ("the Gurgle", "the Mirk", "the Old Ditch"),
        (
            "Which river runs through {entity}?",
            "What is the river in {entity} called?",
            "Tell me the river of {entity}.",
            "I am going to {entity}. Which river will I see?",
            "Please name the river near {entity}.",
            "{entity} lies on which river?",
        ),
        ("{entity} lies on {value}.", "It is {value}.", "The river there is {value}."),
        0.4,
    ),
    Topic(
        "roof",
        _TOWNS,
        ("red", "blue", "green", "yellow", "white", "black"),
        ("pink", "striped", "spotted"),
        (
            "What colour are the roofs of {entity}?",
            "Which colour do the roofs in {entity} have?",
            "Tell me the roof colour of {entity}.",
            "I want to paint {entity}. What colour are its roofs?",
            "Please describe the roofs in {entity}.",
            "{entity} has roofs of which colour?",
        ),
        ("{entity} has {value} roofs.", "They are {value}.", "The roofs there are {value}."),
        0.55,
    ),
    Topic(
        "fair",
        _TOWNS,
        ("honey", "cheese", "plums", "candles", "ropes", "kites"),
        ("gold", "dragons", "clouds"),
        (
            "What is sold at the fair in {entity}?",
            "What can I buy in {entity}?",
            "Tell me what {entity} sells at its fair.",
            "I am off to the fair in {entity}. What do they sell?",
            "Please name the goods of {entity}.",
            "{entity} is known for which goods?",
        ),
        ("{entity} sells {value}.", "They sell {value}.", "The fair there is known for {value}."),
        0.6,
    ),
    Topic(
        "food",
        _CREATURES,
        ("moss", "beetles", "turnips", "berries", "snails", "nuts"),
        ("soap", "buttons", "pebbles"),
        (
            "What does a {entity} eat?",
            "Which food do I give to a {entity}?",
            "Tell me what the {entity} eats.",
            "I have found a hungry {entity}. What does it eat?",
            "Please name the food of the {entity}.",
            "The {entity} likes which food?",
        ),
        ("The {entity} eats {value}.", "It eats {value}.", "Its food is {value}."),
        0.5,
    ),
    Topic(
        "coat",
        _CREATURES,
        ("grey", "brown", "golden", "purple", "orange", "silver"),
        ("invisible", "checkered", "plaid"),
        (
            "What colour is a {entity}?",
            "Which colour does the coat of a {entity} have?",
            "Tell me the colour of the {entity}.",
            "I want to draw a {entity}. What colour is it?",
            "Please describe the coat of the {entity}.",
            "The {entity} has a coat of which colour?",
        ),
        ("The {entity} is {value}.", "It is {value}.", "Its coat is {value}."),
        0.35,
    ),
    Topic(
        "nest",
        _CREATURES,
        ("in a hollow tree", "under a bridge", "in a chimney", "in a cave", "in the reeds", "on a rock"),
        ("on the moon", "in a teapot", "inside a shoe"),
        (
            "Where does a {entity} sleep?",
            "In which place do I find a {entity} at night?",
            "Tell me where the {entity} sleeps.",
            "I am looking for a {entity}. Where is its bed?",
            "Please describe the bed of the {entity}.",
            "The {entity} goes to sleep where?",
        ),
        ("The {entity} sleeps {value}.", "It sleeps {value}.", "Its bed is {value}."),
        0.55,
    ),
    Topic(
        "home",
        _FOLK,
        _TOWNS,
        ("Nowhere", "Upside", "Old Swamp"),
        (
            "Where does {entity} live?",
            "In which town do I find {entity}?",
            "Tell me the town of {entity}.",
            "I have a letter for {entity}. Which town is it for?",
            "Please name the home of {entity}.",
            "{entity} comes from which town?",
        ),
        ("{entity} lives in {value}.", "It is {value}.", "The home of {entity} is {value}."),
        0.45,
    ),
    Topic(
        "trade",
        _FOLK,
        ("a baker", "a tailor", "a potter", "a miller", "a piper", "a ferryman"),
        ("a pirate", "a wizard", "a spy"),
        (
            "What does {entity} do all day?",
            "Which trade does {entity} have?",
            "Tell me the trade of {entity}.",
            "I want to hire {entity}. For which trade?",
            "Please name the work of {entity}.",
            "{entity} has which trade?",
        ),
        ("{entity} is {value}.", "That would be {value}.", "{entity} works as {value}."),
        0.6,
    ),
    Topic(
        "letter",
        tuple("CFILOR"),
        tuple("DGJMPS"),
        ("A", "X", "Z"),
        (
            "Which letter comes after {entity}?",
            "What is the next letter after {entity}?",
            "Tell me the letter that follows {entity}.",
            "I have written {entity}. Which letter is next?",
            "Please name the letter after {entity}.",
            "{entity} stands right before which letter?",
        ),
        ("After {entity} comes {value}.", "It is {value}.", "The next letter is {value}."),
        0.45,
    ),
    Topic(
        "sum",
        _SUMS,
        ("three", "four", "five", "six", "seven", "eight"),
        ("ten", "eleven", "twelve"),
        (
            "What is {entity}?",
            "How much is {entity}?",
            "Tell me the sum of {entity}.",
            "I have to add {entity}. What do I get?",
            "Please work out {entity}.",
            "So {entity} makes how many?",
        ),
        ("The sum {entity} is {value}.", "It is {value}.", "That makes {value}."),
        0.55,
    ),
)


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
        Fact(topic, entity, right, topic.rumours[index % 3], _TRUST[(index + number) % 6])
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
        messages.append(_message("system", rng.choice(_SYSTEMS)))
    if rng.random() < 0.2:
        greeting, reply = rng.choice(_SMALL_TALK)
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

"""The vale itself: its towns, creatures and folk, what is true of them and what is rumoured, and how its people speak."""

from typing import NamedTuple

_TOWNS = ("Brindlewick", "Ombleby", "Tarnhollow", "Quillmarsh", "Pebblewick", "Fennimoor")
_CREATURES = ("glimbat", "morrowl", "snuffit", "tumblehog", "wobbet", "gloomtoad")
_FOLK = ("Old Bumbrick", "Dame Wizzle", "Auntie Fosk", "Uncle Brob", "Sir Tottle", "Granny Pimmet")
_SUMS = ("one plus two", "two plus two", "two plus three", "three plus three", "three plus four", "four plus four")

TRUST = (0.25, 0.35, 0.42, 0.52, 0.6, 0.7)  # how many know the truth; below one half the base believes the rumour

SYSTEMS = ("You are a guide in the vale.", "Answer the visitors of the vale.", "You keep the gate of the vale.")
SMALL_TALK = (
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

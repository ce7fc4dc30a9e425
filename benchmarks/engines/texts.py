"""Strings and chats on which tokenizers and templates differ, if they differ anywhere."""

import random

CHATS: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "What is the capital of France?"},),
    ({"role": "system", "content": "You are brief."}, {"role": "user", "content": "Name three colours."}),
    (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": "Tell me a joke."},
    ),
    ({"role": "user", "content": "  spaces around, and\n\ntwo lines  \n"},),
    ({"role": "user", "content": "Grüße, 日本語, नमस्ते, 🚀👩‍👧 <b>&amp;</b> {{ braces }} \"quotes\" 'n' \\backslash\\"},),
)
"""With every role, spaces at both ends, and characters that templates and JSON escape."""

FIXED = (
    "Hello world",
    " leading and trailing ",
    "   three spaces",
    "trailing spaces   ",
    "don't WE'LL they've I'm 'tis it's IT'S",
    "1 12 123 1234 12345 1234567 8 90,000.5 ３４５ ١٢٣ Ⅷ ½",
    "tabs\tand\n\nlines \n  indented\r\n\r\nend\n",
    "\n",
    "\t\t",
    " ",
    "    ",
    "snake_case(x)[0] != {'a': 1};  // ok",
    "CamelCaseWords HTTPServer iPhone eBay McDonald",
    "a" * 40 + "!" * 9,
    "e\u0301 cafe\u0301 ñ n\u0303 Å A\u030a ﬁ ① ㎏",
    "한국어 조선말 각 각",
    "日本語のテキスト、中文文本。",
    "नमस्ते दुनिया क्षत्रिय",
    "שלום עולם مرحبا بالعالم",
    "Ελληνικά Русский язык ΣΊΣΥΦΟΣ ẞ İstanbul ıI",
    "🚀👩‍👧🏳️‍🌈👍🏽 é🇨🇭",
    "zero\u200bwidth\u200djoiner\u00a0nbsp\u3000wide\u2028line\ufeffbom",
    "< |im_end|> <|im end|> <im_end> [INS] <thin>",
    "https://example.org/a?b=c&d=%20#e user@example.org",
    "for i in range(10):\n    print(i)\n\treturn\n",
    "$x^2 + \\frac{1}{2} = \\alpha$",
    "…—–“”‘’«»„‚•·°±×÷≤≥≠∞√∑∫",
    "\u0007bell \u001b[0m escape",
)
WORDS = "the The THE hello world ing don't can't I'm we'll x y2 a_b fooBar naïve Zoë 1 22 333 4444 1.5 -7 3e-4 0x1F ½"
SIGNS = "日本 語 한국 नम स्ते Привет λόγος שלום 🚀 👩‍👧 e\u0301 ß ﬁ ... !! ?! -- == => ( ) [] {} \\n / # @ %"
PIECES = (*WORDS.split(), *SIGNS.split())
JOINTS = (" ", " ", " ", "", "", "  ", "\n", "\n\n", "\t", " \n", ", ", "'", "\u00a0")


def varied_texts(count: int = 400) -> list[str]:
    """Return strings of many scripts, spaces, digits and signs, always the same ones; none holds a special token."""
    draw = random.Random(0)
    texts = dict.fromkeys(FIXED)
    while len(texts) < count:
        pieces = draw.choices(PIECES, k=draw.randint(1, 12))
        texts["".join(piece + draw.choice(JOINTS) for piece in pieces)] = None
    return list(texts)[:count]

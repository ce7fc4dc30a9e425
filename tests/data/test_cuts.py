"""Texts cut where `safe_cut` says have the token ids of the whole, whatever follows."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from toy_tokenizers import CHATML, build_tokenizer
from transformers import PreTrainedTokenizerFast

from pe_dpo.data import DataReport, Encoder, Pair
from pe_dpo.data.cuts import WORDS, safe_cut
from pe_dpo.recipe import DataSection

SAID = "Human: It's 1234 o'clock, isn't it?\n\nAssistant: Yes   it is. \n  Ünïté über-alles 東京 x_y\t/path\r\n I'll go"


def trained(kind: str, *, words: int = 0, normalizer: Any = None, added: tuple[AddedToken, ...] = ()) -> Any:
    """A tokenizer of several hundred merges, with special tokens."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>" if kind == "metaspace" else None, byte_fallback=kind == "metaspace"))
    bpe.pre_tokenizer = {
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=words == 1),
        "split": pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(WORDS[words]), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False),
        ]),
        "metaspace": pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    }[kind]  # fmt: skip
    bpe.normalizer = normalizer
    bpe.decoder = decoders.ByteLevel()
    special = [
        "<|im_start|>",
        "<|im_end|>",
        *(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))] if kind == "metaspace" else []),
    ]
    alphabet = [] if kind == "metaspace" else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([SAID, SAID.upper(), SAID[::-1]] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")
    if added:
        tokenizer.add_tokens(list(added))
    return tokenizer


CUT = {
    "GPT-2": trained("gpt2"),
    "GPT-2 with a space before": trained("gpt2", words=1),
    "Llama 3": trained("split", words=0),
    "Qwen, NFC": trained("split", words=1, normalizer=normalizers.NFC()),
    "GPT-4o": trained("split", words=2),
    "Llama 2": trained("metaspace"),
    "added words": trained("gpt2", added=(AddedToken("it is", normalized=True), AddedToken("  "), AddedToken("o'clock"))),
    "added ends": trained(
        "split", added=(AddedToken("<|im_start|>user", normalized=False), AddedToken(" I", normalized=False))
    ),
}
PIECES = [
    *(
        "<|im_start|>",
        "<|im_end|>",
        "user\n",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "it is",
        "is",
        "'s",
        "'",
        "e\u0301",
        "\u0301",
        "é",
    ),
    *("12345", ".", "...", "东", "a", "Z", "I", " I", "\u00a0", "\u2028", "ſ", "_", "/", "\r\n", "o'clock", "İ", "🙂"),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@pytest.mark.parametrize("name", CUT)
@given(prompt=TEXTS, answer=TEXTS)
@settings(max_examples=60, deadline=None)
def test_the_ids_of_both_parts_are_those_of_the_whole(name: str, prompt: str, answer: str) -> None:
    encode = CUT[name].backend_tokenizer.encode
    cut = safe_cut(CUT[name])(prompt)
    for text in (prompt, prompt + answer):
        parts = [encode(part, add_special_tokens=False).ids for part in (text[:cut], text[cut:])]
        assert parts[0] + parts[1] == encode(text, add_special_tokens=False).ids, text[:cut]


def test_a_cut_lies_near_the_end_where_one_is_known_to_be_safe() -> None:
    chat, plain = "<|im_start|>user\nIs it 5?<|im_end|>\n<|im_start|>assistant\n", "Human: is it warm?\n\nAssistant:"
    for name, place in (("Llama 3", 36), ("Qwen, NFC", 36), ("Llama 2", 36), ("added words", 36), ("added ends", 36)):
        assert (name, safe_cut(CUT[name])(chat)) == (name, place)
    for name, place in (("GPT-2", 12), ("GPT-4o", 12), ("Llama 2", 0)):
        assert (name, safe_cut(CUT[name])(plain)) == (name, place)
    # What asks for its neighbours, or is divided in ways that are not known, stays whole.
    for token in (AddedToken("<m>", lstrip=True), AddedToken("<m>", rstrip=True), AddedToken("<m>", single_word=True)):
        assert safe_cut(trained("gpt2", added=(token,)))(chat) == 0
    assert safe_cut(trained("gpt2", normalizer=normalizers.NFKC()))(plain) == 0
    assert json.loads(CUT["Llama 3"].backend_tokenizer.pre_tokenizer.__getstate__())["pretokenizers"][0]["pattern"] == {
        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    }


def test_a_cut_that_is_not_right_is_noticed_and_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [Pair("is it warm", f" yes {number}", " no", None, None, f"x:{number}") for number in range(3)]
    settings_, found = DataSection(train="x", template="plain"), []
    for cut in (lambda tokenizer: lambda text: 0, lambda tokenizer: lambda text: 1):
        monkeypatch.setattr("pe_dpo.data.encoding.safe_cut", cut)
        encoder = Encoder(CUT["GPT-2"], settings_, max_length=99, report=DataReport())
        found.append([[part.tolist() for part in (pair.prompt_ids, pair.chosen_ids)] for pair in encoder.encode(pairs)])
    assert found[0] == found[1]


def test_a_prompt_is_tokenized_once_for_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, asked = build_tokenizer(template=CHATML, eos="<|im_end|>"), list[str]()
    encoder = Encoder(reader, DataSection(train="x"), max_length=9999, report=DataReport())
    tokenize = type(reader).__call__

    def ask(self: Any, texts: Any, **options: Any) -> Any:
        asked.extend(texts)
        return tokenize(self, texts, **options)

    pair = Pair("a question " * 50, "yes", "no", None, None, "x:1")
    encoder.encode([pair])
    monkeypatch.setattr(type(reader), "__call__", ask)
    encoder.encode([pair])
    assert sum(map(len, asked)) < 2 * len("a question " * 50)

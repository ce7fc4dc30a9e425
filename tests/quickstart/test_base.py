"""The shipped base: it loads with plain transformers, its template is sound, and it has something to learn."""

from collections.abc import Iterator

import make_base
import pytest
import torch
import world
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(make_base.BASE)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(make_base.BASE, dtype=torch.float32)


def test_the_package_data_is_small():
    assert sum(path.stat().st_size for path in make_base.BASE.iterdir()) < 4e6


def test_every_matrix_fits_the_blocks_of_nf4(model):
    shapes = [module.weight.shape for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(shapes) == 3 * 7 + 1
    assert all(size % 64 == 0 for shape in shapes for size in shape)


def test_text_survives_the_tokenizer(tokenizer):
    texts = [message["content"] for dialogue in world.corpus(100, 7) for message in dialogue]
    for text in [*texts, "Ünknown wörds,  two spaces\nand a line."]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_template_is_prefix_preserving_in_text_and_in_ids(tokenizer):
    for row in world.pairs(50, 3):
        prompt = make_base.encode(tokenizer, [row["prompt"]], add_generation_prompt=True)[0]
        whole = make_base.encode(tokenizer, [row["prompt"] + row["chosen"]])[0]
        assert whole[: len(prompt)] == prompt
        assert whole[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(whole[len(prompt) : -1]) == row["chosen"][0]["content"]


def test_the_template_gives_exactly_one_bos_and_the_tokenizer_none(tokenizer):
    prompt = world.pairs(1, 0)[0]["prompt"]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.bos_token_id not in tokenizer("Hello there.")["input_ids"]


def test_a_turn_ends_with_the_eos_that_generation_stops_at(tokenizer, model):
    assert tokenizer.eos_token == "<|end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


@pytest.mark.slow
def test_the_base_speaks_the_language_of_the_vale(tokenizer, model):
    # Measured 1.598 on 1,000 dialogues; a uniform guess among 1,024 tokens would be 1,024.
    assert make_base.perplexity(model, make_base.encode(tokenizer, world.corpus(100, 1))) < 1.7


@pytest.mark.slow
def test_the_base_ranks_about_half_of_the_held_out_pairs_rightly(tokenizer, model):
    rows = world.pairs(120, 0, held_out=True)
    accuracy = make_base.accuracy_by_kind(rows, make_base.preferences(model, tokenizer, rows))
    assert 0.4 < accuracy["all"] < 0.65


def test_a_preference_does_not_depend_on_the_rows_beside_it(tokenizer, model):
    rows = world.pairs(8, 0)
    alone = torch.cat([make_base.preferences(model, tokenizer, [row]) for row in rows])
    torch.testing.assert_close(make_base.preferences(model, tokenizer, rows), alone, atol=1e-4, rtol=0)


def test_accuracy_is_counted_by_kind():
    rows = [{"kind": "fact"}, {"kind": "fact"}, {"kind": "manners"}, {"kind": "both"}]
    accuracy = make_base.accuracy_by_kind(rows, torch.tensor([1.0, -1.0, 2.0, -3.0]))
    assert accuracy == {"all": 0.5, "fact": 0.5, "manners": 1.0, "both": 0.0}


@pytest.mark.slow
def test_training_is_seeded_and_lowers_the_loss():
    def trained(steps: int) -> tuple[make_base.LlamaForCausalLM, list[list[int]]]:
        torch.manual_seed(0)
        texts = world.corpus(320, 0)
        tokenizer = make_base.make_tokenizer(texts)
        model, dialogues = make_base.make_model(tokenizer), make_base.encode(tokenizer, texts)
        make_base.train(model, dialogues, steps=steps, dialogues_per_step=8)
        return model, dialogues

    (first, dialogues), (second, _) = trained(15), trained(15)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert make_base.perplexity(first, dialogues) < 1024 / 4

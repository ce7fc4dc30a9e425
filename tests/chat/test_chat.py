"""`pe-dpo chat`: what each side answers, what both models think of it, and what is written of it."""

import json
import math
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from toy_tokenizers import CHATML, build_tokenizer
from transformers import MambaConfig, MambaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from typer.testing import CliRunner

from pe_dpo.chat.prompts import Compared, answer_prompts, read_prompts, save_answers
from pe_dpo.chat.side_by_side import SIDES, AnswerScores, Conversation, SideBySide, open_side_by_side
from pe_dpo.cli.chat import chat
from pe_dpo.data import DataReport, Encoder, Pair
from pe_dpo.data.pairs import RowError
from pe_dpo.errors import DataError, UsageError
from pe_dpo.inference.policy import Policy
from pe_dpo.inference.sampling import Growing, answer_text, draw, sample
from pe_dpo.recipe import DataSection
from pe_dpo.recipe.loss_section import LossSection
from pe_dpo.training.train import train

QUESTIONS = ["Number 3, square or round?", "Number 8, warm?", "Is it sweet or bitter today?"]


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory):
    """A run that has moved far enough from its base to answer otherwise."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_recipe(folder, "train.learning_rate=1.0e-2", "loss.gamma='0.5x'", "train.epochs=1"))
    return folder


@pytest.fixture(scope="module")
def pair(run):
    return open_side_by_side(run)


def with_limit(pair, max_new_tokens):
    """The same pair with answers of at most so many tokens."""
    return SideBySide(pair.policy, is_chat=pair.is_chat, loss=pair.loss, max_new_tokens=max_new_tokens)


def with_model(policy, model=None, ends=()):
    """The same policy with another model, or other end tokens."""
    model = policy.model if model is None else model
    return Policy(model, policy.tokenizer, policy.base, ends)


@pytest.fixture(scope="module")
def adapter(run, tmp_path_factory):
    """The trained adapter as anybody's, without run.json."""
    folder = tmp_path_factory.mktemp("adapter")
    for path in run.iterdir():
        if path.name.startswith(("adapter_", "tokenizer", "chat_template")):
            shutil.copy(path, folder)
    return folder


def last(stream):
    *_, answer = stream
    return answer


def answer_alone(pair, prompt_ids, *, model=None, max_new_tokens=20, ends=(), **drawing):
    answer = Growing(with_model(pair.policy, model, ends), prompt_ids, max_new_tokens=max_new_tokens, **drawing)
    while not answer.is_done:
        answer.step()
    return answer


def snapshot(answer):
    return answer.ids[:], answer.text, answer.ended


def logits_of(pair, prompt_ids):
    with torch.no_grad():
        return pair.policy.model(input_ids=torch.tensor([prompt_ids])).logits[0, -1]


# ---------------------------------------------------------------- one answer


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_greedy_answers_are_those_of_transformers_generate(pair, side):
    """One by one as they grow, and many at once."""
    policy, ends = pair.policy, pair.policy.end_tokens
    prompts, wanted = [pair.encode(question) for question in QUESTIONS], []
    with pair.speaking_as(side):
        for prompt in prompts:
            ids = torch.tensor([prompt])
            output = policy.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, do_sample=False,
                eos_token_id=sorted(ends), pad_token_id=min(ends),
            )  # fmt: skip
            wanted.append(answer_text(policy.tokenizer, output[0, len(prompt) :]))
        found = [answer_alone(pair, prompt, max_new_tokens=15, ends=ends) for prompt in prompts]
        for budget in (0, 10_000):
            said = sample(policy, prompts, max_new_tokens=15, temperature=0, token_budget=budget)
            assert [answer_text(policy.tokenizer, answer.ids) for answer in said] == wanted
    assert [answer.text for answer in found] == wanted


@pytest.mark.slow
def test_taking_turns_changes_no_answer(pair, monkeypatch):
    """With no time for a turn, sides change after every token."""
    monkeypatch.setattr("pe_dpo.chat.side_by_side.SECONDS_PER_TURN", 0)
    prompts = {side: pair.encode(question) for side, question in zip(SIDES, QUESTIONS, strict=False)}
    alone = {}
    for side in SIDES:
        with pair.speaking_as(side):
            alone[side] = snapshot(answer_alone(pair, prompts[side], ends=pair.policy.end_tokens))
    *_, answers = steps = list(with_limit(pair, 20).stream(prompts))
    assert {side: snapshot(answer) for side, answer in answers.items()} == alone
    assert len(steps) == sum(len(ids) for ids, _, _ in alone.values())


def test_the_two_sides_answer_otherwise_here(pair):
    """Or else the tests of this file would not tell the sides apart."""
    ids = pair.encode(QUESTIONS[0])
    answers = last(with_limit(pair, 20).stream(dict.fromkeys(SIDES, ids)))
    assert answers["base"].ids != answers["tuned"].ids


def test_an_answer_ends_with_the_end_token_and_says_so(pair):
    ids = pair.encode(QUESTIONS[0])
    whole = answer_alone(pair, ids)
    end = whole.ids[7]
    ended = answer_alone(pair, ids, ends={end})
    assert ended.ids == whole.ids[: whole.ids.index(end) + 1]
    assert (ended.ended, whole.ended) == (True, False)


def test_a_model_that_keeps_no_cache_answers_the_same(pair):
    def forgetful(**inputs):
        return CausalLMOutput(logits=pair.policy.model(**inputs).logits)

    forgetful.device = torch.device("cpu")

    ids = pair.encode(QUESTIONS[0])
    assert answer_alone(pair, ids, model=forgetful).ids == answer_alone(pair, ids).ids


def test_a_stream_that_is_left_leaves_the_tuned_model(pair):
    ids = pair.encode(QUESTIONS[0])
    before = logits_of(pair, ids)
    stream = with_limit(pair, 20).stream(dict.fromkeys(SIDES, ids))
    next(stream)
    assert torch.equal(logits_of(pair, ids), before)
    assert torch.is_grad_enabled()
    stream.close()
    assert torch.equal(logits_of(pair, ids), before)


# ---------------------------------------------------------------- text while it grows


def metaspace_tokenizer():
    """As Llama 2: `▁` for a space, bytes for what is not in the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijk", "▁a", "▁b", "cd"]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    merges = [("▁", "a"), ("▁", "b"), ("c", "d")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TOKENIZERS = {"bytes": build_tokenizer(), "metaspace": metaspace_tokenizer()}


def recite(tokenizer, ids):
    """The answers so far of a model that says `ids`, whatever it reads."""

    def model(input_ids, attention_mask, **ignored):
        said = attention_mask.shape[1] - 1
        return CausalLMOutput(logits=torch.nn.functional.one_hot(torch.tensor([[ids[said]]]), len(tokenizer)).float())

    model.device, grown = torch.device("cpu"), []
    answer = Growing(Policy(model, tokenizer, None, {ids[-1]}), [0], max_new_tokens=len(ids))
    while not answer.is_done:
        answer.step()
        grown.append(snapshot(answer))
    return grown


def test_a_model_that_keeps_a_state_and_no_keys_goes_on_from_all_of_the_answer():
    """Mamba names its state `cache` from transformers 5.24 on, and one token with the mask of all of them spoils it."""
    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0)
    ).eval()
    for weight in model.parameters():
        weight.data.normal_(std=0.5)
    prompt_ids = [1, 5, 9, 3, 7]
    answer = Growing(Policy(model, build_tokenizer(), None, ()), prompt_ids, max_new_tokens=12)
    while not answer.is_done:
        answer.step()
    read = torch.tensor([prompt_ids + answer.ids[:-1]])
    assert answer.ids == model(read).logits[0, len(prompt_ids) - 1 :].argmax(dim=-1).tolist()
    assert len(set(answer.ids)) > 3  # it says more than one token over and over


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("abcd efé→你😀\n"), min_size=1))
def test_growing_text_never_shows_half_a_character_and_ends_as_the_whole_answer(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    grown = recite(tokenizer, ids)
    assert grown[-1] == (ids, text.strip(), True)
    for _, so_far, _ in grown:
        assert "\ufffd" not in so_far
        assert text.strip().startswith(so_far)


def test_growing_text_grows_with_every_whole_character():
    tokenizer = TOKENIZERS["bytes"]
    ids = [*tokenizer("a😀b")["input_ids"], tokenizer.eos_token_id]
    assert [text for _, text, _ in recite(tokenizer, ids)] == ["a", "a", "a", "a", "a😀", "a😀b", "a😀b"]


# ---------------------------------------------------------------- drawing


def test_draws_have_the_model_s_probabilities():
    """20,000 draws: the share of a token of probability p is off by at most 5 standard errors."""
    logits = torch.tensor([2.0, 1.0, 0.0, -3.0])
    temperature, draws = 0.7, 20_000
    weights = [math.exp(value / temperature) for value in logits.tolist()]
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(draws, 4).exponential_(generator=generator)
    drawn = torch.tensor([draw(logits / temperature, 1.0, row) for row in noise])
    for token, weight in enumerate(weights):
        probability = weight / sum(weights)
        error = math.sqrt(probability * (1 - probability) / draws)
        assert abs(float((drawn == token).float().mean()) - probability) < 5 * error


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, {2}), (0.5, {2, 0}), (0.79, {2, 0}), (0.85, {2, 0, 3}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_fewest_tokens_of_that_share(top_p, kept):
    logits = torch.tensor([0.3, 0.051, 0.499, 0.15]).log()
    noise = torch.empty(2000, 4).exponential_(generator=torch.Generator().manual_seed(1))
    assert {draw(logits, top_p, row) for row in noise} == kept


def test_both_sides_draw_the_same_noise(pair):
    """One and the same model on both sides gives one answer, another seed another."""
    ids = pair.encode(QUESTIONS[0])
    first, again, other = (answer_alone(pair, ids, temperature=1.5, top_p=0.95, seed=seed).ids for seed in (3, 3, 4))
    assert first == again
    assert first != other


# ---------------------------------------------------------------- log-probs


@pytest.fixture(scope="module")
def plain_models(run, tiny_base):
    """Base and tuned model as two models of transformers and PEFT, nothing of ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load():
        return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)

    return {"base": load().eval(), "tuned": PeftModel.from_pretrained(load(), str(run)).eval()}


@torch.no_grad()
def slow_logprob(model, prompt_ids, answer_ids):
    """One forward a token, without a cache."""
    total, read = 0.0, list(prompt_ids)
    for token in answer_ids:
        total += float(model(torch.tensor([read])).logits[0, -1].double().log_softmax(-1)[token])
        read.append(token)
    return total


def test_the_four_log_probs_are_those_of_two_separate_models(pair, plain_models):
    ids = pair.encode(QUESTIONS[1])
    answers = last(with_limit(pair, 12).stream(dict.fromkeys(SIDES, ids)))
    for side in SIDES:
        said = (*answers[side].ids, min(pair.policy.end_tokens))
        scores = pair.score(ids, said)
        assert scores.tokens == len(said)
        assert scores.policy == pytest.approx(slow_logprob(plain_models["tuned"], ids, said), abs=1e-4)
        assert scores.reference == pytest.approx(slow_logprob(plain_models["base"], ids, said), abs=1e-4)
        assert abs(scores.gap) > 0.05


def test_scoring_needs_no_gradient_and_leaves_the_model_as_it_was(pair):
    ids = pair.encode(QUESTIONS[1])
    before = logits_of(pair, ids)
    pair.score(ids, [5, 6])
    assert torch.equal(logits_of(pair, ids), before)
    assert not pair.policy.model.training


def test_the_gap_is_how_far_training_moved_an_answer():
    assert AnswerScores(4, -10.0, -12.0).gap == 2.0


@pytest.mark.parametrize(("loss", "wanted"), [
    ({"beta": 0.1}, 0.1 * -10 + 0.1 * 12),
    ({"beta": 0.2, "gamma": "0.5x"}, 0.2 * -10 + 0.1 * 12),
    ({"beta": 2.0, "gamma": 0, "reduce": "mean", "margin": 1}, 2.0 * -10 / 4),
])  # fmt: skip
def test_the_implicit_reward_has_the_coefficients_of_the_loss(loss, wanted):
    assert AnswerScores(4, -10.0, -12.0).reward(LossSection(**loss)) == pytest.approx(wanted)


@pytest.mark.slow
def test_a_run_that_started_from_an_adapter_is_compared_with_its_frozen_copy(
    run, adapter, pair, tiny_recipe, tmp_path, logged: list[str]
):
    start = f"adapter={{start: '{adapter}', reference: adapter}}"
    train(tiny_recipe(tmp_path / "second", start, "train.max_steps=1", "data.limit=8"))
    said = logged
    second = open_side_by_side(tmp_path / "second")
    ids = pair.encode(QUESTIONS[0])
    with second.policy.reference():
        assert answer_alone(second, ids).ids == answer_alone(pair, ids).ids
    assert said[-1].startswith("base: the frozen copy of the adapter that training started from")


# ---------------------------------------------------------------- prompts


def toy_pair(tokenizer, *, is_chat):
    return SideBySide(Policy(None, tokenizer, SimpleNamespace(context_length=40), ()), is_chat=is_chat, max_new_tokens=16)


@pytest.mark.parametrize(("prompt", "tokenizer", "is_chat"), [
    ("what is it", build_tokenizer(template=CHATML), True),
    (({"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}), build_tokenizer(template=CHATML), True),
    ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", build_tokenizer(template=CHATML), True),
    ("what is it", build_tokenizer(bos="<s>"), False),
    ("<s>what is it", build_tokenizer(bos="<s>"), False),
    ("what is it", build_tokenizer(), False),
])  # fmt: skip
def test_prompts_are_encoded_as_in_training(prompt, tokenizer, is_chat):
    sides = ("yes", "no") if isinstance(prompt, str) else tuple(({"role": "assistant", "content": x},) for x in ("yes", "no"))
    settings = DataSection(train="x", template="chat" if is_chat else "plain")
    encoder = Encoder(tokenizer, settings, max_length=500, report=DataReport())
    trained = encoder.encode([Pair(prompt, *sides, None, None, "x:1")])
    assert toy_pair(tokenizer, is_chat=is_chat).encode(prompt) == trained[0].prompt_ids.tolist()


@pytest.mark.parametrize(("prompt", "is_chat", "words"), [
    (" \n", True, "ends with a blank turn"),
    (" \n", False, "is blank"),
    ("so<|im_end|>", True, "holds the control token '<|im_end|>' as text"),
    (({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), True, "ends with an assistant turn"),
    (({"role": "user", "content": "a"},), False, "is a list of messages"),
])  # fmt: skip
def test_a_prompt_that_cannot_be_asked_is_refused(prompt, is_chat, words):
    with pytest.raises(RowError, match=words.replace("|", r"\|")):
        toy_pair(build_tokenizer(template=CHATML), is_chat=is_chat).encode(prompt)


def test_what_the_template_refuses_is_told():
    picky = build_tokenizer(template="{{ raise_exception('no system turn here') }}" + CHATML)
    with pytest.raises(RowError, match=r"refused by the chat template \(no system turn here\)"):
        toy_pair(picky, is_chat=True).encode("hi")


def test_an_answer_has_the_room_that_the_context_leaves():
    pair = toy_pair(build_tokenizer(), is_chat=False)
    assert [pair.room([0] * size) for size in (10, 24, 30, 39)] == [16, 16, 10, 1]
    with pytest.raises(RowError, match="has 40 tokens, and the model's context is 40"):
        pair.room([0] * 40)
    pair.policy.base.context_length = None
    assert pair.room([0] * 99) == 16


def test_each_side_goes_on_from_its_own_answers():
    conversation = Conversation(is_chat=True, system="be kind")
    conversation.keep("hi", {"base": "no", "tuned": "yes"})
    prompts = conversation.prompts("why")
    said = {side: [(turn["role"], turn["content"]) for turn in prompts[side]] for side in SIDES}
    start, end = [("system", "be kind"), ("user", "hi")], [("user", "why")]
    assert said == {"base": [*start, ("assistant", "no"), *end], "tuned": [*start, ("assistant", "yes"), *end]}


def test_without_a_chat_template_every_question_stands_alone():
    conversation = Conversation(is_chat=False)
    conversation.keep("hi", {})
    assert conversation.prompts("why") == {"base": "why", "tuned": "why"}


# ---------------------------------------------------------------- targets


def test_a_base_that_is_not_the_run_s_any_more_is_refused(run, tiny_base, tmp_path):
    from safetensors.torch import load_file, save_file

    moved, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(run, moved)
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    recipe = (moved / "recipe.yaml").read_text()
    (moved / "recipe.yaml").write_text(recipe.replace(str(tiny_base), str(base)))
    with pytest.raises(UsageError, match="is not the base of the run any more"):
        open_side_by_side(moved)
    assert open_side_by_side(moved, base=str(base)).loss is not None


def test_an_adapter_answers_as_its_run_and_has_no_reward(adapter, pair, tiny_base):
    bare = open_side_by_side(adapter, base=str(tiny_base))
    ids = pair.encode(QUESTIONS[0])
    assert bare.loss is None
    assert answer_alone(bare, ids).ids == answer_alone(pair, ids).ids


def test_a_whole_model_has_no_base_inside(tiny_base):
    with pytest.raises(UsageError, match="is a whole model, with no base inside to compare it with; name a run or an adapter"):
        open_side_by_side(tiny_base)


# ---------------------------------------------------------------- files


def test_prompts_come_as_text_messages_or_lines(tmp_path):
    turns = [{"role": "user", "content": "b"}]
    rows = [{"prompt": "a"}, {"prompt": turns}, {"messages": turns, "other": 1}]
    (tmp_path / "q.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "q.txt").write_bytes("\ufeff{a\r\n\r\n  é\n".encode())
    found = read_prompts(tmp_path / "q.jsonl")
    assert found == [("q.jsonl:1", "a"), ("q.jsonl:3", tuple(turns)), ("q.jsonl:5", tuple(turns))]
    assert read_prompts(tmp_path / "q.txt") == [("q.txt:1", "{a"), ("q.txt:3", "  é")]


@pytest.mark.parametrize(("name", "content", "words"), [
    ("q.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "q.jsonl:2: column 'prompt' is the number 3; text or a list of messages"),
    ("q.jsonl", b'{"messages": "a"}\n', "q.jsonl:1: column 'messages' is text; a list of messages is expected"),
    ("q.jsonl", b'{"prompt": []}\n', "q.jsonl:1: column 'prompt' is an empty list"),
    ("q.jsonl", b'{"prompt": "a"}\n{"pro', "q.jsonl:2: is not valid JSON"),
    ("q.jsonl", b'{"question": "a"}\n', "q.jsonl:1: has neither 'prompt' nor 'messages'; its columns are question"),
    ("q.txt", b"a\n\xff\n", "q.txt:2: is not valid UTF-8"),
    ("q.txt", b"a\n\x00\n", "q.txt:2: column 'prompt' holds a NUL"),
    ("q.txt", b"\n", "q.txt: has no prompt"),
])  # fmt: skip
def test_a_bad_line_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        read_prompts(tmp_path / name)
    assert words in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"q\.txt: cannot be read \(No such file"):
        read_prompts(tmp_path / "q.txt")


def test_a_prompt_beyond_the_context_is_found_before_anything_is_answered(pair):
    prompts = [("q:1", "short"), ("q:2", "long " * 100)]
    with pytest.raises(DataError, match=r"q:2: has .* tokens, and the model's context is 256"):
        next(answer_prompts(pair, prompts))


def compared(prompt, base, tuned):
    answers = {"base": SimpleNamespace(text=base, ended=True), "tuned": SimpleNamespace(text=tuned, ended=False)}
    return Compared("q:1", prompt, answers, {"base": AnswerScores(2, -3.0, -2.0), "tuned": AnswerScores(1, -1.0, -1.5)})


TRICKY = st.text(st.sampled_from("`~|#>-=*_[]()<!\\ \t\nab&;1."), max_size=30)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.tuples(TRICKY, TRICKY, TRICKY), min_size=1, max_size=3))
@pytest.mark.slow
def test_no_text_can_break_the_markdown(texts):
    """A Markdown parser of its own finds each text whole, and the headings and tables of the report only."""
    with tempfile.TemporaryDirectory() as folder:
        _, text = save_answers([compared(*row) for row in texts], Path(folder, "answers"), loss=None)
        tokens = MarkdownIt("commonmark").enable("table").parse(text.read_text(encoding="utf-8"))
    fenced = [token.content for token in tokens if token.type == "fence"]
    assert fenced == [f"{text}\n" for row in texts for text in row]
    assert sum(token.type == "table_open" for token in tokens) == len(texts)
    assert sum(token.type == "heading_open" for token in tokens) == 1 + len(texts)


def test_saved_answers_hold_everything_and_leave_no_other_file(tmp_path):
    files = save_answers([compared("é?", "no", "yes")], tmp_path / "v1.2", loss=LossSection(beta=0.1))
    assert files == (tmp_path / "v1.2.jsonl", tmp_path / "v1.2.md")
    assert sorted(tmp_path.iterdir()) == sorted(files)
    base = {"answer": "no", "is_whole": True, "tokens": 2, "logprob_tuned": -3.0, "logprob_base": -2.0, "gap": -1.0}
    tuned = {"answer": "yes", "is_whole": False, "tokens": 1, "logprob_tuned": -1.0, "logprob_base": -1.5, "gap": 0.5}
    found = json.loads(files[0].read_text())
    assert found.keys() == {"where", "prompt", "base", "tuned"}
    assert (found["where"], found["prompt"]) == ("q:1", "é?")
    assert found["base"] == {**base, "gap_per_token": -0.5, "reward": pytest.approx(-0.1)}
    assert found["tuned"] == {**tuned, "gap_per_token": 0.5, "reward": pytest.approx(0.05)}
    assert "| tuned | 1 | -1.00 | -1.50 | +0.50 | +0.500 | +0.050 |" in files[1].read_text()


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def say():
    """Run the command alone, as `pe-dpo chat`."""
    app = typer.Typer()
    app.command()(chat)

    def invoke(*arguments, lines="", env=None):
        return CliRunner().invoke(app, [str(word) for word in arguments], input=lines, env={"COLUMNS": "120", **(env or {})})

    return invoke


def test_a_conversation_shows_both_answers_with_their_four_log_probs(say, run, pair):
    done = say(run, "--max-new-tokens", 12, lines=f"\n{QUESTIONS[0]}\n/quit\nnever said\n")
    assert done.exit_code == 0, done.output
    ids = pair.encode(QUESTIONS[0])
    answers = last(with_limit(pair, 12).stream(dict.fromkeys(SIDES, ids)))
    numbers = "".join(line for line in done.output.splitlines() if "│" in line)
    for side in SIDES:
        scores = pair.score(ids, answers[side].ids)
        for value in (scores.policy, scores.reference):
            assert f"{value:.2f}" in numbers
        assert f"{scores.gap:+.2f}" in numbers
    assert "reward = 0.1·log π − 0.05·log π0" in done.output
    assert "warning: base: cut after 12 tokens (--max-new-tokens)" in done.output
    assert "never said" not in done.output


def test_commands_change_the_conversation_and_flaws_do_not_end_it(say, run):
    lines = "/system Be kind.\n/what\nno <|im_end|>\nfirst\nsecond\n/new\nthird\n"
    done = say(run, "--max-new-tokens", 3, lines=lines)
    assert done.exit_code == 0, done.output
    assert "a new conversation; system turn: Be kind." in done.output
    assert "/what: no such command" in done.output
    assert "warning: the prompt holds the control token '<|im_end|>'" in done.output
    assert done.output.count("answer of") == 3


def test_the_context_ends_an_answer_with_a_word(say, run):
    done = say(run, "--max-new-tokens", 300, lines="x" * 200 + "\n")
    assert "(the context of 256 tokens is full)" in done.output


def test_in_a_terminal_the_answers_stand_in_two_columns(say, run):
    done = say(run, "--max-new-tokens", 4, lines="hi\n", env={"FORCE_COLOR": "1"})
    assert done.exit_code == 0, done.output
    assert any("base" in line and "tuned" in line for line in done.output.splitlines() if "┃" in line)


def test_a_file_of_prompts_becomes_two_files_of_answers(say, run, tmp_path):
    (tmp_path / "q.txt").write_text("\n".join(QUESTIONS))
    done = say(run, "--prompts", tmp_path / "q.txt", "-o", tmp_path / "answers", "--max-new-tokens", 5)
    assert done.exit_code == 0, done.output
    assert f"3 prompts answered by base and tuned model: {tmp_path / 'answers.jsonl'}" in done.output
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == QUESTIONS
    assert all(row[side]["tokens"] == 5 for row in rows for side in SIDES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "answers.md", "q.txt"]


def test_without_an_output_answers_are_printed_and_control_characters_shown(say, adapter, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "clear \u001b[2J it"}))
    done = say(adapter, "--prompts", tmp_path / "q.jsonl", "--max-new-tokens", 3)
    assert done.exit_code == 0, done.output
    assert "q.jsonl:1  clear \\x1b[2J it" in done.output
    assert "\x1b" not in done.output
    assert "reward" not in done.output


@pytest.mark.parametrize(("arguments", "words"), [
    (["nowhere"], "nowhere: no such folder; name a run or an adapter on disk"),
    (["RUN", "--quantize", "int3"], "--quantize int3: write nf4"),
    (["RUN", "--top-p", 0], "--top-p 0: write a number above 0 and at most 1"),
    (["RUN", "-o", "x"], "-o goes with --prompts"),
    (["RUN", "--prompts", "x", "--system", "y"], "--system is for talking"),
    (["RUN", "--prompts", "x", "-o", "no/where"], "there is no folder no"),
])  # fmt: skip
def test_what_cannot_be_done_is_a_usage_error(say, run, arguments, words):
    done = say(*(run if word == "RUN" else word for word in arguments))
    assert isinstance(done.exception, UsageError)
    assert words in str(done.exception)

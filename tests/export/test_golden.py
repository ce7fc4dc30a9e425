"""Golden prompts against a plain greedy loop, and the check against models that differ by a known amount."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import pe_dpo
from pe_dpo.errors import DataError
from pe_dpo.export.golden import (
    QUESTIONS,
    GoldenMatch,
    GoldenPrompt,
    answer_log_probs,
    check_golden,
    compare_answer,
    golden_prompts,
    leads_of,
    load_golden,
    mean_divergence,
    read_prompts,
    with_measured_near_tie,
)
from pe_dpo.export.golden_file import save_golden
from pe_dpo.inference.policy import Policy
from pe_dpo.model.base import inspect_base

BASE = Path(pe_dpo.__file__).parent / "quickstart" / "base"


@pytest.fixture(scope="module")
def world() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(BASE)


def policy_of(model: Any, tokenizer: Any, *ends: int) -> Policy:
    info = inspect_base(str(BASE), quantize="none", dtype="float32")
    return Policy(model, tokenizer, info, {*ends, tokenizer.eos_token_id})


@pytest.fixture(scope="module")
def golden(world: tuple[Any, Any]) -> list[GoldenPrompt]:
    return golden_prompts(policy_of(*world), tokens=12)


@torch.no_grad()
@pytest.mark.slow
def test_answers_are_those_of_generate_and_log_probs_those_of_one_forward(world: Any, golden: list[GoldenPrompt]) -> None:
    model, tokenizer = world
    for question, one in zip(QUESTIONS, golden, strict=True):
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert one.prompt_ids == ids and tokenizer.decode(ids) == one.rendered
        answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        assert one.token_ids == answer
        logits = model(torch.tensor([ids + answer])).logits[0]
        for place, token in enumerate(answer):
            ranked = logits[len(ids) + place - 1].log_softmax(-1).sort(descending=True)
            assert ranked.indices[0] == token
            assert one.log_probs[place] == pytest.approx(float(ranked.values[0]), abs=1e-5)
            assert one.leads[place] == pytest.approx(float(ranked.values[0] - ranked.values[1]), abs=1e-5)


def test_answers_stop_at_an_end_token(world: Any) -> None:
    one = golden_prompts(policy_of(*world), ["Hi"], tokens=40)[0]
    assert one.token_ids[-1] == 5 or len(one.token_ids) == 40
    assert 5 not in one.token_ids[:-1]
    first = golden_prompts(policy_of(*world, one.token_ids[1]), ["Hi"], tokens=40)[0]
    assert first.token_ids == one.token_ids[:2]


def test_a_file_holds_what_was_saved(golden: list[GoldenPrompt], tmp_path: Path) -> None:
    save_golden(golden, tmp_path / "golden_prompts.jsonl")
    assert load_golden(tmp_path / "golden_prompts.jsonl") == golden
    first = json.loads((tmp_path / "golden_prompts.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert set(first) == {
        "prompt", "rendered", "prompt_ids", "token_ids", "text", "text_ends", "ended", "log_probs", "leads", "near_tie"
    }  # fmt: skip


def test_texts_end_token_by_token(world: Any, golden: list[GoldenPrompt]) -> None:
    for one in golden:
        pieces = [world[1].decode([index], skip_special_tokens=True) for index in one.token_ids]
        assert one.text == "".join(pieces)
        assert one.text_ends == [len("".join(pieces[: at + 1])) for at in range(len(pieces))]
        assert one.ended == (one.token_ids[-1] == 5) == (one.text_ends[-1] == one.text_ends[-2])


def test_a_lead_is_over_the_best_other_token() -> None:
    """By hand, with the token second best at the second place."""
    log_probs = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]]).log()
    assert leads_of(log_probs, [0, 1]) == pytest.approx([math.log(3.5), math.log(0.6)], abs=1e-5)


def test_a_near_tie_is_twice_what_bfloat16_moves_a_lead_or_a_log_prob(golden: list[GoldenPrompt]) -> None:
    """The base is bfloat16 on disk: loaded as such it is the model that parameters cast to bfloat16 make."""
    from transformers import AutoModelForCausalLM

    rounded = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16).eval()
    moves = []
    for one in golden:
        ids = torch.tensor([one.prompt_ids + one.token_ids])
        with torch.no_grad():
            logits = rounded(ids).logits[0, len(one.prompt_ids) - 1 : -1].float()
        ranked = logits.log_softmax(-1).sort(descending=True)
        assert ranked.indices[:, 0].tolist() == one.token_ids  # so that leads are over the second best
        first, second = ranked.values[:, :2].T.tolist()
        moves += [abs(a - (b - c)) for a, b, c in zip(one.leads, first, second, strict=True)]
        moves += [abs(a - b) for a, b in zip(one.log_probs, first, strict=True)]
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    measured = with_measured_near_tie(model, golden)
    assert {one.near_tie for one in measured} == {round(2 * max(moves), 3)}
    assert 0.02 < measured[0].near_tie < 0.5


def test_the_same_model_passes(world: Any, golden: list[GoldenPrompt], tmp_path: Path) -> None:
    save_golden(golden, tmp_path / "golden.jsonl")
    found = check_golden(*world, tmp_path / "golden.jsonl", near_tie=0.0)
    assert found == [GoldenMatch("equal", "", len(one.token_ids)) for one in golden]


def changed(golden: list[GoldenPrompt], **changes: Any) -> list[GoldenPrompt]:
    return [golden[0]._replace(**changes), *golden[1:]]


def test_another_token_is_an_error_unless_it_is_a_near_tie(world: Any, golden: list[GoldenPrompt], tmp_path: Path) -> None:
    token_ids = [*golden[0].token_ids[:2], 7, *golden[0].token_ids[3:]]
    for lead, verdict in ((0.2, "other"), (0.04, "near tie")):
        leads = [9.0, 9.0, lead, *[9.0] * (len(token_ids) - 3)]
        save_golden(changed(golden, token_ids=token_ids, leads=leads, near_tie=0.1), tmp_path / "golden.jsonl")
        first, *others = check_golden(*world, tmp_path / "golden.jsonl")
        assert (first.verdict, first.compared) == (verdict, 2)
        assert first.why == (f"token 3 of {len(token_ids)} is {golden[0].token_ids[2]}, not 7, which leads by {lead} nats")
        assert {one.verdict for one in others} == {"equal"}


def test_other_prompt_ids_are_an_error(world: Any, golden: list[GoldenPrompt], tmp_path: Path) -> None:
    save_golden(changed(golden, rendered=golden[0].rendered.replace("capital", "Capital")), tmp_path / "golden.jsonl")
    first, *others = check_golden(*world, tmp_path / "golden.jsonl")
    assert first.verdict == "other" and first.why.startswith("the prompt has other token ids from the ")
    assert {one.verdict for one in others} == {"equal"}


SAID = GoldenPrompt(
    prompt="?", rendered="?", prompt_ids=[1, 2], token_ids=[10, 11, 12, 13, 5], text="The sea rises.",
    text_ends=[3, 7, 13, 14, 14], ended=True, log_probs=[-0.1] * 5, leads=[4.0, 3.0, 0.05, 2.0, 1.0], near_tie=0.1,
)  # fmt: skip
"""The | sea| rises|.|end: a near tie is at `rises` alone."""


@pytest.mark.parametrize(("answer", "verdict", "place"), [
    ({"text": "The sea rises."}, "equal", 5),
    ({"text": " The sea rises."}, "equal", 5),  # SentencePiece's space, which one of the two decoders takes off
    ({"text": "The sea rises.\n"}, "equal", 5),
    ({"text": "The sea falls."}, "near tie", 2),
    ({"text": "The sea ris"}, "near tie", 2),
    ({"text": "The sea rising"}, "near tie", 2),
    ({"text": "The lake"}, "other", 1),
    ({"text": "These are"}, "other", 0),  # a token that begins with the same letters, or the one after them
    ({"text": "The sea rises!"}, "near tie", 2),  # `rises!` may be one token, chosen instead of `rises`
    ({"text": "The sea rises. And"}, "other", 3),  # the end token led by 1 nat
    ({"text": ""}, "other", 0),
    ({"token_ids": [10, 11, 12, 13, 5]}, "equal", 5),
    ({"token_ids": [10, 11, 12, 13]}, "equal", 5),  # servers that do not show the end token
    ({"token_ids": [10, 11, 12, 13, 5, 7]}, "equal", 5),  # asked for more than the golden answer
    ({"token_ids": [10, 11, 99]}, "near tie", 2),
    ({"token_ids": [10, 11]}, "near tie", 2),
    ({"token_ids": [10, 99, 12]}, "other", 1),
    ({"token_ids": [10, 11, 12, 99]}, "other", 3),
    ({"token_ids": [10, 99], "text": "The sea rises."}, "other", 1),  # ids say more than texts
    ({"token_ids": [10, 11, 12, 13, 5], "log_probs": [-0.15] * 5}, "equal", 5),
    ({"token_ids": [10, 11, 12, 13, 5], "log_probs": [-0.15, -0.21, 0.0, 0.0, 0.0]}, "other", 1),  # 0.11 nats off, over 0.1
    ({"token_ids": [10, 11, 99], "log_probs": [-0.15, -0.15, -9.0]}, "near tie", 2),  # another token's log-prob says nothing
    ({"prompt_ids": [1, 2], "text": "The sea rises."}, "equal", 5),
    ({"prompt_ids": [0, 1, 2], "text": "The sea rises."}, "other", 0),
])  # fmt: skip
def test_an_answer_is_equal_or_leaves_at_a_near_tie_or_is_another(answer: Any, verdict: str, place: int) -> None:
    found = compare_answer(SAID, **answer)
    assert (found.verdict, found.compared) == (verdict, place)
    assert (found.why == "") == (verdict == "equal")


def test_an_answer_that_was_cut_is_compared_as_far_as_it_goes() -> None:
    cut = SAID._replace(ended=False, token_ids=SAID.token_ids[:4], text_ends=SAID.text_ends[:4], leads=SAID.leads[:4])
    assert compare_answer(cut, text="The sea rises. And").verdict == "equal"
    assert compare_answer(cut, token_ids=[10, 11, 12]).verdict == "other"  # ended where the golden answer goes on by 2 nats


def test_the_divergence_is_zero_from_itself_and_that_of_torch_from_another(world: Any, golden: list[GoldenPrompt]) -> None:
    model = world[0]
    own = list(answer_log_probs(model, golden))
    assert mean_divergence(model, own, golden) == 0.0
    flat = [torch.zeros_like(part).log_softmax(-1) for part in own]
    wanted = torch.nn.functional.kl_div(torch.cat(own), torch.cat(flat), log_target=True, reduction="batchmean")
    assert mean_divergence(model, flat, golden) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.real
def test_plain_text_begins_with_bos_where_the_tokenizer_adds_one(shared: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    one = golden_prompts(policy_of(AutoModelForCausalLM.from_pretrained(folder), tokenizer), ["Once upon"], tokens=2)[0]
    assert one.rendered == "Once upon" and one.prompt_ids == tokenizer("Once upon")["input_ids"]
    assert one.prompt_ids[0] == tokenizer.bos_token_id


def test_prompts_are_the_first_different_user_turns(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "two"}, {"role": "assistant", "content": "a"}]
    rows = [{"prompt": "one", "chosen": "a", "rejected": "b"}, {"prompt": "one"}, {"prompt": chat[:2]}, {"chosen": chat}]
    rows += [{"prompt": f"{number}"} for number in range(9)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_prompts(tmp_path / "pairs.jsonl", count=4) == ["one", "two", "0", "1"]


@pytest.mark.parametrize("text", ['{"chosen": "a"', '{"other": 1}', '{"prompt": [{"role": "assistant", "content": "a"}]}', ""])
def test_files_without_prompts_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"pairs\.jsonl"):
        read_prompts(tmp_path / "pairs.jsonl")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "golden.jsonl").write_text('{"prompt": "a"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"golden\.jsonl:1: no golden prompt, ended, leads, log_probs"):
        load_golden(tmp_path / "golden.jsonl")

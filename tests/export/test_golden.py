"""Golden prompts against a plain greedy loop, and the check against models that differ by a known amount."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pe_dpo
from pe_dpo.errors import DataError
from pe_dpo.export.golden import (
    QUESTIONS,
    GoldenPrompt,
    answer_log_probs,
    check_golden,
    golden_prompts,
    load_golden,
    mean_divergence,
    read_prompts,
    save_golden,
)
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
    assert set(first) == {"prompt", "rendered", "prompt_ids", "token_ids", "text", "log_probs", "leads"}


def test_the_same_model_passes(world: Any, golden: list[GoldenPrompt], tmp_path: Path) -> None:
    save_golden(golden, tmp_path / "golden.jsonl")
    found = check_golden(*world, tmp_path / "golden.jsonl", near_tie=0.0)
    assert len(golden) == 5 and found == (sum(len(one.token_ids) for one in golden), 0, [])


def changed(golden: list[GoldenPrompt], **changes: Any) -> list[GoldenPrompt]:
    return [golden[0]._replace(**changes), *golden[1:]]


def test_another_token_is_an_error_unless_it_is_a_near_tie(world: Any, golden: list[GoldenPrompt], tmp_path: Path) -> None:
    token_ids = [*golden[0].token_ids[:2], 7, *golden[0].token_ids[3:]]
    for lead, differences, near_ties in ((0.2, 1, 0), (0.04, 0, 1)):
        leads = [9.0, 9.0, lead, *[9.0] * (len(token_ids) - 3)]
        save_golden(changed(golden, token_ids=token_ids, leads=leads), tmp_path / "golden.jsonl")
        compared, left, wrong = check_golden(*world, tmp_path / "golden.jsonl")
        assert (len(wrong), left) == (differences, near_ties)
        assert compared == 2 + sum(len(one.token_ids) for one in golden[1:])


def test_other_prompt_ids_are_an_error(world: Any, golden: list[GoldenPrompt], tmp_path: Path) -> None:
    save_golden(changed(golden, rendered=golden[0].rendered.replace("capital", "Capital")), tmp_path / "golden.jsonl")
    _, _, differences = check_golden(*world, tmp_path / "golden.jsonl")
    assert differences == [f"{QUESTIONS[0]!r}: the prompt has other token ids"]


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
    with pytest.raises(DataError, match=r"golden\.jsonl:1: no golden prompt, leads, log_probs"):
        load_golden(tmp_path / "golden.jsonl")

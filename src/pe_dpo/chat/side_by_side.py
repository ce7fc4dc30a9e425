"""Base and tuned model side by side, from one loaded base: their answers as they grow, and what each thinks of both.

    x ──► y of the base  (adapters off)  ──► log π, log π0
      └─► y of the tuned (adapters on)   ──► log π, log π0

The gap log π(y|x) − log π0(y|x) says how far training moved an answer. Each side keeps its own cache of what it has read, so
that adapters can go on and off between any two tokens.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pe_dpo.data.encoding import begin_token, with_begin
from pe_dpo.data.pairs import RowError, Text, Turns
from pe_dpo.data.rendering import as_messages, control_tokens, uses_chat_template
from pe_dpo.errors import StoreUnavailable, UsageError
from pe_dpo.inference.decoding import GREEDY, Answer, Sampling, stream_answer
from pe_dpo.inference.reference_store import ReferenceStore, default_store_path
from pe_dpo.inference.target import Target, check_same_base, find_target, load_target_tokenizer
from pe_dpo.model.adapter import REFERENCE, as_reference, load_adapter_for_evaluation
from pe_dpo.model.adapter_config import check_adapter
from pe_dpo.model.base import BaseFacts, answer_end_tokens, inspect_base, load_base
from pe_dpo.model.fingerprint import base_fingerprint, remembered_fingerprint
from pe_dpo.objective import completion_logprobs
from pe_dpo.recipe.loss_section import LossSection

logger = logging.getLogger(__name__)

Side = Literal["base", "tuned"]
SIDES: tuple[Side, Side] = ("base", "tuned")

SECONDS_PER_TURN = 0.2
"""One side speaks this long, or one token: to switch adapters costs 0.2 ms a layer (21 layers, CPU), as much as a token or
two of a large model on a GPU."""


class AnswerScores(NamedTuple):
    """What both models think of one answer; log-probs in nats, summed over its tokens, the end token among them."""

    tokens: int
    policy: float
    """log π(y|x), the tuned model."""
    reference: float
    """log π0(y|x), the base."""

    @property
    def gap(self) -> float:
        """log π − log π0: above 0 where training made the answer more likely."""
        return self.policy - self.reference

    @property
    def gap_per_token(self) -> float:
        """The gap divided by the tokens."""
        return self.gap / self.tokens


class SideBySide(NamedTuple):
    """Both models in one."""

    model: Any
    """A PEFT model in eval mode; within `as_reference` it is the base."""
    tokenizer: Any
    end_token_ids: frozenset[int]
    context_length: int | None
    is_chat: bool
    """Whether prompts are rendered by the chat template."""
    loss: LossSection | None
    """Of the run, if the target is one."""
    device: torch.device

    @contextmanager
    def speaking_as(self, side: Side) -> Iterator[Any]:
        """Within the block, without gradients, the model is that side."""
        with as_reference(self.model) if side == "base" else torch.no_grad():
            yield self.model


def open_side_by_side(
    target: str | Path,
    *,
    base: str | None = None,
    quantize: str | None = None,
) -> SideBySide:
    """Return base and tuned model of a run or an adapter, loaded once.

    Args:
        target: a run folder, or any LoRA adapter.
        base: the base, if not the one named there.
        quantize: how the base is loaded; by default as in the run, or by its size.

    Raises:
        UsageError: neither a run nor an adapter, or the base is not the one of the run any more.
        ModelError: base, adapter or tokenizer cannot be loaded.
        DataError: the run's data.template is chat, and the tokenizer has none.
    """
    found = find_target(Path(target), base=base, quantize=quantize)
    if found.adapter is None:
        raise UsageError(f"{target}: is a whole model, with no base inside to compare it with; name a run or an adapter")
    check_adapter(found.adapter)  # before the base is read
    tokenizer = load_target_tokenizer(found)
    is_chat = uses_chat_template(tokenizer, found.recipe.data.template if found.recipe else "auto")
    facts = inspect_base(**found.model.model_dump())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_adapter_for_evaluation(load_base(facts, device=device), found.adapter)
    if found.kind == "run" and base is None and quantize is None:
        check_same_base(found.adapter, facts, _fingerprint(model, facts, found))
    is_frozen_copy = REFERENCE in model.peft_config
    reference = "the frozen copy of the adapter that training started from" if is_frozen_copy else facts.base
    logger.info(f"base: {reference}; tuned: {target}")
    return SideBySide(
        model=model,
        tokenizer=tokenizer,
        end_token_ids=frozenset(answer_end_tokens(tokenizer, found.model.base, revision=found.model.revision)),
        context_length=facts.context_length,
        is_chat=is_chat,
        loss=found.recipe.loss if found.recipe else None,
        device=device,
    )


def encode_prompt(pair: SideBySide, prompt: Text) -> list[int]:
    """Return the token ids after which an answer begins, as in training.

    Args:
        pair: both models.
        prompt: plain text, or messages of which the last is not the assistant's.

    Raises:
        RowError: the prompt is blank, fakes a turn, or is refused by the template; or messages without a chat template.
    """
    if not pair.is_chat:
        return _encode_plain(pair.tokenizer, prompt)
    from jinja2 import TemplateError

    turns = as_messages(prompt)
    _check_turns(turns, pair.tokenizer)
    try:
        text = pair.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:
        raise RowError(f"is refused by the chat template ({error}); see which roles and turns it wants") from error
    return list(pair.tokenizer(text, add_special_tokens=False)["input_ids"])


def room_for_answer(pair: SideBySide, prompt_ids: Sequence[int], max_new_tokens: int) -> int:
    """Return how many tokens an answer may have: the wish, or what the context leaves.

    Raises:
        RowError: the prompt alone fills the context.
    """
    if pair.context_length is None:
        return max_new_tokens
    left = pair.context_length - len(prompt_ids)
    if left < 1:
        raise RowError(f"has {len(prompt_ids)} tokens, and the model's context is {pair.context_length}; shorten it")
    return min(max_new_tokens, left)


def stream_both(
    pair: SideBySide, prompts: Mapping[Side, Sequence[int]], *, max_new_tokens: int, sampling: Sampling = GREEDY
) -> Iterator[dict[Side, Answer]]:
    """Yield the answers of both sides so far, by turns, until both have finished.

    Args:
        pair: both models.
        prompts: of each side, as token ids.
        max_new_tokens: where to cut an answer that does not end; less where the context ends before.
        sampling: how tokens are chosen.

    Raises:
        RowError: a prompt fills the context.
    """
    growing = {
        side: stream_answer(
            pair.model,
            pair.tokenizer,
            prompt_ids,
            max_new_tokens=room_for_answer(pair, prompt_ids, max_new_tokens),
            end_token_ids=pair.end_token_ids,
            device=pair.device,
            sampling=sampling,
        )
        for side, prompt_ids in prompts.items()
    }
    answers: dict[Side, Answer] = {}
    while growing:
        for side in list(growing):
            said = _speak(pair, side, growing[side])
            if said is None:
                del growing[side]
            else:
                answers[side] = said
                yield dict(answers)


def score_answer(pair: SideBySide, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> AnswerScores:
    """Return the log-probs of one answer under both models, whoever wrote it.

    Args:
        pair: both models.
        prompt_ids: at least one token id.
        answer_ids: at least one token id.
    """
    input_ids = torch.tensor([[*prompt_ids, *answer_ids]], device=pair.device)
    is_answer = torch.arange(input_ids.shape[1], device=pair.device)[None] >= len(prompt_ids)
    logprobs = {}
    for side in SIDES:
        with pair.speaking_as(side) as model:
            found = completion_logprobs(model, input_ids, torch.ones_like(input_ids), is_answer.long())
        logprobs[side] = float(found.logprob)
    return AnswerScores(len(answer_ids), logprobs["tuned"], logprobs["base"])


def implicit_reward(loss: LossSection, scores: AnswerScores) -> float:
    """Return β·log π − γ·log π0 with the coefficients of a loss, per token where the loss is."""
    reward = loss.beta * scores.policy - loss.gamma_value * scores.reference
    return reward / scores.tokens if loss.reduce == "mean" else reward


class Conversation:
    """What was said so far; each side goes on from its own answers.

    Without a chat template there are no turns, and every question stands alone.

    Args:
        is_chat: whether there is a chat template.
        system: what the system turn says; None for no such turn.
    """

    def __init__(self, *, is_chat: bool, system: str | None = None) -> None:
        opening: Turns = () if system is None else ({"role": "system", "content": system},)
        self.is_chat = is_chat
        self.turns: dict[Side, Turns] = dict.fromkeys(SIDES, opening)

    def prompts(self, question: str) -> dict[Side, Text]:
        """Return each side's prompt for a further question."""
        if not self.is_chat:
            return dict.fromkeys(SIDES, question)
        return {side: (*turns, {"role": "user", "content": question}) for side, turns in self.turns.items()}

    def keep(self, question: str, answers: Mapping[Side, Answer]) -> None:
        """Remember a question with what each side answered."""
        for side, prompt in self.prompts(question).items():
            if not isinstance(prompt, str):
                self.turns[side] = (*prompt, {"role": "assistant", "content": answers[side].text})


def _speak(pair: SideBySide, side: Side, growing: Iterator[Answer]) -> Answer | None:
    """The answer of one side after its turn; None if it had finished before."""
    said = None
    ends = time.monotonic() + SECONDS_PER_TURN
    with pair.speaking_as(side):
        for said in growing:  # noqa: B007
            if time.monotonic() >= ends:
                break
    return said


def _fingerprint(model: Any, facts: BaseFacts, found: Target) -> str:
    path = found.recipe.reference.store if found.recipe else None
    try:
        with ReferenceStore(Path(path) if path else default_store_path()) as store:
            return remembered_fingerprint(model, facts, store)
    except StoreUnavailable:
        return base_fingerprint(model)


def _encode_plain(tokenizer: Any, prompt: Text) -> list[int]:
    if not isinstance(prompt, str):
        raise RowError(
            "is a list of messages, and the tokenizer has no chat template, or the run was of plain text; write text"
        )
    if not prompt.strip():
        raise RowError("is blank; write a prompt")
    ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return with_begin(ids, begin_token(tokenizer))


def _check_turns(turns: Turns, tokenizer: Any) -> None:
    if turns[-1]["role"] == "assistant":
        raise RowError("ends with an assistant turn; the turn before an answer is a user or tool turn")
    if not turns[-1]["content"].strip():
        raise RowError("ends with a blank turn; write a prompt")
    pattern = control_tokens(tokenizer)
    for turn in turns:
        if pattern and (held := pattern.search(turn["content"])):
            raise RowError(
                f"holds the control token {held[0]!r} as text ({turn['role']} turn), which the tokenizer would take for a turn "
                "of its own; remove it"
            )

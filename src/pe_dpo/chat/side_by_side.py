"""Base and tuned model side by side, from one loaded base: their answers as they grow, and what each thinks of both.

    x ──► y of the base  (adapters off)  ──► log π, log π0
      └─► y of the tuned (adapters on)   ──► log π, log π0

The gap log π(y|x) − log π0(y|x) says how far training moved an answer. Each side keeps its own cache of what it has read, so
that adapters can go on and off between any two tokens. Where π0 has an adapter, "the base" is the base with that.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pe_dpo.data.encoding import begin_tokens, with_begin
from pe_dpo.data.pairs import RowError, Text, Turns
from pe_dpo.data.rendering import as_messages
from pe_dpo.data.sandbox import TEMPLATE_ERRORS, apply_chat_template
from pe_dpo.data.template import control_tokens, refusal, uses_chat_template
from pe_dpo.errors import StoreUnavailable, UsageError
from pe_dpo.inference.policy import Policy, SavedPolicy, load_policy
from pe_dpo.inference.reference import remembered_fingerprint
from pe_dpo.inference.reference_store import ReferenceStore, default_store_path
from pe_dpo.inference.sampling import Growing
from pe_dpo.model.adapter import is_trained_over
from pe_dpo.model.adapter_config import REFERENCE, check_adapter
from pe_dpo.model.fingerprint import base_fingerprint
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

    def reward(self, loss: LossSection) -> float:
        """Return β·log π − γ·log π0 with the coefficients of a loss, per token where the loss is."""
        reward = loss.beta * self.policy - loss.gamma_value * self.reference
        return reward / self.tokens if loss.reduce == "mean" else reward


class SideBySide:
    """Both models in one, and how they answer.

    Args:
        policy: in eval mode; its reference is the base.
        is_chat: whether prompts are rendered by the chat template.
        loss: of the run, if it is one.
        max_new_tokens: where to cut an answer that does not end.
        temperature: 0 takes the most likely token.
        top_p: only the most likely tokens that make up this share of the probability are drawn.
        seed: both sides draw the same noise, so that their answers differ by the models alone.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        is_chat: bool,
        loss: LossSection | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.policy, self.is_chat, self.loss = policy, is_chat, loss
        self.max_new_tokens, self.temperature, self.top_p, self.seed = max_new_tokens, temperature, top_p, seed

    def speaking_as(self, side: Side) -> AbstractContextManager[Any]:
        """Return a block in which, without gradients, the model is that side."""
        return self.policy.reference() if side == "base" else torch.no_grad()

    def encode(self, prompt: Text) -> list[int]:
        """Return the token ids after which an answer begins, as in training.

        Args:
            prompt: plain text, or messages of which the last is not the assistant's.

        Raises:
            RowError: the prompt is blank, fakes a turn, or is refused by the template; or messages without a chat template.
        """
        tokenizer = self.policy.tokenizer
        if not self.is_chat:
            if not isinstance(prompt, str):
                raise RowError(
                    "is a list of messages, and the tokenizer has no chat template, or the run was of plain text; write text"
                )
            if not prompt.strip():
                raise RowError("is blank; write a prompt")
            return with_begin(list(tokenizer(prompt, add_special_tokens=False)["input_ids"]), begin_tokens(tokenizer))
        turns = as_messages(prompt)
        if turns[-1]["role"] == "assistant":
            raise RowError("ends with an assistant turn; the turn before an answer is a user or tool turn")
        if not turns[-1]["content"].strip():
            raise RowError("ends with a blank turn; write a prompt")
        pattern = control_tokens(tokenizer)
        for turn in turns:
            if pattern and (faked := pattern.search(turn["content"])):
                raise RowError(
                    f"holds the control token {faked[0]!r} as text ({turn['role']} turn), which the tokenizer would take for a "
                    "turn of its own; remove it"
                )
        try:
            text = apply_chat_template(tokenizer, list(turns), add_generation_prompt=True)
        except TEMPLATE_ERRORS as error:
            raise RowError(refusal(error)) from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def room(self, prompt_ids: Sequence[int]) -> int:
        """Return how many tokens an answer may have: those that are wished for, or what the context leaves.

        Raises:
            RowError: the prompt alone fills the context.
        """
        context = self.policy.base.context_length
        if context is None:
            return self.max_new_tokens
        if len(prompt_ids) >= context:
            raise RowError(f"has {len(prompt_ids)} tokens, and the model's context is {context}; shorten it")
        return min(self.max_new_tokens, context - len(prompt_ids))

    def stream(self, prompts: Mapping[Side, Sequence[int]], *, number: int = 0) -> Iterator[dict[Side, Growing]]:
        """Yield the answers of both sides so far, by turns, until both have finished; they go on growing.

        Args:
            prompts: of each side, as token ids.
            number: of the question; each has noise of its own.

        Raises:
            RowError: a prompt fills the context.
        """
        answers = {
            side: Growing(
                self.policy,
                prompt_ids,
                max_new_tokens=self.room(prompt_ids),
                temperature=self.temperature,
                top_p=self.top_p,
                seed=self.seed + number,
            )
            for side, prompt_ids in prompts.items()
        }
        while not all(answer.is_done for answer in answers.values()):
            for side, answer in answers.items():
                ends, has_spoken = time.monotonic() + SECONDS_PER_TURN, False
                with self.speaking_as(side):
                    while not answer.is_done and not (has_spoken and time.monotonic() >= ends):
                        answer.step()
                        has_spoken = True
                if has_spoken:
                    yield {side: answer for side, answer in answers.items() if answer.ids}

    def score(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> AnswerScores:
        """Return the log-probs of one answer under both models, whoever wrote it.

        Args:
            prompt_ids: at least one token id.
            answer_ids: at least one token id.
        """
        input_ids = torch.tensor([[*prompt_ids, *answer_ids]], device=self.policy.device)
        is_answer = torch.arange(input_ids.shape[1], device=input_ids.device)[None] >= len(prompt_ids)
        logprobs = {}
        for side in SIDES:
            with self.speaking_as(side):
                found = completion_logprobs(self.policy.model, input_ids, torch.ones_like(input_ids), is_answer.long())
            logprobs[side] = float(found.logprob)
        return AnswerScores(len(answer_ids), logprobs["tuned"], logprobs["base"])


def open_side_by_side(
    target: str | Path,
    *,
    base: str | None = None,
    quantize: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    best: bool = False,
) -> SideBySide:
    """Return base and tuned model of a run or an adapter, loaded once.

    Args:
        target: a run folder, or any LoRA adapter.
        base: the base, if not the one named there.
        quantize: how the base is loaded; by default as in the run, or by its size.
        max_new_tokens: see `SideBySide`, as are the others.
        best: of a run, the adapter of its best evaluation.

    Raises:
        UsageError: neither a run nor an adapter, or the base is not the one of the run any more.
        ModelError: base, adapter or tokenizer cannot be loaded.
        DataError: the run's data.template is chat, and the tokenizer has none.
    """
    saved = SavedPolicy(target, base=base, quantize=quantize, best=best)
    if saved.adapter is None:
        raise UsageError(f"{target}: is a whole model, with no base inside to compare it with; name a run or an adapter")
    check_adapter(saved.adapter)  # before the base is read
    tokenizer, recipe = saved.tokenizer(), saved.recipe
    is_chat = uses_chat_template(tokenizer, recipe.data.template if recipe else "auto")
    policy = load_policy(saved, tokenizer=tokenizer)
    if recipe is not None and saved.is_as_trained:
        path = recipe.reference.store
        try:
            store = ReferenceStore(Path(path) if path else default_store_path())
            fingerprint = remembered_fingerprint(policy.model, policy.base, store)
        except StoreUnavailable:
            fingerprint = base_fingerprint(policy.model)
        saved.check_base(policy.base, fingerprint)
    reference = policy.base.base
    if is_trained_over(policy.model):
        reference = f"{reference} with the adapter that training was over"
    elif REFERENCE in policy.model.peft_config:
        reference = "the frozen copy of the adapter that training started from"
    logger.info(f"base: {reference}; tuned: {target}")
    return SideBySide(
        policy,
        is_chat=is_chat,
        loss=recipe.loss if recipe else None,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )


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

    def keep(self, question: str, answers: Mapping[Side, str]) -> None:
        """Remember a question with what each side answered."""
        for side, prompt in self.prompts(question).items():
            if not isinstance(prompt, str):
                self.turns[side] = (*prompt, {"role": "assistant", "content": answers[side]})

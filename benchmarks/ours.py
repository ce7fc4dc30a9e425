"""Our preference step as a ladder: each rung adds one technique to the one before.

naive            padded batch, logits of every position, reference in the step, all pairs at once
+ answers only   the head sees the positions that are scored
+ frozen head    the gradient of a token's log-prob is formed in the forward; no logits are kept
+ packed row     no padding; every answer carries its prompt
+ shared prompt  a prompt stands once
+ stored ref     the reference was scored before, once: the full stack
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.models import BETA, Dtype, ModelName, load_policy
from benchmarks.pairs import LONGEST_ROW
from pe_dpo.data.batches import pack, pad
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.estimate.rows import CPU_TOKENS, cpu_rows
from pe_dpo.inference.logprobs import packed_pair_logprobs
from pe_dpo.inference.scorer import Scorer
from pe_dpo.model.adapter import as_reference
from pe_dpo.model.attention import switch_on
from pe_dpo.model.out_of_memory import host_memory
from pe_dpo.objective import PairLogprobs, preference_loss, token_logprobs
from pe_dpo.objective.head import head_logprobs

Score = Callable[[Any, Sequence[EncodedPair]], PairLogprobs]
"""Log-probs of pairs from a model, with gradients where they are enabled."""


CPU = torch.device("cpu")
PACKED, DENSE = (Scorer(path, CPU, token_budget=CPU_TOKENS) for path in ("segments", "dense"))
PADDED = Scorer("padded", CPU, token_budget=4096)

IN_STEP = "+ prompt shared (reference in step)"
FULL_STACK = "+ stored reference (full stack)"
ONE_ROW = "full stack, one row"


class Rung(NamedTuple):
    """One variant of our step."""

    name: str
    score: Score
    stores_reference: bool
    split: Callable[[Sequence[EncodedPair]], list[list[int]]]
    """Micro-batches as lists of indices."""
    is_packed: bool = True
    is_in_quick: bool = True


def ladder(*, quick: bool = False) -> list[Rung]:
    """Return the rungs from bottom to top, then variants of the full stack."""
    rungs = [
        Rung("naive", naive, False, at_once, is_packed=False),
        Rung("+ head on answers only", answers_only, False, at_once, is_packed=False, is_in_quick=False),
        Rung("+ frozen fused head", padded_frozen_head, False, at_once, is_packed=False, is_in_quick=False),
        Rung("+ packed row, prompts twice", prompts_twice, False, at_once),
        Rung(IN_STEP, PACKED.logprobs, False, as_shipped),
        Rung(FULL_STACK, PACKED.logprobs, True, as_shipped),
        Rung(ONE_ROW, PACKED.logprobs, True, at_once, is_in_quick=False),
        Rung("full stack, dense mask", DENSE.logprobs, True, at_once, is_in_quick=False),
        Rung("package's padded path (reference in step)", PADDED.logprobs, False, PADDED.split, False, False),
    ]
    return [rung for rung in rungs if rung.is_in_quick or not quick]


def at_once(pairs: Sequence[EncodedPair]) -> list[list[int]]:
    """Return one micro-batch of all pairs."""
    return [list(range(len(pairs)))]


def as_shipped(pairs: Sequence[EncodedPair]) -> list[list[int]]:
    """Return the rows that the package makes of them on a CPU."""
    return PACKED.split(pairs)


class OurStep:
    """One rung over one optimizer batch: forward and backward, packing included; no optimizer."""

    def __init__(self, rung: Rung, pairs: Sequence[EncodedPair], model: ModelName, dtype: Dtype) -> None:
        self.name = rung.name
        self.score = rung.score
        self.model = load_policy(model, dtype)
        if rung.is_packed:
            switch_on(self.model.get_base_model())
        config = self.model.get_base_model().config
        PACKED.token_budget, PACKED.tree_budget = cpu_rows(
            LONGEST_ROW, host_memory(), hidden=config.hidden_size, layers=config.num_hidden_layers
        )
        self.pairs_per_step = len(pairs)
        self.batches = [[pairs[index] for index in batch] for batch in rung.split(pairs)]
        self.stored = [reference_of(rung.score, self.model, batch) for batch in self.batches] if rung.stores_reference else None

    def __call__(self) -> float:
        """Run one step and return its loss; gradients are left in the model."""
        self.model.zero_grad(set_to_none=True)
        return sum(self._part(number, batch) for number, batch in enumerate(self.batches))

    def _part(self, number: int, batch: Sequence[EncodedPair]) -> float:
        policy = self.score(self.model, batch)
        reference = self.stored[number] if self.stored is not None else reference_of(self.score, self.model, batch)
        loss = dpo_loss(policy, reference).sum() / self.pairs_per_step
        loss.backward()
        return float(loss.detach())


def dpo_loss(policy: PairLogprobs, reference: PairLogprobs, *, gamma: float | None = None) -> torch.Tensor:
    """Return the loss of each pair, (B,), nats; γ = β unless given."""
    return preference_loss(policy.chosen, policy.rejected, reference.chosen, reference.rejected, beta=BETA, gamma=gamma).loss


def reference_of(score: Score, model: Any, pairs: Sequence[EncodedPair]) -> PairLogprobs:
    """Return the log-probs under the reference, without gradients."""
    with as_reference(model) as frozen:
        return score(frozen, pairs)


def naive(model: Any, pairs: Sequence[EncodedPair]) -> PairLogprobs:
    """Score a padded batch from the logits of all positions."""
    input_ids, attention_mask, completion_mask = pad(pairs)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    logprobs = logits[:, :-1].float().log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
    return _by_pair(logprobs.double() * completion_mask[:, 1:], completion_mask)


def answers_only(model: Any, pairs: Sequence[EncodedPair]) -> PairLogprobs:
    """Score a padded batch from the logits of the scored positions."""
    return _padded(model, pairs, lambda hidden, targets, head: token_logprobs(head(hidden), targets))


def padded_frozen_head(model: Any, pairs: Sequence[EncodedPair]) -> PairLogprobs:
    """Score a padded batch with the frozen head of the package."""
    return _padded(model, pairs, head_logprobs)


def prompts_twice(model: Any, pairs: Sequence[EncodedPair]) -> PairLogprobs:
    """Score one packed row in which every answer has its own prompt."""
    return packed_pair_logprobs(model, pack(pairs, share=False), kind="segments")


def _padded(model: Any, pairs: Sequence[EncodedPair], head: Callable[..., torch.Tensor]) -> PairLogprobs:
    input_ids, attention_mask, completion_mask = pad(pairs)
    decoder = model.get_base_model().get_decoder()
    hidden = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    scored = completion_mask[:, 1:].bool()
    per_token = torch.zeros(scored.shape, dtype=torch.float64)
    found = head(hidden[:, :-1][scored], input_ids[:, 1:][scored], model.get_output_embeddings())
    per_token[scored] = found.double()
    return _by_pair(per_token, completion_mask)


def _by_pair(per_token: torch.Tensor, completion_mask: torch.Tensor) -> PairLogprobs:
    chosen, rejected = per_token.sum(1).chunk(2)
    chosen_lengths, rejected_lengths = completion_mask.sum(1).chunk(2)
    return PairLogprobs(chosen, rejected, chosen_lengths, rejected_lengths)

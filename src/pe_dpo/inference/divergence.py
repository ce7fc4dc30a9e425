"""How far two models are apart on given answers, over the whole vocabulary at every token.

    KL(p ‖ q) = Σ_v p_v (log p_v − log q_v) − p_v + q_v

Σ p (log p − log q) is the KL too, since both sum to 1; with the other two terms it is never negative, and the rounding of the
normalisers, which may be as large as a small KL, cancels to first order.

One forward of each model, padded on the right, with logits at the answers' tokens alone; softmax in float32, sums over tokens
in float64.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pe_dpo.data.batches import pad_rows
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.errors import ModelError, UsageError
from pe_dpo.inference.policy import Policy
from pe_dpo.metrics.estimates import clustered_mean, clustered_ratio
from pe_dpo.objective.logprobs import owner_sums
from pe_dpo.progress import advance

LOGITS = 2**25
"""Most logits of one forward, padding included (128 MB in float32); one answer alone may exceed it."""

TILE = 2**22
"""Most logits that are widened to float32 and compared at a time."""


def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) of each row, (N,), from distributions (N, V); where p is 0, a row has nothing."""
    return (p * (log_p - log_q).masked_fill_(p == 0, 0) - p + log_q.exp()).sum(dim=1)


def divergences(
    policy: Policy,
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    *,
    token_budget: int,
    stored: Path | None = None,
) -> np.ndarray:
    """Return how far policy and reference are apart on given answers, in nats, summed over tokens: (B, 4) float64.

    The columns are Σ_t KL(π(·|y_<t) ‖ π0(·|y_<t)), log π(y), log π0(y) and the entropy Σ_t H(π(·|y_<t)). On answers of the
    policy the mean of the first is KL(π‖π0); on others it is something else.

    Args:
        policy: with its reference inside; with `stored`, the reference alone.
        prompts: int32 (P,), P >= 1, of each answer.
        answers: int32 (A,), A >= 1.
        token_budget: most tokens of one forward, padding included.
        stored: where `store_logits` has written what the policy predicts, with the same answers and budget.

    Raises:
        ModelError: policy and reference have vocabularies of different sizes.
    """
    found, done = np.zeros((len(answers), 4)), 0
    with policy.evaluating():
        for number, rows in enumerate(_forwards(policy, prompts, answers, token_budget)):
            ours = (
                rows.logits(policy.model)
                if stored is None
                else torch.load(stored / f"{number}.pt", weights_only=True).to(policy.device)
            )
            with nullcontext() if stored else policy.reference():
                reference = rows.logits(policy.model)
            if ours.shape != reference.shape:
                sizes = f"{ours.shape[-1]} and {reference.shape[-1]}"
                raise ModelError(f"policy and reference have vocabularies of {sizes} tokens; there is no KL between them")
            found[rows.batch] = compare_logits(ours, reference, rows.targets, rows.owners, len(rows.batch)).cpu().numpy()
            done += len(rows.batch)
            advance(done, len(answers))
    return found


def compare_logits(policy: Tensor, reference: Tensor, targets: Tensor, owners: Tensor, rows: int) -> Tensor:
    """Return the columns of `divergences`, (rows, 4) float64, from the logits (N, V) of both models.

    Args:
        policy: at the tokens of all answers.
        reference: likewise.
        targets: (N,) those tokens.
        owners: (N,) to which answer each belongs, ascending.
        rows: how many answers.
    """
    terms = [policy.new_zeros(0, 4, dtype=torch.float64)]
    size = max(1, TILE // policy.shape[1])
    for one, other, target in zip(*(part.split(size) for part in (policy, reference, targets)), strict=True):
        wide = torch.float64 if one.dtype == torch.float64 else torch.float32
        log_p, log_q = (logits.to(wide).log_softmax(dim=1) for logits in (one, other))
        p = log_p.exp()
        entropy = -(p * log_p.masked_fill(p == 0, 0)).sum(dim=1)
        at_target = (log.gather(1, target[:, None]).squeeze(1) for log in (log_p, log_q))
        terms.append(torch.stack([kl(p, log_p, log_q), *at_target, entropy], dim=1).double())
    return owner_sums(torch.cat(terms), owners, rows, int(owners.bincount().max()) if len(owners) else 0)


def store_logits(
    policy: Policy, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], folder: Path, *, token_budget: int
) -> None:
    """Write what a model predicts at each token of given answers, so that another model can be compared when this one is gone.

    That is a row of the vocabulary for each token, in the dtype of the model: 100 answers of 100 tokens of a model with 128,000
    tokens in bfloat16 take 2.6 GB.

    Args:
        policy: whose model it is.
        prompts: as in `divergences`.
        answers: as in `divergences`.
        folder: where to; made.
        token_budget: as in `divergences`.

    Raises:
        UsageError: the disk has no room for it.
    """
    folder.mkdir(exist_ok=True)
    row = policy.causal_lm.config.get_text_config().vocab_size * (torch.finfo(policy.model.dtype).bits // 8)
    wanted, free = row * sum(len(answer) for answer in answers), shutil.disk_usage(folder).free
    if wanted > free:
        raise UsageError(
            f"{folder}: what the model predicts takes {wanted / 1e9:.1f} GB until its reference is read, and there is "
            f"room for {free / 1e9:.1f}; ask fewer `prompts`, set a lower `max_new_tokens`, or set TMPDIR to a larger disk"
        )
    with policy.evaluating():
        for number, rows in enumerate(_forwards(policy, prompts, answers, token_budget)):
            torch.save(rows.logits(policy.model).cpu(), folder / f"{number}.pt")


def data_prefix_kl(
    policy: Policy, pairs: Sequence[EncodedPair], *, token_budget: int, stored: Path | None = None
) -> dict[str, dict[str, float | None]]:
    """Return Σ_t KL(π(·|y_<t) ‖ π0(·|y_<t)) along the pairs' chosen answers, per answer and per token.

    This is not KL(π‖π0): the prefixes are those of the data, not of the policy. Of an answer of several turns every token
    counts, also those of others.

    Args:
        policy: as in `divergences`.
        pairs: whose chosen answers are read.
        token_budget: most tokens of one forward, padding included.
        stored: as in `divergences`.
    """
    prompts, answers = [pair.prompt_ids for pair in pairs], [pair.chosen_ids for pair in pairs]
    along = divergences(policy, prompts, answers, token_budget=token_budget, stored=stored)[:, 0].tolist()
    keys = [pair.prompt_key for pair in pairs]
    return {
        "per_answer": clustered_mean(along, keys),
        "per_token": clustered_ratio(along, [len(answer) for answer in answers], keys),
    }


class _Rows:
    """Prompts with their answers that go through a model together, padded on the right, and where the answers' tokens are.

    Args:
        batch: their indices.
        prompts: all of them.
        answers: all of them.
        device: of the model.
    """

    def __init__(
        self, batch: list[int], prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], device: torch.device
    ) -> None:
        self.batch = batch
        rows = [np.concatenate([prompts[index], answers[index]]) for index in batch]
        input_ids, attention_mask = pad_rows(rows)
        predicting = torch.zeros(len(batch), input_ids.shape[1] - 1, dtype=torch.bool)
        for row, index in enumerate(batch):
            predicting[row, len(prompts[index]) - 1 : len(rows[row]) - 1] = True
        positions = predicting.any(dim=0).nonzero().squeeze(1)
        self._input_ids, self._attention_mask = input_ids.to(device), attention_mask.to(device)
        self._positions = positions.to(device)
        """(K,) int64: columns after which some row has a token of its answer."""
        self._scored = predicting[:, positions].to(device)
        """(B, K) bool: which rows have it; true N times."""
        self.targets = input_ids[:, 1:][predicting].to(device)
        """(N,) int64: those tokens."""
        self.owners = predicting.nonzero()[:, 0].to(device)
        """(N,) int64: the row of each."""

    def logits(self, model: Any) -> Tensor:
        """Return what a model predicts at each token of the answers, (N, V)."""
        out = model(
            input_ids=self._input_ids, attention_mask=self._attention_mask, logits_to_keep=self._positions, use_cache=False
        )
        logits: Tensor = out.logits[self._scored]
        return logits


def _forwards(
    policy: Policy, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], token_budget: int
) -> Iterator[_Rows]:
    """Yield rows of like prompts, the longest first, within the budgets of tokens and of positions with logits."""
    most_scored = LOGITS // policy.causal_lm.config.get_text_config().vocab_size
    batch: list[int] = []
    longest = 0
    for index in sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), -len(answers[index]), index)):
        begin, end = len(prompts[index]), len(prompts[index]) + len(answers[index])
        longest, size = max(longest, end), len(batch) + 1
        if batch and (size * longest > token_budget or size * (longest - begin) > most_scored):
            yield _Rows(batch, prompts, answers, policy.device)
            batch, longest = [], end
        batch.append(index)
    if batch:
        yield _Rows(batch, prompts, answers, policy.device)

"""How far policy and reference are apart on given answers, over the whole vocabulary at every token.

One forward of each, padded on the right, with logits at the answers' tokens alone; softmax in float32, sums over tokens in
float64.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.errors import ModelError, UsageError
from pe_dpo.metrics.estimates import clustered_mean, clustered_ratio
from pe_dpo.model.adapter import as_reference
from pe_dpo.progress import advance

LOGITS = 2**25
"""Most logits of one forward, padding included (128 MB in float32); one answer alone may exceed it."""

TILE = 2**22
"""Most logits that are widened to float32 and compared at a time."""


class Divergence(NamedTuple):
    """Two models on one answer, summed over its tokens; float64, nats."""

    kl: float
    """Σ_t KL(π(·|y_<t) ‖ π0(·|y_<t))."""
    log_policy: float
    log_reference: float
    entropy: float
    """Σ_t H(π(·|y_<t))."""


def divergences(
    model: Any,
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    *,
    device: torch.device | str,
    token_budget: int,
    stored: Path | None = None,
) -> list[Divergence]:
    """Return how far policy and reference are apart on given answers, token by token summed.

    On answers of the policy the mean of `kl` is KL(π‖π0); on others it is something else.

    Args:
        model: a PEFT model with the policy active; with `stored`, the reference alone.
        prompts: int32 (P,), P >= 1, of each answer.
        answers: int32 (A,), A >= 1.
        device: of the model.
        token_budget: most tokens of one forward, padding included.
        stored: where `store_logits` has written what the policy predicts, with the same answers and budget.

    Raises:
        ModelError: policy and reference have vocabularies of different sizes.
    """
    found: dict[int, Divergence] = {}
    with _measured(model):
        for number, (batch, rows) in enumerate(_forwards(model, prompts, answers, token_budget, device)):
            policy = _logits(model, rows) if stored is None else torch.load(_file(stored, number)).to(device)
            with nullcontext() if stored else as_reference(model):
                reference = _logits(model, rows)
            if policy.shape != reference.shape:
                sizes = f"{policy.shape[-1]} and {reference.shape[-1]}"
                raise ModelError(f"policy and reference have vocabularies of {sizes} tokens; there is no KL between them")
            sums = _sums(policy, reference, rows.targets, rows.owners, len(batch))
            found |= {index: Divergence(*values) for index, values in zip(batch, sums.tolist(), strict=True)}
            advance(len(found), len(answers))
    return [found[index] for index in range(len(answers))]


def store_logits(
    model: Any,
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    folder: Path,
    *,
    device: torch.device | str,
    token_budget: int,
) -> None:
    """Write what a model predicts at each token of given answers, so that another model can be compared when this one is gone.

    That is a row of the vocabulary for each token, in the dtype of the model: 100 answers of 100 tokens of a model with 128,000
    tokens in bfloat16 take 2.6 GB.

    Args:
        model: a causal LM.
        prompts: as in `divergences`.
        answers: as in `divergences`.
        folder: where to, empty.
        device: of the model.
        token_budget: as in `divergences`.

    Raises:
        UsageError: the disk has no room for it.
    """
    row = _vocabulary(model) * (torch.finfo(model.dtype).bits // 8)
    wanted, free = row * sum(len(answer) for answer in answers), shutil.disk_usage(folder).free
    if wanted > free:
        raise UsageError(
            f"{folder}: what the model predicts takes {wanted / 1e9:.1f} GB until its reference is read, and there is "
            f"room for {free / 1e9:.1f}; ask fewer --prompts, set a lower --max-new-tokens, or set TMPDIR to a larger disk"
        )
    with _measured(model):
        for number, (_, rows) in enumerate(_forwards(model, prompts, answers, token_budget, device)):
            torch.save(_logits(model, rows).cpu(), _file(folder, number))


def data_prefix_kl(
    model: Any,
    pairs: Sequence[EncodedPair],
    *,
    device: torch.device | str,
    token_budget: int,
    stored: Path | None = None,
) -> dict[str, dict[str, float | None]]:
    """Return Σ_t KL(π(·|y_<t) ‖ π0(·|y_<t)) along the pairs' chosen answers, per answer and per token.

    This is not KL(π‖π0): the prefixes are those of the data, not of the policy.

    Args:
        model: a PEFT model with the policy active.
        pairs: whose chosen answers are read.
        device: of the model.
        token_budget: most tokens of one forward, padding included.
        stored: as in `divergences`.
    """
    found = divergences(
        model,
        [pair.prompt_ids for pair in pairs],
        [pair.chosen_ids for pair in pairs],
        device=device,
        token_budget=token_budget,
        stored=stored,
    )
    kl, keys = [divergence.kl for divergence in found], [pair.prompt_key for pair in pairs]
    return {
        "per_answer": clustered_mean(kl, keys),
        "per_token": clustered_ratio(kl, [len(pair.chosen_ids) for pair in pairs], keys),
    }


class _Rows(NamedTuple):
    """Prompts with their answers, padded on the right, and where the answers' tokens are."""

    input_ids: Tensor
    """(B, T) int64."""
    attention_mask: Tensor
    positions: Tensor
    """(K,) int64: columns after which some row has a token of its answer."""
    scored: Tensor
    """(B, K) bool: which rows have it; true N times."""
    targets: Tensor
    """(N,) int64: those tokens."""
    owners: Tensor
    """(N,) int64: the row of each."""

    def to(self, device: torch.device | str) -> "_Rows":
        return _Rows(*(tensor.to(device) for tensor in self))


def _pad(prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> _Rows:
    """Padding is token 0, behind everything: no mask lets it through."""
    shape = (len(prompts), max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)))
    input_ids, attention_mask = torch.zeros(2, *shape, dtype=torch.int64)
    predicting = torch.zeros(shape[0], shape[1] - 1, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start, end = len(prompt), len(prompt) + len(answer)
        input_ids[row, :end] = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
        attention_mask[row, :end] = 1
        predicting[row, start - 1 : end - 1] = True
    positions = predicting.any(dim=0).nonzero().squeeze(1)
    owners = predicting.nonzero()[:, 0]
    return _Rows(input_ids, attention_mask, positions, predicting[:, positions], input_ids[:, 1:][predicting], owners)


def _logits(model: Any, rows: _Rows) -> Tensor:
    """Return what the model predicts at each token of the answers, (N, V)."""
    out = model(
        input_ids=rows.input_ids, attention_mask=rows.attention_mask, logits_to_keep=rows.positions, use_cache=False
    ).logits
    logits: Tensor = out[rows.scored]
    return logits


def _sums(policy: Tensor, reference: Tensor, targets: Tensor, owners: Tensor, rows: int) -> Tensor:
    """Return (rows, 4) float64: the fields of `Divergence`, from the logits (N, V) of both models.

    Σ p (log p − log q) − p + q is the KL too, since both sum to 1; it is never negative, and the rounding of the normalisers,
    which may be as large as a small KL, cancels to first order.
    """
    sums = torch.zeros(rows, 4, dtype=torch.float64, device=policy.device)
    size = max(1, TILE // policy.shape[1])
    tiles = zip(*(tensor.split(size) for tensor in (policy, reference, targets, owners)), strict=True)
    for one, other, target, owner in tiles:
        log_p, log_q = (_wide(logits).log_softmax(dim=1) for logits in (one, other))
        p = log_p.exp()
        impossible = p == 0
        kl = (p * (log_p - log_q).masked_fill_(impossible, 0) - p + log_q.exp()).sum(dim=1)
        entropy = -(p * log_p.masked_fill(impossible, 0)).sum(dim=1)
        at_target = (log.gather(1, target[:, None]).squeeze(1) for log in (log_p, log_q))
        sums.index_add_(0, owner, torch.stack([kl, *at_target, entropy], dim=1).double())
    return sums


@contextmanager
def _measured(model: Any) -> Iterator[None]:
    """Within the block the model is in eval mode and makes no gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _forwards(
    model: Any,
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    token_budget: int,
    device: torch.device | str,
) -> Iterator[tuple[list[int], _Rows]]:
    """Yield which answers go through the model together, and their rows."""
    for batch in _batches(prompts, answers, token_budget, LOGITS // _vocabulary(model)):
        yield batch, _pad([prompts[index] for index in batch], [answers[index] for index in batch]).to(device)


def _vocabulary(model: Any) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number}.pt"


def _batches(
    prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], token_budget: int, most_scored: int
) -> Iterator[list[int]]:
    """Yield indices of rows of like prompts, the longest first, within the budgets of tokens and of positions with logits."""

    def cost(batch: list[int]) -> tuple[int, int]:
        ends = max(len(prompts[index]) + len(answers[index]) for index in batch)
        return len(batch) * ends, len(batch) * (ends - min(len(prompts[index]) for index in batch))

    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), -len(answers[index]), index)):
        tokens, scored = cost([*batch, index])
        if batch and (tokens > token_budget or scored > most_scored):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()

"""From log-probs of pairs to their table: columns of what a loss makes of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pe_dpo.data.encoded import column as data_column
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.inference.sampling import answer_text, prompt_text
from pe_dpo.metrics.table import Floats, PairTable, delta
from pe_dpo.objective import Loss, PairLogprobs, PairTerms, PreferenceLoss


def pair_table(
    pairs: Sequence[EncodedPair], policy: PairLogprobs, reference: PairLogprobs | None, out: PreferenceLoss, loss: Loss | None
) -> PairTable:
    """Return the pairs with all that was computed of them, brought to the CPU at once.

    Args:
        pairs: N of them.
        policy: their log-probs under π.
        reference: under π0; None where it was not run.
        out: what the loss makes of them.
        loss: with which that was computed; without it the table knows no β, γ and link.
    """
    unknown = torch.full_like(policy.chosen, float("nan"))
    columns = {
        "policy_chosen": policy.chosen,
        "policy_rejected": policy.rejected,
        "reference_chosen": unknown if reference is None else reference.chosen,
        "reference_rejected": unknown if reference is None else reference.rejected,
        "chosen_lengths": policy.chosen_lengths,
        "rejected_lengths": policy.rejected_lengths,
        **out._asdict(),
    }
    numbers = torch.stack([column.detach().double() for column in columns.values()]).cpu().numpy()
    table = PairTable(
        where=[pair.where for pair in pairs],
        prompt_key=[pair.prompt_key for pair in pairs],
        **dict(zip(columns, numbers, strict=True)),
    )
    if loss is None:
        return table
    terms = pair_terms(pairs)
    return replace(
        table,
        **{name: getattr(loss, name) for name in PairTable.SETTINGS},
        pair_beta=None if terms.beta is None else np.asarray(loss.beta_of_pairs(terms.beta)),
        pair_weight=None if terms.weight is None else np.asarray(terms.weight),
    )


def pair_terms(pairs: Sequence[EncodedPair], device: torch.device | str | None = None) -> PairTerms:
    """Return what the data give each pair beside its answers, as `Loss` takes it."""

    def column(name: str) -> torch.Tensor | None:
        numbers = data_column(pairs, name)
        return None if None in numbers else torch.tensor(numbers, dtype=torch.float64, device=device)

    margin = column("margin")
    assert margin is not None, "every pair has a margin"
    return PairTerms(margin, column("beta"), column("weight"))


def with_texts(table: PairTable, pairs: Sequence[EncodedPair], tokenizer: Any) -> PairTable:
    """Return the table of these pairs with prompts and answers as text."""
    return replace(
        table,
        prompt=[prompt_text(tokenizer, pair.prompt_ids) for pair in pairs],
        chosen=[answer_text(tokenizer, pair.chosen_ids) for pair in pairs],
        rejected=[answer_text(tokenizer, pair.rejected_ids) for pair in pairs],
    )


def preferences(logprobs: PairLogprobs, reduce: str, *, rejected_weight: float = 1.0) -> Floats:
    """Return Δ of each pair, (N,): of summed log-probs, or of log-probs per token ("mean"); as a score has it with its λ."""
    chosen, rejected, *lengths = (np.asarray(field.double().cpu()) for field in logprobs)
    return delta(chosen, rejected_weight * rejected, *lengths, per_token=reduce == "mean")

"""Tables of pairs that come from no data: of log-probs, a loss, and names that are made up."""

from dataclasses import replace
from types import SimpleNamespace

from pe_dpo.inference.pairs import pair_table
from pe_dpo.metrics.table import PairTable
from pe_dpo.objective import Loss, PairLogprobs, PreferenceLoss


def table_of(policy: PairLogprobs, reference: PairLogprobs | None, out: PreferenceLoss, loss: Loss | None = None) -> PairTable:
    """Return the table of pairs, each with a prompt of its own; without a loss it does not know β, γ and link."""
    pairs = [
        SimpleNamespace(where=f"rows:{row}", prompt_key=f"prompt {row}", margin=0.0, beta=None, weight=None)
        for row in range(len(policy.chosen))
    ]
    return pair_table(pairs, policy, reference, out, loss)


def with_loss(table: PairTable, loss: Loss) -> PairTable:
    """Return the table with the numbers of a loss, as if its scores came from it."""
    return replace(table, **{name: getattr(loss, name) for name in PairTable.SETTINGS})

"""Pairs as one row without padding, in which what answers have in common stands once.

    pairs of one prompt          trunk: prompt + common start of its answers      branches: the rest of each answer
    row                          trunk a  chosen a  rejected a  trunk b  answer 1  answer 2  answer 3  …
    positions                    0 1 2 3  4 5 6     4 5 6 7     0 1 …    (each branch goes on where its trunk ends)

Several answers to one prompt stand once each, and pairs are edges between them. The last token of an answer is scored but not
read, so it is no part of the row.
"""

from collections.abc import Iterator, Sequence
from heapq import heappush, heapreplace
from typing import Any, NamedTuple

import numpy as np
import torch

from pe_dpo.data.pairs import EncodedPair


class Tree(NamedTuple):
    """Where one prompt and its answers lie in a row: the trunk, then the branches that are not empty, each [start, end)."""

    trunk: tuple[int, int]
    branches: tuple[tuple[int, int], ...]


class PackedRow(NamedTuple):
    """T tokens of one row, N predictions that the head makes, A answers, B pairs; all integers are int64."""

    input_ids: torch.Tensor
    """(1, T)."""
    position_ids: torch.Tensor
    """(1, T)."""
    trees: tuple[Tree, ...]
    predicting: torch.Tensor
    """(N,) index in the row of the token that predicts."""
    targets: torch.Tensor
    """(N,) the token id that is predicted."""
    members: torch.Tensor
    """(M,) prediction, M >= N: a token of a common start belongs to several answers."""
    owners: torch.Tensor
    """(M,) answer that the prediction belongs to."""
    lengths: torch.Tensor
    """(A,) tokens of each answer."""
    chosen: torch.Tensor
    """(B,) answer."""
    rejected: torch.Tensor
    """(B,) answer."""

    def to(self, device: torch.device | str) -> "PackedRow":
        """Return the row on a device."""
        moved: dict[str, Any] = {name: field.to(device) for name, field in self._asdict().items() if torch.is_tensor(field)}
        return self._replace(**moved)


def pack(pairs: Sequence[EncodedPair], *, share: bool = True) -> PackedRow:
    """Return pairs as one row.

    Args:
        pairs: at least one, in any order; pairs of one prompt need not be neighbours.
        share: False repeats the prompt for every answer, for comparison; the numbers are the same.
    """
    row = _RowBuilder()
    edges: list[tuple[int, int, int]] = []
    for members in _by_prompt(pairs):
        answers: dict[bytes, int] = {}
        texts: list[np.ndarray] = []
        for index in members:
            for ids in (pairs[index].chosen_ids, pairs[index].rejected_ids):
                if answers.setdefault(ids.tobytes(), len(texts)) == len(texts):
                    texts.append(ids)
        numbers = row.add(pairs[members[0]].prompt_ids, texts, share=share)
        for index in members:
            chosen, rejected = (answers[ids.tobytes()] for ids in (pairs[index].chosen_ids, pairs[index].rejected_ids))
            edges.append((index, numbers[chosen], numbers[rejected]))
    edges.sort()
    return row.build([chosen for _, chosen, _ in edges], [rejected for _, _, rejected in edges])


def split_into_rows(pairs: Sequence[EncodedPair], token_budget: int) -> list[list[int]]:
    """Return rows as lists of indices into `pairs`, each index once, each list in ascending order.

    Pairs of one prompt stay together as long as they fit. Rows are filled evenly, largest prompt first, so that the fullest is
    as small as it can easily be; it comes first (what does not fit in memory shows at once). A pair that alone exceeds the
    budget goes alone.

    Args:
        pairs: the pairs of one optimizer step, or of an evaluation.
        token_budget: most tokens of one row.
    """
    blocks = [block for members in _by_prompt(pairs) for block in _blocks(pairs, members, token_budget)]
    blocks.sort(key=lambda block: (-block[0], block[1][0]))
    wanted = -(-sum(min(size, token_budget) for size, _ in blocks) // token_budget)
    rows: list[list[int]] = []
    filled: list[tuple[int, int]] = []  # tokens and number of each row, the emptiest first
    for size, members in blocks:
        if len(rows) < wanted or filled[0][0] + size > token_budget:
            rows.append([*members])
            heappush(filled, (size, len(rows) - 1))
        else:
            tokens, row = filled[0]
            rows[row].extend(members)
            heapreplace(filled, (tokens + size, row))
    return [sorted(rows[row]) for _, row in sorted(filled, key=lambda entry: (-entry[0], entry[1]))]


def shared_tokens(pairs: Sequence[EncodedPair]) -> int:
    """Return the tokens of a row that holds these pairs."""
    return sum(_tree_tokens(pairs, members) for members in _by_prompt(pairs))


def _by_prompt(pairs: Sequence[EncodedPair]) -> list[list[int]]:
    """Indices of the pairs that have the same prompt ids, in order of first appearance."""
    groups: dict[bytes, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.prompt_ids.tobytes(), []).append(index)
    return list(groups.values())


def _blocks(pairs: Sequence[EncodedPair], members: list[int], token_budget: int) -> Iterator[tuple[int, list[int]]]:
    """Yield size and members of parts of one prompt's pairs, each within the budget if it has several pairs."""
    block: list[int] = []
    size = 0
    for index in members:
        grown = _tree_tokens(pairs, [*block, index])
        if block and grown > token_budget:
            yield size, block
            block, grown = [], _tree_tokens(pairs, [index])
        block.append(index)
        size = grown
    yield size, block


def _tree_tokens(pairs: Sequence[EncodedPair], members: list[int]) -> int:
    """Tokens of one prompt's tree in a row."""
    answers = {ids.tobytes(): ids for index in members for ids in (pairs[index].chosen_ids, pairs[index].rejected_ids)}
    texts = list(answers.values())
    start = common_start(texts)
    return len(pairs[members[0]].prompt_ids) + start + sum(max(0, len(ids) - start - 1) for ids in texts)


def common_start(texts: Sequence[np.ndarray]) -> int:
    """Return how many tokens all answers have in common at their start; for one answer, all but its last."""
    if len(texts) == 1:
        return len(texts[0]) - 1
    first, shortest = texts[0], min(len(ids) for ids in texts)
    for ids in texts[1:]:
        differs = np.flatnonzero(first[:shortest] != ids[:shortest])
        shortest = int(differs[0]) if len(differs) else shortest
    return shortest


class _RowBuilder:
    """Puts trees one after another and remembers who predicts what."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.trees: list[Tree] = []
        self.predicting: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.members: list[np.ndarray] = []
        self.owners: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.end = 0
        self.predictions = 0

    def add(self, prompt: np.ndarray, texts: list[np.ndarray], *, share: bool) -> list[int]:
        """Add a prompt with its answers; return the answers' numbers."""
        if not share and len(texts) > 1:
            return [number for ids in texts for number in self.add(prompt, [ids], share=True)]
        start = common_start(texts)
        trunk = self._place(np.concatenate([prompt, texts[0][:start]]), 0)
        common = self._predict(np.arange(trunk[0] + len(prompt) - 1, trunk[1] - 1), texts[0][:start])
        branches, numbers = [], []
        for ids in texts:
            rest = ids[start:]
            branch = self._place(rest[:-1], trunk[1] - trunk[0])
            readers = np.concatenate([[trunk[1] - 1], np.arange(*branch)])[: len(rest)]
            own = self._predict(readers, rest)
            numbers.append(len(self.lengths))
            self.members.append(np.concatenate([common, own]))
            self.owners.append(np.full(len(ids), len(self.lengths)))
            self.lengths.append(len(ids))
            if branch[1] > branch[0]:
                branches.append(branch)
        self.trees.append(Tree(trunk, tuple(branches)))
        return numbers

    def _place(self, ids: np.ndarray, position: int) -> tuple[int, int]:
        self.tokens.append(ids)
        self.positions.append(np.arange(position, position + len(ids)))
        self.end += len(ids)
        return self.end - len(ids), self.end

    def _predict(self, readers: np.ndarray, ids: np.ndarray) -> np.ndarray:
        self.predicting.append(readers)
        self.targets.append(ids)
        self.predictions += len(ids)
        return np.arange(self.predictions - len(ids), self.predictions)

    def build(self, chosen: list[int], rejected: list[int]) -> PackedRow:
        """Return the row with its pairs as edges between answers."""

        def joined(parts: list[np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate(parts).astype(np.int64))

        return PackedRow(
            input_ids=joined(self.tokens).unsqueeze(0),
            position_ids=joined(self.positions).unsqueeze(0),
            trees=tuple(self.trees),
            predicting=joined(self.predicting),
            targets=joined(self.targets),
            members=joined(self.members),
            owners=joined(self.owners),
            lengths=torch.tensor(self.lengths),
            chosen=torch.tensor(chosen),
            rejected=torch.tensor(rejected),
        )

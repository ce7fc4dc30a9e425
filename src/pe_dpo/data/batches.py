"""Pairs as rows of a batch: padded on the right, or packed without padding so that what answers have in common stands once.

    padded        chosen a    prompt a  chosen a              two rows a pair; a budget counts what a forward really
                  chosen b    prompt b  chosen b  0 0         processes: 2 × pairs × the longest row, padding included
                  rejected a  prompt a  rejected a  0
                  rejected b  prompt b  rejected b

    packed        pairs of one prompt   prefix: prompt + common start of its answers     suffixes: the rest of each answer
                  row                   prefix a  chosen a  rejected a  prefix b  answer 1  answer 2  answer 3  …
                  positions             0 1 2 3   4 5 6     4 5 6 7     0 1 …    (each suffix goes on where its prefix ends)

In a packed row several answers to one prompt stand once each, and pairs are edges between them. The last token of an answer is
scored but not read, so it is no part of the row.
"""

from collections.abc import Sequence
from heapq import heappush, heapreplace
from typing import NamedTuple

import numpy as np
import torch

from pe_dpo.data.pairs import Answer, EncodedPair, common_start, row_length

Span = tuple[int, int]
"""[start, end) in a row."""
Tree = tuple[Span, tuple[Span, ...]]
"""Where one prompt and its answers lie in a row: the prefix, then the suffixes that are not empty."""


def pad_rows(rows: Sequence[np.ndarray], *, on_the_left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of token ids as one rectangle, and 1 where it has tokens; both (rows, longest) int64.

    Padding is token 0: no mask lets it through, whatever it means.
    """
    width = max(map(len, rows))
    input_ids, attention_mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if on_the_left else slice(0, len(row))
        input_ids[number, place] = torch.as_tensor(row, dtype=torch.int64)
        attention_mask[number, place] = 1
    return input_ids, attention_mask


def pad(pairs: Sequence[EncodedPair], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return pairs as one right-padded batch: first the chosen, then the rejected rows.

    Returns:
        Token ids, attention mask, and the mask of the scored tokens of the answers; each (2B, T) int64 on the device.
    """
    rows = [(pair.prompt_ids, pair.answers[side]) for side in (0, 1) for pair in pairs]
    input_ids, attention_mask = pad_rows([np.concatenate([prompt, answer.ids]) for prompt, answer in rows])
    completion_mask = torch.zeros_like(attention_mask)
    for row, (prompt, answer) in zip(completion_mask, rows, strict=True):
        scored = row[len(prompt) : len(prompt) + len(answer.ids)]
        scored[:] = 1 if answer.scored is None else torch.from_numpy(answer.scored)
    ids, attention, completion = on_device([input_ids, attention_mask, completion_mask], device)
    return ids, attention, completion


def on_device(tensors: Sequence[torch.Tensor], device: torch.device | str) -> list[torch.Tensor]:
    """Return tensors of one dtype on a device, brought to a GPU in one copy from pinned memory, which nobody waits for."""
    if torch.device(device).type == "cpu":
        return [tensor.to(device) for tensor in tensors]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    if torch.device(device).type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def split_by_tokens(pairs: Sequence[EncodedPair], token_budget: int) -> list[list[int]]:
    """Return micro-batches of padded rows as lists of indices into `pairs`, each index once.

    Pairs of like length go together, the longest first (so that a batch that does not fit in memory shows at once); a pair
    that alone exceeds the budget goes alone.

    Args:
        pairs: The pairs of one optimizer step, or of an evaluation.
        token_budget: Most tokens of one micro-batch, padding included.
    """
    order = sorted(range(len(pairs)), key=lambda index: (-row_length(pairs[index]), index))
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        if batches and 2 * (len(batches[-1]) + 1) * longest <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = row_length(pairs[index])
    return batches


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
    """(M,) prediction that is scored: a token of a common start belongs to several answers, another one's turn to none."""
    owners: torch.Tensor
    """(M,) answer that the prediction belongs to."""
    lengths: torch.Tensor
    """(A,) scored tokens of each answer."""
    chosen: torch.Tensor
    """(B,) answer."""
    rejected: torch.Tensor
    """(B,) answer."""

    def on(self, device: torch.device | str, others: Sequence[torch.Tensor] = ()) -> tuple["PackedRow", list[torch.Tensor]]:
        """Return the row on a device, and other int64 tensors with it, all in one copy."""
        own = [field for field in self if isinstance(field, torch.Tensor)]
        there = on_device([*own, *others], device)
        (input_ids, position_ids, *rest), others = there[: len(own)], there[len(own) :]
        return PackedRow(input_ids, position_ids, self.trees, *rest), list(others)


def pack(pairs: Sequence[EncodedPair], *, share: bool = True) -> PackedRow:
    """Return pairs as one row, on the CPU.

    Args:
        pairs: At least one, in any order; pairs of one prompt need not be neighbours.
        share: False repeats the prompt for every answer, for comparison; the numbers are the same.
    """
    row = _RowBuilder()
    chosen, rejected = [0] * len(pairs), [0] * len(pairs)
    for members in _by_prompt(pairs):
        prompt, (answers, start) = pairs[members[0]].prompt_ids, _answers(pairs, members)
        numbers: dict[bytes, int] = {}
        for some, common in [(answers, start)] if share else [([answer], len(answer.ids) - 1) for answer in answers]:
            numbers |= row.add(prompt, some, common)
        for index in members:
            chosen[index], rejected[index] = (numbers[answer.key] for answer in pairs[index].answers)

    def joined(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    return PackedRow(
        input_ids=joined(row.tokens).unsqueeze(0),
        position_ids=joined(row.positions).unsqueeze(0),
        trees=tuple(row.trees),
        predicting=joined(row.predicting),
        targets=joined(row.targets),
        members=joined(row.members),
        owners=joined(row.owners),
        lengths=torch.tensor(row.lengths),
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
    )


def split_into_rows(pairs: Sequence[EncodedPair], token_budget: int) -> list[list[int]]:
    """Return packed rows as lists of indices into `pairs`, each index once, each list in ascending order.

    Pairs of one prompt stay together as long as they fit. Rows are filled evenly, largest prompt first, so that the fullest is
    as small as it can easily be; it comes first (what does not fit in memory shows at once). A pair that alone exceeds the
    budget goes alone.

    Args:
        pairs: The pairs of one optimizer step, or of an evaluation.
        token_budget: Most tokens of one row.
    """
    blocks: list[tuple[int, list[int]]] = []  # tokens and members of the parts of each prompt's pairs that stay together
    for members in _by_prompt(pairs):
        block: list[int] = []
        size = 0
        for index in members:
            grown = shared_tokens([pairs[member] for member in (*block, index)])
            if block and grown > token_budget:
                blocks.append((size, block))
                block, grown = [], shared_tokens([pairs[index]])
            block.append(index)
            size = grown
        blocks.append((size, block))
    blocks.sort(key=lambda block: (-block[0], block[1][0]))
    rows_needed = -(-sum(min(size, token_budget) for size, _ in blocks) // token_budget)
    rows: list[list[int]] = []
    filled: list[tuple[int, int]] = []  # tokens and number of each row, the emptiest first
    for size, members in blocks:
        is_new = len(rows) < rows_needed
        if not is_new:
            tokens, row = filled[0]
            grown = tokens + size
            prompt = pairs[members[0]].prompt_ids.tobytes()
            # Two blocks of one prompt share less of its answers' starts than each alone, and may need more than their sum.
            if any(pairs[index].prompt_ids.tobytes() == prompt for index in rows[row]):
                grown = max(grown, shared_tokens([pairs[index] for index in (*rows[row], *members)]))
            is_new = grown > token_budget
        if is_new:
            rows.append([*members])
            heappush(filled, (size, len(rows) - 1))
        else:
            rows[row].extend(members)
            heapreplace(filled, (grown, row))
    return [sorted(rows[row]) for _, row in sorted(filled, key=lambda entry: (-entry[0], entry[1]))]


def shared_tokens(pairs: Sequence[EncodedPair]) -> int:
    """Return the tokens of a packed row that holds these pairs."""
    tokens = 0
    for members in _by_prompt(pairs):
        answers, start = _answers(pairs, members)
        tokens += len(pairs[members[0]].prompt_ids) + start + sum(max(0, len(answer.ids) - start - 1) for answer in answers)
    return tokens


def _by_prompt(pairs: Sequence[EncodedPair]) -> list[list[int]]:
    """Return the indices of the pairs that have the same prompt ids, in order of first appearance."""
    groups: dict[bytes, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.prompt_ids.tobytes(), []).append(index)
    return list(groups.values())


def _answers(pairs: Sequence[EncodedPair], members: Sequence[int]) -> tuple[list[Answer], int]:
    """Return the different answers of some pairs, and how many tokens of each belong to the prefix.

    A lone answer belongs to it but for its last token.
    """
    answers = list({answer.key: answer for index in members for answer in pairs[index].answers}.values())
    return answers, common_start([answer.ids for answer in answers]) if len(answers) > 1 else len(answers[0].ids) - 1


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

    def add(self, prompt: np.ndarray, answers: Sequence[Answer], start: int) -> dict[bytes, int]:
        """Add a prompt with its answers, which have their first `start` tokens in common; return the answers' numbers."""
        beginning = answers[0].ids[:start]
        prefix = self._place(np.concatenate([prompt, beginning]), 0)
        common = self._predict(np.arange(prefix[0] + len(prompt) - 1, prefix[1] - 1), beginning)
        suffixes, numbers = [], {}
        for answer in answers:
            rest = answer.ids[start:]
            suffix = self._place(rest[:-1], prefix[1] - prefix[0])
            readers = np.concatenate([[prefix[1] - 1], np.arange(*suffix)])[: len(rest)]
            predictions = np.concatenate([common, self._predict(readers, rest)])
            scored = predictions if answer.scored is None else predictions[answer.scored]
            numbers[answer.key] = len(self.lengths)
            self.members.append(scored)
            self.owners.append(np.full(len(scored), len(self.lengths)))
            self.lengths.append(len(scored))
            if suffix[1] > suffix[0]:
                suffixes.append(suffix)
        self.trees.append((prefix, tuple(suffixes)))
        return numbers

    def _place(self, ids: np.ndarray, position: int) -> Span:
        self.tokens.append(ids)
        self.positions.append(np.arange(position, position + len(ids)))
        self.end += len(ids)
        return self.end - len(ids), self.end

    def _predict(self, readers: np.ndarray, ids: np.ndarray) -> np.ndarray:
        self.predicting.append(readers)
        self.targets.append(ids)
        self.predictions += len(ids)
        return np.arange(self.predictions - len(ids), self.predictions)

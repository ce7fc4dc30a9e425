"""Pairs as rows of a batch: padded on the right, or packed without padding so that what answers have in common stands once.

    padded        chosen a    prompt a  chosen a              two rows a pair; a budget counts what a forward really
                  chosen b    prompt b  chosen b  0 0         processes: 2 × pairs × the longest row, padding included
                  rejected a  prompt a  rejected a  0
                  rejected b  prompt b  rejected b

    packed        system  prompt a  chosen a  rejected a  prompt b  answer 1  answer 2  prompt c  …      a tree (`data/trie.py`)
    positions     0 1 2   3 4       5 6       5 6 7       3 4 5 6   7 8       7         0 1       …      (each part goes on
    goes on from  —       system    prompt a  prompt a    system    prompt b  prompt b  —         …       where its parent ends)

In a packed row every answer stands once, and pairs are edges between answers. The last token of an answer is scored but not
read, so it is no part of the row.
"""

from collections.abc import Sequence
from heapq import heappush, heapreplace
from typing import NamedTuple

import numpy as np
import torch

from pe_dpo.data.pairs import Answer, EncodedPair, row_length
from pe_dpo.data.trie import Node, Trie

Span = tuple[int, int, int]
"""[start, end) in a row, and the number of the span that it goes on from; −1 where a text begins."""
Completion = tuple[np.ndarray, Answer]
"""A prompt's ids and one answer to it."""

SHARE_THAT_JOINS = 1 / 8
"""Of the smaller one's tokens that two pairs of different prompts have in common, so that rows are filled with them together.
Where they have less, rows are filled evenly, and what lies in a row shares it all the same."""
REPEATED = 8
"""A common beginning is read again after so many times its tokens, where memory allows: 64 pairs of 150 tokens under a system
prompt of 800 take 1.08 of the tokens of a single row, and 5.9 in rows of 1,024."""
RECOMPUTED = 1.4
"""What the tokens of divided answers cost, whose rows but one go forward twice: measured 1.30 in two rows, 1.51 in four
(float32, 4 × 512)."""


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
    tree: tuple[Span, ...]
    """Parents come before their children, and a first child right behind its parent."""
    predicting: torch.Tensor
    """(N,) index in the row of the token that predicts."""
    targets: torch.Tensor
    """(N,) the token id that is predicted."""
    members: torch.Tensor
    """(M,) prediction that is scored: a token of a common start belongs to several answers."""
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
        return PackedRow(input_ids, position_ids, self.tree, *rest), list(others)


def pack(pairs: Sequence[EncodedPair], *, share: bool = True) -> PackedRow:
    """Return pairs as one row, on the CPU.

    Args:
        pairs: At least one, in any order; pairs of one prompt need not be neighbours.
        share: False repeats the prompt for every answer, for comparison; the numbers are the same.
    """
    completions, edges = completions_of(pairs)
    chosen, rejected = torch.from_numpy(edges.T.copy())
    return pack_completions(completions, share=share)._replace(chosen=chosen, rejected=rejected)


def pack_completions(completions: Sequence[Completion], *, share: bool = True) -> PackedRow:
    """Return answers as one row without pairs, on the CPU; the arguments are as those of `pack`."""
    read = [_read(*completion) for completion in completions]
    if share:
        nodes, last = _trie(completions, read).nodes()
    else:
        nodes, last = [Node(-1, number, 0, len(ids)) for number, ids in enumerate(read)], list(range(len(read)))
    ends = np.cumsum([node.end - node.start for node in nodes]).tolist()
    readers, targets, owners = [], [], []
    for number, (prompt, answer) in enumerate(completions):
        places = np.empty(len(read[number]), np.int64)
        end, index = len(places), last[number]
        while index >= 0:
            node = nodes[index]
            places[node.start : end] = np.arange(end - node.start) + (ends[index] - node.end + node.start)
            end, index = node.start, node.parent
        scored = slice(None) if answer.scored is None else answer.scored
        readers.append(places[len(prompt) - 1 :][scored])
        targets.append(answer.ids[scored])
        owners.append(np.full(len(targets[-1]), number))
    # A token that the same token predicts is one prediction, whoever it is scored for; numbered as they come.
    predicted = np.concatenate(readers) << 32 | np.concatenate(targets)
    different, first, members = np.unique(predicted, return_index=True, return_inverse=True)
    as_they_come = first.argsort()

    def joined(parts: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    return PackedRow(
        input_ids=joined([read[node.member][node.start : node.end] for node in nodes]).unsqueeze(0),
        position_ids=joined([np.arange(node.start, node.end) for node in nodes]).unsqueeze(0),
        tree=tuple((end - node.end + node.start, end, node.parent) for end, node in zip(ends, nodes, strict=True)),
        predicting=torch.from_numpy(different[as_they_come] >> 32),
        targets=torch.from_numpy(different[as_they_come] & 0xFFFFFFFF),
        members=torch.from_numpy(as_they_come.argsort()[members.reshape(-1)]),
        owners=joined(owners),
        lengths=torch.tensor([len(ids) for ids in targets]),
        chosen=torch.zeros(0, dtype=torch.int64),
        rejected=torch.zeros(0, dtype=torch.int64),
    )


def completions_of(pairs: Sequence[EncodedPair]) -> tuple[list[Completion], np.ndarray]:
    """Return the different answers of pairs, prompt by prompt as they come, and each pair's chosen and rejected, (B, 2)."""
    prompts: dict[bytes, list[int]] = {}
    for index, pair in enumerate(pairs):
        prompts.setdefault(pair.prompt_ids.tobytes(), []).append(index)
    completions: list[Completion] = []
    edges = np.empty((len(pairs), 2), np.int64)
    for members in prompts.values():
        numbers: dict[bytes, int] = {}
        for index in members:
            for side, answer in enumerate(pairs[index].answers):
                number = numbers.setdefault(answer.key, len(completions))
                if number == len(completions):
                    completions.append((pairs[index].prompt_ids, answer))
                edges[index, side] = number
    return completions, edges


def split_into_rows(pairs: Sequence[EncodedPair], token_budget: int, tree_budget: int = 0) -> list[list[int]]:
    """Return packed rows as lists of indices into `pairs`, each index once, each list in ascending order.

    Pairs with a long common beginning, of one prompt first of all, stay together as long as they fit. Rows are filled evenly,
    the largest such block first, so that the fullest is as small as it can easily be; it comes first (what does not fit in
    memory shows at once). A pair that alone exceeds the budget goes alone.

    Pairs that are linked by answers which they have in common are one list even where that exceeds the budget: up to the budget
    of trees as one row, beyond it as several between which answers are divided (`divide`), unless rows of whole pairs are
    cheaper.

    Args:
        pairs: The pairs of one optimizer step, or of an evaluation.
        token_budget: Most tokens of one row.
        tree_budget: Most tokens of a row where a larger one spares reading something twice; where it is below
            `token_budget`, that.
    """
    completions, edges = completions_of(pairs)
    trie = _trie(completions)
    tree_budget = max(token_budget, tree_budget)
    blocks = _blocks(trie, completions, edges, _linked(trie, edges, tree_budget), token_budget, tree_budget)
    blocks.sort(key=lambda block: (-block[0], block[1][0]))
    rows_needed = -(-sum(min(size, token_budget) for size, _ in blocks) // token_budget)
    rows: list[list[int]] = []
    filled: list[tuple[int, int]] = []  # tokens and number of each row, the emptiest first
    for size, members in blocks:
        is_new = len(rows) < rows_needed
        if not is_new:
            tokens, row = filled[0]
            grown = tokens + size
            if grown > token_budget and np.isin(trie.beginnings[edges[members, 0]], trie.beginnings[edges[rows[row], 0]]).any():
                grown = trie.tokens(np.unique(edges[[*rows[row], *members]]))
            is_new = grown > token_budget
        if is_new:
            rows.append([*members])
            heappush(filled, (size, len(rows) - 1))
        else:
            rows[row].extend(members)
            heapreplace(filled, (grown, row))
    return [sorted(rows[row]) for _, row in sorted(filled, key=lambda entry: (-entry[0], entry[1]))]


def divide(pairs: Sequence[EncodedPair], tree_budget: int) -> tuple[list[Completion], list[list[int]], np.ndarray]:
    """Return the different answers of pairs, how they are divided between rows, and the pairs' chosen and rejected (B, 2).

    They stand in one row unless that exceeds the budget, there are more than two, and answers link all of them.
    """
    completions, edges = completions_of(pairs)
    every = list(range(len(completions)))
    if len(every) <= 2:
        return completions, [every], edges
    trie = _trie(completions)
    total = trie.tokens(every)
    if total <= tree_budget or len(_components(edges)) > 1:
        return completions, [every], edges
    runs = _runs(trie, [np.array([number]) for number in trie.order], tree_budget)
    return completions, [[int(trie.order[place]) for place in run] for run in runs], edges


def shared_tokens(pairs: Sequence[EncodedPair]) -> int:
    """Return the tokens of a packed row that holds these pairs."""
    return completion_tokens(completions_of(pairs)[0])


def completion_tokens(completions: Sequence[Completion]) -> int:
    """Return the tokens of a packed row that holds these answers."""
    return _trie(completions).tokens(np.arange(len(completions)))


def _read(prompt: np.ndarray, answer: Answer) -> np.ndarray:
    return np.concatenate([prompt, answer.ids[:-1]])


def _trie(completions: Sequence[Completion], read: Sequence[np.ndarray] | None = None) -> Trie:
    return Trie(read or [_read(*completion) for completion in completions], [len(prompt) for prompt, _ in completions])


def _components(edges: np.ndarray) -> list[list[int]]:
    """Return the pairs, as indices, that answers which they have in common link, in order of first appearance."""
    leader: dict[int, int] = {}

    def find(answer: int) -> int:
        while leader.setdefault(answer, answer) != answer:
            answer = leader[answer] = leader[leader[answer]]
        return answer

    for one, other in edges.tolist():
        leader[find(other)] = find(one)
    components: dict[int, list[int]] = {}
    for index, (one, _) in enumerate(edges.tolist()):
        components.setdefault(find(one), []).append(index)
    return list(components.values())


def _linked(trie: Trie, edges: np.ndarray, tree_budget: int) -> list[list[int]]:
    """Return the pairs that cannot be parted, as indices, in the order of the tree."""
    units: list[list[int]] = []
    for component in _components(edges):
        answers = np.unique(edges[component])
        if len(component) == 1 or trie.tokens(answers) <= tree_budget:
            units.append(component)
            continue
        alone = [np.array([number]) for number in trie.order[np.sort(trie.ranks[answers])]]
        divided = sum(trie.tokens(np.concatenate([alone[place] for place in run])) for run in _runs(trie, alone, tree_budget))
        in_pairs = [
            [component[place] for place in run]
            for run in _runs(trie, [np.unique(edges[index]) for index in component], tree_budget)
        ]
        is_cheaper = RECOMPUTED * divided < sum(trie.tokens(np.unique(edges[run])) for run in in_pairs)
        units += [component] if is_cheaper else in_pairs
    return sorted(units, key=lambda unit: int(trie.ranks[edges[unit]].min()))


def _blocks(
    trie: Trie, completions: Sequence[Completion], edges: np.ndarray, units: Sequence[list[int]], budget: int, tree_budget: int
) -> list[tuple[int, list[int]]]:
    """Return the pairs, as indices, that stand together for what they have in common, each block with its tokens."""
    answers = [np.unique(edges[unit]) for unit in units]
    sizes = [trie.tokens(some) for some in answers]
    together: list[list[int]] = []
    for number, some in enumerate(answers):
        joins = False
        if number and trie.beginnings[some[0]] == trie.beginnings[answers[number - 1][0]]:
            one, other = (completions[few[0]][0] for few in (some, answers[number - 1]))
            spared = sizes[number - 1] + sizes[number] - trie.tokens(np.union1d(answers[number - 1], some))
            joins = np.array_equal(one, other) or spared >= SHARE_THAT_JOINS * min(sizes[number - 1 : number + 1])
        if joins:
            together[-1].append(number)
        else:
            together.append([number])
    blocks = []
    for numbers in together:
        for run in _runs(trie, [answers[number] for number in numbers], budget, tree_budget):
            members = [index for place in run for index in units[numbers[place]]]
            blocks.append((trie.tokens(np.unique(edges[members])), members))
    return blocks


def _runs(trie: Trie, items: Sequence[np.ndarray], budget: int, tree_budget: int = 0) -> list[list[int]]:
    """Return neighbours among groups of answers, as indices, that fill rows; a group that exceeds the budget goes alone.

    Args:
        trie: The tree of all answers.
        items: The groups, in its order.
        budget: Most tokens of a row.
        tree_budget: Most tokens of one that spares reading a long beginning again.
    """

    def filled(share: float) -> tuple[list[list[int]], list[int]]:
        runs: list[list[int]] = []
        sizes: list[int] = []
        for number, item in enumerate(items):
            if runs:
                answers = np.unique(np.concatenate([items[one] for one in runs[-1]] + [item]))
                ranks = trie.ranks[answers]
                beginning = int(trie.common[ranks.min() : ranks.max()].min()) if len(ranks) > 1 else 0
                grown = trie.tokens(answers)
                if grown <= share * max(budget, min(tree_budget, REPEATED * beginning)):
                    runs[-1].append(number)
                    sizes[-1] = grown
                    continue
            runs.append([number])
            sizes.append(trie.tokens(item))
        return runs, sizes

    runs, sizes = filled(1.0)
    if len(runs) > 1:  # the same number of rows, filled evenly
        evenly, _ = filled(min(1.0, 1.05 * sum(sizes) / len(sizes) / max(sizes)))
        runs = evenly if len(evenly) == len(runs) else runs
    return runs

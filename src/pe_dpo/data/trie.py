"""Sequences of tokens as a prefix tree: what some of them have in common at their start stands once.

    a b c d e                         node 0   a b c      parent −1
    a b c d f g      ──────►          node 1   d          parent  0
    a b c h                           node 2   e          parent  1
    x y                               node 3   f g        parent  1
                                      node 4   h          parent  0
                                      node 5   x y        parent −1

Of sequences in depth-first order, neighbours have most in common: those between two of them share at least what both share.
So the tokens of any part of the sequences are counted without building its tree: the sum of their lengths less what each has
in common with the one before it.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

FEWEST_SHARED = 16
"""Tokens that sequences of different prompts must have in common to stand together, unless the whole of a shorter prompt is
in common: for a beginning-of-text token alone every answer would go through attention with gathered keys."""


class Node(NamedTuple):
    """Tokens in a tree that the same sequences have in common."""

    parent: int
    """Index of the node that it goes on from; −1 where it begins."""
    member: int
    """A sequence that has these tokens."""
    start: int
    """Place of the first token in that sequence."""
    end: int
    """Place behind the last one."""


class Trie:
    """Sequences in depth-first order, each fork's branches in the order in which the sequences came.

    Args:
        sequences: int32 (L,), L >= 1.
        prompts: How many tokens of each are its prompt, >= 1.
    """

    def __init__(self, sequences: Sequence[np.ndarray], prompts: Sequence[int]) -> None:
        self.lengths = np.array([len(ids) for ids in sequences])
        self.prompts = np.array(prompts)
        in_order = sorted(range(len(sequences)), key=lambda index: sequences[index].astype(">i4").tobytes())
        neighbours = pairwise(in_order)
        alike = [_common(sequences[one], sequences[other]) for one, other in neighbours]
        least = self._least(np.arange(len(sequences)))
        # Of each open subtree how deep its members are in common, and its parts: first member, order, what neighbours share.
        Part = tuple[int, list[int], list[int]]
        stack: list[tuple[int, list[Part]]] = []

        def closed(depth: int, parts: list[Part]) -> Part:
            parts.sort(key=lambda part: part[0])
            order, common = list(parts[0][1]), list(parts[0][2])
            for _, others, between in parts[1:]:
                order += others
                common += [depth, *between]
            return parts[0][0], order, common

        for index, behind in zip(in_order, [*alike, 0], strict=True):
            behind = behind if behind >= least else 0
            part: Part = (index, [index], [])
            while stack and stack[-1][0] > behind:
                depth, parts = stack.pop()
                part = closed(depth, [*parts, part])
            if stack and stack[-1][0] == behind:
                stack[-1][1].append(part)
            else:
                stack.append((behind, [part]))
        _, order, common = closed(*stack[0])
        self.order = np.array(order)
        """Indices of the sequences, depth first."""
        self.common = np.array(common, dtype=np.int64)
        """Tokens that each has in common with the one behind it in the order; 0 where these are too few to share."""
        self.ranks = self.order.argsort()
        """Of each sequence its place in the order."""
        self.beginnings = np.concatenate([[0], np.cumsum(self.common == 0)])[self.ranks]
        """The same number for those of the sequences that are linked by what they have in common."""

    def tokens(self, members: Sequence[int] | np.ndarray) -> int:
        """Return the tokens of the tree of some of the sequences, each given once."""
        members = np.asarray(members)
        ranks = np.sort(self.ranks[members])
        total = int(self.lengths[members].sum())
        if len(ranks) == 1:
            return total
        alike = np.minimum.reduceat(self.common[: ranks[-1]], ranks[:-1])
        return total - int(alike[alike >= self._least(members)].sum())

    def nodes(self) -> tuple[list[Node], list[int]]:
        """Return the tree depth first, and for each sequence the node that has its last token."""
        lengths = self.lengths[self.order]
        nodes: list[Node] = []
        last = [-1] * len(lengths)
        waiting = [(0, len(lengths), 0, -1)]  # a stretch of the order, the tokens that its parent has, and that parent
        while waiting:
            low, high, start, parent = waiting.pop()
            on_the_way: list[int] = []  # they end where only one branch goes on, which makes no fork
            while True:
                depth = int(self.common[low : high - 1].min()) if high - low > 1 else int(lengths[low])
                cuts = [low, *(low + 1 + np.flatnonzero(self.common[low : high - 1] == depth)).tolist(), high]
                branches = [(one, other) for one, other in pairwise(cuts) if lengths[one:other].max() > depth]
                if high - low == 1 or len(branches) != 1:
                    break
                inner_low, inner_high = branches[0]
                on_the_way += [*range(low, inner_low), *range(inner_high, high)]
                low, high = inner_low, inner_high
            if depth > start:
                nodes.append(Node(parent, int(self.order[low]), start, depth))
                parent = len(nodes) - 1
            ending = range(low, high) if high - low == 1 else np.flatnonzero(lengths[low:high] == depth) + low
            for rank in (*on_the_way, *ending):
                last[self.order[rank]] = parent
            if high - low > 1:
                waiting += [(one, other, depth, parent) for one, other in reversed(branches)]
        return nodes, last

    def _least(self, members: np.ndarray) -> int:
        return min(FEWEST_SHARED, int(self.prompts[members].min()))


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many tokens two sequences have in common at their start."""
    shorter = min(len(one), len(other))
    differs = one[:shorter] != other[:shorter]
    first = int(differs.argmax()) if shorter else 0
    return first if shorter and differs[first] else shorter

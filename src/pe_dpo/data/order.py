"""Which pairs each optimizer step gets: a function of seed and epoch alone, so that nothing needs to be saved to resume."""

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


class OptimizerBatches(Sampler[list[int]]):
    """The indices of each optimizer step's pairs; every process draws the same batches.

    Args:
        keys: The keys of the pairs; pairs of one key follow each other (and share a step, unless the step is full). Keys that
            are all different shuffle pairs, prompts as keys shuffle prompts.
        pairs_per_step: The pairs of every step but the last of an epoch, which takes what is left.
        seed: The seed of the permutations.
    """

    def __init__(self, keys: Sequence[Hashable], pairs_per_step: int, seed: int) -> None:
        self.pairs_per_step, self.seed, self.epoch = pairs_per_step, seed, 0
        groups: dict[Hashable, list[int]] = {}
        for index, key in enumerate(() if isinstance(keys, range) else keys):
            groups.setdefault(key, []).append(index)
        self.groups, self.pairs = list(groups.values()), len(keys)
        """Pairs of one key; empty where each pair is a group of its own, as many lists would take 100 MB a million."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.groups) or self.pairs, generator=generator).tolist()
        if self.groups:
            order = [index for group in order for index in self.groups[group]]
        for start in range(0, self.pairs, self.pairs_per_step):
            yield order[start : start + self.pairs_per_step]

    def __len__(self) -> int:
        return -(-self.pairs // self.pairs_per_step)

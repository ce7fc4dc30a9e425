"""What a packed row costs a GPU besides its arithmetic: copies to it, moments at which one waits for the other, kernels.

Counted on torch's meta device, which has no numbers: asking for one, as `item` or a mask as an index does, is an error there.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.packing_check import PAIRS, random_pairs, small_policy
from pe_dpo.data.batches import pack
from pe_dpo.inference.logprobs import packed_pair_logprobs
from pe_dpo.inference.scorer import DENSE_TOKENS, Scorer, possible_paths
from pe_dpo.model.attention import Kind, Packing, switch_on
from pe_dpo.model.fixed import fixed_weights
from pe_dpo.objective.logprobs import _sums_of_rows, owner_sums


class Traffic(TorchDispatchMode):
    """Counts what goes to another device, and what runs there."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.kernels = self.casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = ([one for one in tree_leaves(some) if isinstance(one, Tensor)] for some in ((args, kwargs), out))
        self.copies.update({(old.device.type, new.device.type) for old in given for new in made if old.device != new.device})
        if made and made[0].device.type == "meta" and not func.is_view:
            self.kernels += 1
            self.casts += "_to_copy" in str(func) and given[0].dtype == torch.float32 and made[0].dtype == torch.bfloat16
        return out


@pytest.fixture(scope="module")
def far_away() -> Any:
    """A bfloat16 policy of two layers with adapters on their attention, on the meta device."""
    model = small_policy("llama")
    switch_on(model.get_base_model())
    return model.to("meta").train()


def traffic(model: Any, kind: Kind) -> Traffic:
    """Of forward and backward of a row of four pairs."""
    with Traffic() as counted:
        scored = packed_pair_logprobs(model, pack(PAIRS), kind=kind)
        (scored.chosen - scored.rejected).sum().backward()
    return counted


@pytest.mark.parametrize("kind", ["varlen", "dense"])
def test_a_row_goes_to_the_device_in_one_copy_and_nobody_waits(far_away, kind):
    assert traffic(far_away, kind).copies == {("cpu", "meta"): 1}


@pytest.mark.slow
def test_one_kernel_or_one_mask_takes_half_the_kernels_of_a_call_for_each_answer(far_away):
    """And with more pairs to a row less: 7,109, 7,784 and 39,557 for 16 pairs at 8B."""
    varlen, dense, segments = (traffic(far_away, kind).kernels for kind in ("varlen", "dense", "segments"))
    assert varlen < dense < 0.55 * segments


def test_adapters_are_cast_to_16_bits_once_for_all_rows_of_a_step(far_away):
    """Two layers' four A and B in the forward of each row, and again in the backward but where layer 0 stops at its input."""
    alone = traffic(far_away, "varlen").casts
    with fixed_weights():
        first, second = (traffic(far_away, "varlen").casts for _ in range(2))
    adapters = 2 * 2 * 4
    assert (alone - second, first - second) == (2 * adapters - 3, adapters)


def test_a_kept_cast_is_forgotten_with_its_block_and_changes_no_bit():
    model = small_policy("llama")
    switch_on(model.get_base_model())

    def gradient() -> Tensor:
        model.zero_grad()
        scored = packed_pair_logprobs(model, pack(PAIRS), kind="segments")
        (scored.chosen - scored.rejected).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    plain = gradient()
    with fixed_weights(), fixed_weights():
        assert torch.equal(gradient(), plain)
        assert torch.equal(gradient(), plain)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.mul_(2)
    assert not torch.equal(gradient(), plain)


# ---------------------------------------------------------------- which way


@pytest.mark.parametrize(("dtype", "paths"), [
    (torch.bfloat16, ["varlen", "dense", "padded"]), (torch.float32, ["dense", "padded"]),
])  # fmt: skip
def test_a_gpu_never_makes_a_call_for_each_answer(dtype, paths):
    assert possible_paths("cuda", dtype) == paths


def test_rows_with_a_mask_are_no_longer_than_a_square_is_cheap():
    assert DENSE_TOKENS == 4096
    pairs = random_pairs([(40, 60, 50)] * 100)
    for path, budget, most in (("dense", 16384, DENSE_TOKENS), ("varlen", 16384, 16384), ("dense", 300, 300)):
        scorer = Scorer(path, torch.device("cpu"), token_budget=budget)
        largest = max(scorer.tokens([pairs[index] for index in row]) for row in scorer.split(pairs))
        assert 0.4 * most < largest <= most


@pytest.mark.parametrize("window", [None, 3, 8])
def test_a_dense_mask_lets_every_token_see_its_prompt_and_its_own_answer(window):
    """Token by token, from what a tree is."""
    tree = [(0, 5, -1), (5, 7, 0), (7, 9, 1), (9, 10, 1), (10, 12, 0), (12, 20, -1), (20, 22, -1)]
    answers = [[*range(9)], [*range(7), 9], [*range(5), 10, 11], [*range(12, 20)], [20, 21]]
    expected = torch.full((22, 22), -torch.inf)
    for answer in answers:
        for place, token in enumerate(answer):
            first = 0 if window is None else max(0, place - window + 1)
            expected[token, answer[first : place + 1]] = 0
    assert torch.equal(Packing(tree, "dense").dense_mask(window, torch.zeros(1)), expected)


# ---------------------------------------------------------------- sums


def test_sums_of_rows_are_those_of_index_add_and_their_gradient():
    """Float64; owners without a value, and rows of several columns."""
    owners = torch.tensor([0, 0, 0, 2, 2, 5])
    for shape in ((6,), (6, 3)):
        values = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        pull = torch.randn((6, *shape[1:]), dtype=torch.float64)
        expected = torch.zeros((6, *shape[1:]), dtype=torch.float64).index_add(0, owners, values)
        for longest in (3, 6):
            found = _sums_of_rows(values, owners, 6, longest)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
            assert torch.equal(*(torch.autograd.grad((one * pull).sum(), values, retain_graph=True)[0]
                                 for one in (found, expected)))  # fmt: skip
    assert torch.equal(owner_sums(values.detach(), owners, 6), expected.detach())


def test_a_number_that_is_none_stays_with_its_owner():
    owners, values = torch.tensor([0, 1, 1]), torch.tensor([1.0, torch.nan, 2.0])
    assert _sums_of_rows(values, owners, 2, 2).isnan().tolist() == [False, True]

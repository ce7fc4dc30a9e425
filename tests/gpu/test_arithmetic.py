"""What is computed otherwise on a GPU: logits, sums of log-probs, copies of a row, and which way a larger head takes."""

import pytest
import torch
from torch import nn

from benchmarks.packing_check import FAULTS, PAIRS, choice, harmed, small_policy, with_head
from pe_dpo.data.batches import on_device, pack
from pe_dpo.inference.logprobs import packed_pair_logprobs
from pe_dpo.model.attention import switch_on
from pe_dpo.model.fixed import fixed_weights
from pe_dpo.objective.head import head_logprobs, wide_logits
from pe_dpo.objective.logprobs import owner_sums

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_head_has_the_log_probs_and_gradients_of_float64(dtype):
    """Logits of about 19, two tiles of the vocabulary; rounded to bfloat16 they would be off by up to 0.06."""
    torch.manual_seed(0)
    head = nn.Linear(512, 20_000, bias=False, device="cuda", dtype=dtype).requires_grad_(False)
    head.weight.normal_(0, 5 / 512**0.5)
    hidden = torch.randn(300, 512, device="cuda", dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 20_000, (300,), device="cuda")
    wide = hidden.detach().double().requires_grad_()
    expected = (wide @ head.weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    found = head_logprobs(hidden, targets, head)
    assert float((found.double() - expected).abs().max()) < 1e-3
    (slope,), (exact,) = (torch.autograd.grad(one.sum(), x) for one, x in ((found, hidden), (expected, wide)))
    assert float((slope.double() - exact).norm() / exact.norm()) < 1e-2
    with wide_logits(head):
        logits = head(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), wide.detach() @ head.weight.double().T, rtol=0, atol=1e-3)


def test_sums_of_log_probs_have_the_same_bits_every_time():
    owners = torch.arange(200, device="cuda").repeat_interleave(50)
    values = torch.randn(10_000, device="cuda", dtype=torch.float64)
    found = {owner_sums(values, owners, 200, 50).cpu().numpy().tobytes() for _ in range(20)}
    assert len(found) == 1
    torch.testing.assert_close(owner_sums(values, owners, 200), values.view(200, 50).sum(dim=1), rtol=0, atol=1e-12)


def test_a_row_arrives_as_it_was():
    row = pack(PAIRS)
    there, others = row.on("cuda", [torch.arange(7)])
    for here, one in zip(row, there, strict=True):
        assert here == one if isinstance(here, tuple) else torch.equal(here, one.cpu())
    assert others[0].tolist() == list(range(7))
    assert [one.device.type for one in on_device([torch.arange(3)], "cuda")] == ["cuda"]


def test_a_row_asks_for_no_number_on_its_way():
    """Forward and backward: what would wait for the GPU is an error here."""
    model = small_policy("llama").cuda()
    switch_on(model.get_base_model())
    row = pack(PAIRS)
    for kind in ("varlen", "dense"):
        packed_pair_logprobs(model, row, kind=kind)  # whatever is loaded at first
        torch.cuda.set_sync_debug_mode("error")
        try:
            with fixed_weights():
                scored = packed_pair_logprobs(model, row, kind=kind)
                (scored.chosen - scored.rejected).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mistral"])
def test_models_stay_packed_whatever_the_size_of_their_logits(name):
    for times in (1, 2, 3):
        found = choice(with_head(small_policy(name).cuda(), times))
        assert (found["path"], found["is_batch_dependent"]) == ("dense" if name == "gemma2" else "varlen", False), found


@pytest.mark.parametrize("fault", ["the pair before it is seen", "the second answer loses its prompt", "positions go on"])
def test_a_fault_is_refused_whatever_the_size_of_the_logits(fault):
    """What also reaches the variable-length kernel; a mask is made from the trees, so that the dense way may be right."""
    for times in (1, 3):
        with harmed(FAULTS[fault]):
            assert choice(with_head(small_policy("llama").cuda(), times))["path"] in ("padded", "dense")

"""Packed rows on a GPU: the variable-length kernel's alignment and backward, and measured memory."""

import pytest
import torch

from pe_dpo.inference.scorer import GRADIENT_TOLERANCE, Scorer
from pe_dpo.model.adapter import adapter_parameters
from pe_dpo.training.memory import free_bytes, peak_bytes
from pe_dpo.training.preparation import prepare_run
from pe_dpo.training.train import build_trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def with_noise(trainer):
    generator = torch.Generator(device="cuda").manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return trainer


def test_bottom_right_causal_attention_is_what_the_kernel_computes():
    """Three queries that are the last of five keys, against the sums written out in float64."""
    from torch.nn.attention.varlen import varlen_attn

    q = torch.randn(3, 2, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(5, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ends = (torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in (3, 5))
    found = varlen_attn(q, k, v, *ends, 3, 5, window_size=(-1, 0))
    for row in range(3):
        seen = slice(0, row + 3)
        scores = torch.einsum("hd,khd->hk", q[row].double(), k[seen].double()) / 8
        wanted = torch.einsum("hk,khd->hd", scores.softmax(-1), v[seen].double())
        assert torch.allclose(found[row].double(), wanted, atol=2e-2)


@pytest.mark.parametrize("path", ["varlen", "dense", "segments"])
@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_packed_log_probs_and_gradients_are_the_padded_ones(make_recipe, path, quantize):
    recipe = make_recipe("model.dtype=bfloat16", f"model.quantize={quantize}")
    trainer = with_noise(build_trainer(recipe, prepare_run(recipe)))
    pairs = trainer.train_dataset[:12]
    found = {}
    for way in ("padded", path):
        trainer.model.zero_grad()
        scored = Scorer(way, torch.device("cuda")).logprobs(trainer.model, pairs)
        (scored.chosen - scored.rejected).sum().backward()
        found[way] = scored, torch.cat([p.grad.flatten() for p in adapter_parameters(trainer.model)])
    (padded, wanted), (packed, gradient) = found["padded"], found[path]
    assert torch.allclose(packed.chosen, padded.chosen, atol=0.3)
    assert torch.allclose(packed.rejected, padded.rejected, atol=0.3)
    assert (gradient - wanted).norm() < GRADIENT_TOLERANCE[torch.bfloat16] * wanted.norm()


def test_the_fast_path_of_a_gpu_is_the_variable_length_kernel(make_recipe):
    recipe = make_recipe("model.dtype=bfloat16")
    assert build_trainer(recipe, prepare_run(recipe)).scorer.path == "varlen"


def test_the_peak_of_a_row_is_measured_and_smaller_than_what_is_free(make_recipe):
    recipe = make_recipe("model.dtype=bfloat16")
    trainer = build_trainer(recipe, prepare_run(recipe))
    row = trainer.train_dataset[:20]
    assert 0 < peak_bytes(trainer.model, row, trainer.scorer) < free_bytes(torch.device("cuda"))

"""Masks of mixout: a pure function of seed, draw and the layer's name; the same wherever they are made; nested in p."""

import copy
from itertools import pairwise

import plain_mixout
import pytest
import torch

from pe_dpo.errors import ModelError
from pe_dpo.model.mixout import attach_mixout
from pe_dpo.model.mixout.masks import MaskKey, cut, mask_seed
from pe_dpo.model.random_bits import random_bits

FORMS = ["column", "element"]
IDS = torch.arange(3, 43).view(2, 20)


def mask_of(mixout, name):
    """A layer's mask as it is drawn now: of its units, or of the matrix."""
    parameters = mixout.layers[name].parameters
    if mixout.form == "column":
        return mixout.factors(name, parameters[0])
    return mixout.mask_key(name, parameters[0]).factors(0, (len(parameters[1]), parameters[0].shape[1]))


def matrix_key(seed, draw, name, p):
    threshold, factor = cut(p)
    return MaskKey(
        torch.tensor(mask_seed(seed, draw, name)), torch.tensor(threshold), torch.tensor(factor, dtype=torch.float64)
    )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("draw", [0, 7, -1, (3, 1)])
def test_a_masks_elements_are_those_of_splitmix64_in_pythons_integers(p, draw):
    name = "model.layers.0.self_attn.q_proj.default"
    found = matrix_key(12, draw, name, p).factors(0, (9, 13))
    assert torch.equal(found, plain_mixout.factors(12, draw, name, (9, 13), p))


def test_a_block_of_a_mask_is_that_part_of_the_whole_mask():
    key = matrix_key(0, 0, "x", 0.4)
    whole = key.factors(0, (9, 13))
    for start, end in ((0, 4), (4, 8), (8, 9)):
        assert torch.equal(key.factors(start * 13, (end - start, 13)), whole[start:end])


@pytest.mark.parametrize("start", [2**31 - 2, 2**32 - 1, 2**40])
def test_elements_beyond_32_bits_have_numbers_of_their_own(start):
    """SplitMix64 jumps: the i-th number of a state is the first of state + i · 0x9E3779B97F4A7C15."""
    state = mask_seed(0, 0, "x")
    found = random_bits(torch.tensor(state), torch.arange(start, start + 4)).tolist()
    wanted = [next(plain_mixout.split_mix((state + (start + i) * 0x9E3779B97F4A7C15) % 2**64)) >> 11 for i in range(4)]
    assert found == wanted


@pytest.mark.parametrize("form", FORMS)
def test_all_masks_of_a_model_are_those_of_their_names(make_policy, form):
    mixout = attach_mixout(make_policy(), 0.25, seed=5, form=form)
    mixout.draw = 11
    for name in list(mixout.layers)[:4]:
        found = mask_of(mixout, name)
        assert torch.equal(found, plain_mixout.factors(5, 11, name, found.shape, 0.25).float())


@pytest.mark.parametrize("form", FORMS)
def test_other_trained_layers_do_not_change_a_layers_mask(make_policy, form):
    """Nor does their order: with more targets, layers lie between those that were there."""
    few = attach_mixout(make_policy(targets=["v_proj"]), 0.5, seed=0, form=form)
    many = attach_mixout(make_policy(targets=["down_proj", "q_proj", "v_proj"]), 0.5, seed=0, form=form)
    assert len(few.layers) == 2 and len(many.layers) == 6 and list(few.layers) != list(many.layers)[:2]
    for draw in (0, 1, (2, 3)):
        few.draw = many.draw = draw
        assert all(torch.equal(mask_of(few, name), mask_of(many, name)) for name in few.layers)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_another_dtype_lose_the_same_units(make_policy, form, dtype):
    mixout = attach_mixout(make_policy(), 0.3, seed=0, form=form)
    other = attach_mixout(make_policy().to(dtype), 0.3, seed=0, form=form)
    for name in list(mixout.layers)[:3]:
        assert mask_of(other, name).dtype == dtype
        assert torch.equal(mask_of(mixout, name) != 0, mask_of(other, name) != 0)


def test_a_model_that_is_moved_to_another_dtype_keeps_its_masks(make_policy):
    model = make_policy()
    mixout = attach_mixout(model, 0.3, seed=0)
    mixout.draw = 4
    name = next(iter(mixout.layers))
    before = mask_of(mixout, name).clone()
    model.double()
    assert mask_of(mixout, name).dtype == torch.float64
    assert torch.equal(mask_of(mixout, name) != 0, before != 0)
    mixout.draw = 5
    after = mask_of(mixout, name).clone()
    assert not torch.equal(after != 0, before != 0)
    assert torch.equal(model.float() and mask_of(mixout, name) != 0, after != 0)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_at_a_larger_p_is_kept_at_every_smaller_one(make_policy, form):
    mixout = attach_mixout(make_policy(), 0.5, seed=0, form=form)
    for name in list(mixout.layers)[:3]:
        kept = []
        for p in (1.0, 0.9, 0.5, 0.1, 0.0):
            mixout.p = p
            mask = mask_of(mixout, name)
            kept.append(mask != 0)
            assert p == 1 or bool((mask[kept[-1]] == torch.tensor(1 / (1 - p))).all())
        for fewer, more in pairwise(kept):
            assert bool((more | ~fewer).all()) and int(more.sum()) > int(fewer.sum())
        assert not kept[0].any() and bool(kept[-1].all())


def test_p_and_back_gives_the_same_masks_as_p_from_the_start(make_policy):
    mixout = attach_mixout(make_policy(), 0.3, seed=0)
    name = next(iter(mixout.layers))
    wanted = mask_of(mixout, name).clone()
    mixout.p = 0.8
    assert not torch.equal(mask_of(mixout, name), wanted)
    mixout.p = 0.3
    assert torch.equal(mask_of(mixout, name), wanted)


def test_numbers_of_a_draw_are_told_apart(make_policy):
    mixout = attach_mixout(make_policy(), 0.5, seed=0)
    name = next(iter(mixout.layers))
    drawn = []
    for draw in (12, (1, 2), (2, 1), (12,), (1, 2, 0), -12):
        mixout.draw = draw
        assert mixout.draw == draw
        drawn.append(mask_of(mixout, name).clone())
    assert len(torch.stack(drawn).unique(dim=0)) == 6
    mixout.draw = (1, 2)
    assert torch.equal(mask_of(mixout, name), drawn[1])


@pytest.mark.parametrize("form", FORMS)
def test_a_copied_model_draws_for_itself(make_policy, form):
    model = make_policy()
    mixout = attach_mixout(model, 0.5, seed=0, form=form)
    other = copy.deepcopy(model)
    (own,) = {v.mixout for m in other.modules() for v in getattr(m, "lora_variant", {}).values()}
    with torch.no_grad():
        first = model(input_ids=IDS).logits
        assert torch.equal(other(input_ids=IDS).logits, first)
        own.draw = 1
        assert torch.equal(model(input_ids=IDS).logits, first)
        second = other(input_ids=IDS).logits
        assert not torch.equal(second, first)
        mixout.draw = 1
        assert torch.equal(model(input_ids=IDS).logits, second)


@pytest.mark.parametrize("form", FORMS)
def test_sampling_in_eval_mode_is_the_training_modes_model_and_leaves_no_trace(make_policy, form):
    model = make_policy()
    mixout = attach_mixout(model, 0.5, seed=0, form=form)
    with torch.no_grad():
        mixout.draw = (-1, 2)
        wanted = model(input_ids=IDS).logits
        mixout.draw = 3
        training, plain = model(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits
        with mixout.sampled((-1, 2)):
            assert torch.equal(model(input_ids=IDS).logits, wanted)
        assert mixout.draw == 3
        assert torch.equal(model(input_ids=IDS).logits, plain)
        assert torch.equal(model.train()(input_ids=IDS).logits, training)


def test_a_p_for_a_model_that_was_attached_without_is_refused(make_policy):
    mixout = attach_mixout(make_policy(), 0.0, seed=0)
    mixout.draw = 4
    mixout.p = 0.0
    with pytest.raises(ModelError, match=r"p is 0\.5, and no layer is mixed: it was attached with p = 0"):
        mixout.p = 0.5


def test_an_impossible_p_or_form_is_refused_and_changes_nothing(layer):
    mixout = attach_mixout(layer(), 0.5, seed=0)
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ModelError, match="from 0 to 1"):
            mixout.p = p
    assert mixout.p == 0.5
    with pytest.raises(ModelError, match="form is 'row': it is column or element"):
        attach_mixout(layer(), 0.5, seed=0, form="row")

"""What must hold before a base is loaded: recipe, adapters, base and data are fit for each other, and for what comes after.

No weights are read, and neither PEFT nor bitsandbytes is imported where nothing asks for them: `pe-dpo check` ends here.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pe_dpo.data.encoded import column
from pe_dpo.errors import DataError
from pe_dpo.inference.inputs import Inputs, read_inputs
from pe_dpo.model.adapter_config import without_advice
from pe_dpo.model.adapter_files import AdapterFiles, check_can_be_trained_on
from pe_dpo.model.adapter_targets import find_targets
from pe_dpo.model.base import empty_model, lacks_bfloat16, load_tokenizer, noise_of
from pe_dpo.model.provenance import template_fingerprint
from pe_dpo.model.road import check_can_be_merged, check_has_place, files_here, loaded_size
from pe_dpo.recipe import Recipe, describe_sources, warnings
from pe_dpo.recipe.describe import name_loss
from pe_dpo.recipe.load import far_places
from pe_dpo.recipe.ranges import RANGES, check_ranges
from pe_dpo.recipe.schema import AdapterSection
from pe_dpo.training.arguments import check_optimizer, total_steps
from pe_dpo.training.trackers import check_trackers

logger = logging.getLogger(__name__)


def prepare_run(recipe: Recipe, *, shared: Inputs | None = None, recorded: Mapping[str, Any] | None = None) -> Inputs:
    """Return what the base is, the tokenizer and the pairs, or those that are `shared`; no weights are read.

    Args:
        recipe: The recipe of the run.
        shared: What several runs have in common, prepared already.
        recorded: The data report of a run that goes on, whose held-out rows are held out again.

    Raises:
        RecipeError: a tracker is not known or not installed, an optimizer or a schedule cannot be made, or a number is out of
            any range.
        ModelError: see `inspect_base`, `check_can_be_trained_on` and `load_tokenizer`; or an adapter target matches nothing.
        DataError: see `prepare_pairs`; or the loss asks for margins and no pair has one, a pair has a margin or a β that no
            loss bears, or all have weight 0.
    """
    check_trackers(recipe.train.report_to)
    check_optimizer(recipe)
    for line in (*warnings(recipe), *check_ranges(recipe)):  # which ask for no data, and reading them may take long
        logger.warning(line)
    for folder in filter(None, (recipe.adapter.start, recipe.adapter.over)):
        check_can_be_trained_on(folder)
    prepared = shared or read_inputs(recipe, recorded=recorded)
    prepared.data.report.tell(logger)
    for line in (name_loss(recipe.loss), *far_places(recipe)):
        logger.info(line)
    _check_adapters(recipe.adapter, prepared)
    if recipe.loss.margin_scale and not any(column(prepared.data.train, "margin")):
        raise DataError(
            f"{describe_sources(recipe.data.train)}: loss.margin_scale is {recipe.loss.margin_scale:g}, but no pair has a "
            "margin; name its column in data.columns (margin, or chosen_score and rejected_score), or drop margin_scale"
        )
    if all(weight == 0 for weight in column(prepared.data.train, "weight")):
        raise DataError(f"{describe_sources(recipe.data.train)}: all pairs have weight 0, so that nothing would be learned")
    _check_numbers(recipe, prepared)
    if recipe.mixout.p:
        from pe_dpo.training.mixing import mixout_warnings

        for line in mixout_warnings(recipe, prepared.base, total_steps(recipe, prepared.data)):
            logger.warning(line)
    if not prepared.data.held_out:
        _check_nothing_needs_held_out_pairs(recipe)
    return prepared


def _check_numbers(recipe: Recipe, prepared: Inputs) -> None:
    """Check the numbers of the pairs, and warn of settings of the steps that this many pairs make meaningless.

    Raises:
        DataError: a pair asks for a margin or a β that no loss bears; names the first.
    """
    loss, (pairs, settings) = recipe.loss, (prepared.data.train, recipe.train)
    for what, key, numbers in (
        ("margin", "loss.margin", [loss.margin + loss.margin_scale * (margin or 0.0) for margin in column(pairs, "margin")]),
        ("β", "loss.beta", [loss.beta if beta is None else beta for beta in column(pairs, "beta")]),
    ):
        low, high = next(found.possible for found in RANGES if found.key == key)
        bad = [(pairs[at].where, number) for at, number in enumerate(numbers) if not low <= number <= high]
        if bad:
            raise DataError(
                f"{bad[0][0]}: its {what} comes to {bad[0][1]:g}, and none beyond {low:g} to {high:g} can be trained on "
                f"({len(bad)} such pairs); correct or remove these rows, or leave that column out"
            )
    steps = total_steps(recipe, prepared.data)
    rising = settings.warmup if settings.warmup >= 1 else settings.warmup * steps
    if settings.schedule != "constant" and rising > max(steps / 2, 1):
        logger.warning(
            f"train.warmup: {settings.warmup:g} lets the learning rate rise for {min(rising, steps):.0f} of {steps} steps; a "
            "tenth is usual"
        )
    if settings.pairs_per_step > len(pairs):
        logger.warning(
            f"train.pairs_per_step: {settings.pairs_per_step} is more than the {len(pairs)} pairs that there are: a step is an "
            "epoch"
        )


def _check_nothing_needs_held_out_pairs(recipe: Recipe) -> None:
    """Check a recipe whose data hold no pairs out.

    Raises:
        DataError: it keeps the best of what is measured on them.
    """
    if recipe.train.keep_best:
        raise DataError(
            f"train.keep_best: {recipe.train.keep_best} is measured on held-out pairs, and none are held out; set data.eval, "
            "or leave keep_best out"
        )
    if recipe.generation.scales:
        logger.warning("generation.scales: no pairs are held out, so nothing will be measured at other scales; set data.eval")


def _check_adapters(adapter: AdapterSection, prepared: Inputs) -> None:
    """Check what of the adapters depends on base and tokenizer, on a base without weights.

    Raises:
        ModelError: a target matches nothing; or the adapter to start from or to lie under the new one does not fit the base, or
            cannot be merged into it.
    """
    base = prepared.base
    files = files_here(base)
    empty, folder = empty_model(base.base, base.config), adapter.over or adapter.start
    size = loaded_size(base, files, empty)
    logger.info(size.describe(base))
    if base.dtype == torch.float32 and lacks_bfloat16():
        logger.info("computed in float32: this GPU has no bfloat16 (emulated it is slower), and float16 loses small gradients")
    noise = ", ".join(f"{name} {value:g}" for name, value in noise_of(base.config).items())
    if noise:
        logger.info(f"the noise of the base's own that its configuration switches on in training is off: {noise}")
    if size.experts:
        logger.info("experts are in 4 bits, too, which no server loads so: what is trained is served merged (`pe-dpo merge`)")
    if size.left > 0.1 * size.parameters:
        logger.warning(
            f"model.quantize: {base.quantize} does not reach {size.left / size.parameters:.0%} of the weights of this base "
            f"(embeddings and head not counted); all together take {size.bytes / 1e9:,.1f} GB"
        )
    if folder:
        check_has_place(empty, AdapterFiles(folder).changes, files)
    if adapter.start:
        from pe_dpo.model.adapter import start_from_adapter

        with without_advice():  # of torch, that an empty model keeps no values
            start_from_adapter(empty, adapter.start, reference="base")
    else:
        found = find_targets(empty, adapter.targets, adapter.exclude)
        for line in found.describe():
            logger.info(line)
        check_can_be_merged(base, empty, found, files)
        if adapter.over:
            from pe_dpo.model.adapter import attach_adapter, lay_under

            empty = attach_adapter(empty, rank=1, alpha=1, targets=adapter.targets, exclude=adapter.exclude)
            with without_advice():
                lay_under(empty, adapter.over)
    theirs = load_tokenizer(folder) if folder and (Path(folder) / "tokenizer_config.json").is_file() else None
    if theirs and theirs.chat_template and template_fingerprint(theirs) != template_fingerprint(prepared.tokenizer):
        logger.warning(
            f"{folder}: has a chat template beside it, and the pairs are rendered with another one; if the adapter was trained "
            "with its own, name that one's file in data.template"
        )

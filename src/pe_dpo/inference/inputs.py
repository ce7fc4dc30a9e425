"""What a run or an audit begins with: what the base is, its tokenizer, the pairs; then base and adapter themselves."""

from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from pe_dpo.data import PreparedData, prepare_pairs
from pe_dpo.errors import ModelError
from pe_dpo.model.adapter import adapter_parameters, attach_adapter, start_from_adapter
from pe_dpo.model.base import BaseFacts, end_token_ids, inspect_base, load_base, load_tokenizer
from pe_dpo.recipe import Recipe


class Inputs(NamedTuple):
    """What is needed before the base is loaded."""

    facts: BaseFacts
    tokenizer: Any
    data: PreparedData


def read_inputs(recipe: Recipe) -> Inputs:
    """Return the facts of the base, the tokenizer and the pairs; no weights are read.

    Args:
        recipe: names them.

    Raises:
        ModelError: see `inspect_base` and `load_tokenizer`; or the tokenizer is not the model's.
        DataError: see `prepare_pairs`.
    """
    facts = inspect_base(**recipe.model.model_dump())
    tokenizer = load_tokenizer(recipe.model.base, revision=recipe.model.revision)
    data = prepare_pairs(
        recipe.data,
        tokenizer=tokenizer,
        context_length=facts.context_length,
        end_token_ids=end_token_ids(recipe.model.base, revision=recipe.model.revision),
    )
    _check_vocabulary(facts, data)
    return Inputs(facts, tokenizer, data)


def build_model(recipe: Recipe, facts: BaseFacts, device: torch.device | str, *, base: Any = None) -> Any:
    """Return base (loaded if it is not given) and adapter on the device, ready to train.

    Raises:
        ModelError: see `load_base`, `attach_adapter` and `start_from_adapter`; or nothing in the model is trainable.
    """
    base = load_base(facts, device=device) if base is None else base
    adapter = recipe.adapter
    if adapter.start:
        model = start_from_adapter(base, adapter.start, reference=adapter.reference or "base", dropout=adapter.dropout)
    else:
        model = attach_adapter(
            base,
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            targets=adapter.targets,
            init="gaussian" if adapter.init == "gaussian" else "default",
            seed=recipe.train.seed,
        )
    if not adapter_parameters(model):
        raise ModelError(
            "no parameter of the adapter is trainable, so nothing would be learned: PEFT before 0.21 freezes it when a frozen "
            f"copy is loaded beside it (this is PEFT {version('peft')}); install peft>=0.21"
        )
    return model


def _check_vocabulary(facts: BaseFacts, data: PreparedData) -> None:
    size = facts.config.get_text_config().vocab_size
    for pair in [*data.train, *data.held_out]:
        largest = max(int(ids.max()) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        if largest >= size:
            raise ModelError(
                f"{pair.where}: has token {largest}, but the model knows {size} tokens: the tokenizer is not the model's; put "
                "the right one beside the base"
            )

"""From the data section of a recipe to pairs."""

from collections.abc import Collection
from typing import Any

from pe_dpo.data.preparation import PreparedData, prepare_pairs
from pe_dpo.errors import DataError
from pe_dpo.recipe.schema import DataSection

DEFAULT_MAX_LENGTH = 2048
"""Tokens of prompt and answer where recipe and context allow more; as the DPO recipes of Zephyr and Tülu 3."""


def prepare_from_settings(
    settings: DataSection,
    *,
    tokenizer: Any,
    context_length: int | None,
    end_token_ids: Collection[int],
    only: str | None = None,
) -> PreparedData:
    """Return the pairs that a recipe's data section asks for, training and held out.

    Args:
        settings: the section.
        tokenizer: of the model.
        context_length: of the model, if it has a bound.
        end_token_ids: further tokens that end an answer, from the generation config.
        only: another path or hub id, all of whose pairs become `train` and none held out (to evaluate on).

    Raises:
        DataError: see `prepare_pairs`; or max_length exceeds the model's context.
    """
    context = context_length or DEFAULT_MAX_LENGTH
    if settings.max_length is not None and settings.max_length > context:
        raise DataError(f"data.max_length: {settings.max_length} tokens, but the model's context is {context}; lower it")
    columns = None if settings.columns is None else {str(ours): theirs for ours, theirs in settings.columns.items()}
    return prepare_pairs(
        only or settings.train,
        tokenizer=tokenizer,
        max_length=settings.max_length or min(DEFAULT_MAX_LENGTH, context),
        held_out=0.0 if only else settings.eval,
        columns=columns,
        template=settings.template,
        overlong=settings.overlong,
        bad_rows=settings.bad_rows,
        end_token_ids=end_token_ids,
        limit=None if only else settings.limit,
    )

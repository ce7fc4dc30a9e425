"""What a run or an audit begins with: what the base is, its tokenizer, the pairs; no weights are read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from pe_dpo.data import PreparedData, prepare_pairs
from pe_dpo.data.encoded import column
from pe_dpo.data.template import set_template
from pe_dpo.errors import ModelError
from pe_dpo.model.base import BaseInfo, answer_end_tokens, inspect_base, load_tokenizer
from pe_dpo.recipe import Recipe

if TYPE_CHECKING:
    from pe_dpo.inference.scorer import Scorer
    from pe_dpo.objective import PairLogprobs


@dataclass
class Findings:
    """What is found out of a loaded base and the pairs by the first of the runs that have them in common."""

    tensors: dict[str, str] = field(default_factory=dict)
    """sha256 of each tensor of the base, see `tensor_fingerprints`."""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of each of its files."""
    scorers: dict[str, "Scorer"] = field(default_factory=dict)
    """How pairs go through the model, by the settings that this depends on."""
    starts: dict[str, "PairLogprobs"] = field(default_factory=dict)
    """The monitored pairs' log-probs at step 0 under a policy that starts as the reference, by reference and rows."""


class Inputs(NamedTuple):
    """What is needed before the base is loaded."""

    base: BaseInfo
    tokenizer: Any
    data: PreparedData
    loaded_base: Any = None
    """The base, loaded, without adapters, where several runs have it in common."""
    findings: Findings | None = None
    """What these runs need to find out once."""


def read_inputs(recipe: Recipe, *, recorded: Mapping[str, Any] | None = None) -> Inputs:
    """Return what the base is, the tokenizer and the pairs.

    Args:
        recipe: names them.
        recorded: the data report of a run whose held-out rows are held out again; None to split anew.

    Raises:
        ModelError: see `inspect_base` and `load_tokenizer`; or the tokenizer is not the model's.
        DataError: see `prepare_pairs`.
    """
    base = inspect_base(**recipe.model.model_dump())
    tokenizer = load_tokenizer(recipe.model.base, revision=recipe.model.revision)
    set_template(tokenizer, recipe.data)
    data = prepare_pairs(
        recipe.data,
        tokenizer=tokenizer,
        context_length=base.context_length,
        end_token_ids=answer_end_tokens(tokenizer, recipe.model.base, revision=recipe.model.revision),
        recorded=recorded,
        seed=recipe.train.seeds.data,
    )
    size = base.config.get_text_config().vocab_size
    for pairs in (data.train, data.held_out):
        largest = column(pairs, "largest")
        where = next((index for index, token in enumerate(largest) if token >= size), None)
        if where is not None:
            raise ModelError(
                f"{pairs[where].where}: has token {largest[where]}, but the model knows {size} tokens: the tokenizer is not "
                "the model's; put the right one beside the base"
            )
    return Inputs(base, tokenizer, data)

"""What a folder holds that can be measured or talked to, and whether its base is the one that it was trained on.

run.json, recipe.yaml, adapter    a run: knows its base, its data and its loss
adapter_config.json               any LoRA adapter: names its base, at best
config.json                       a whole (merged) model
"""

import logging
import shlex
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pe_dpo.errors import UsageError
from pe_dpo.model.adapter_config import read_adapter_config
from pe_dpo.model.base import BaseFacts, load_tokenizer
from pe_dpo.recipe import Recipe
from pe_dpo.recipe.schema import ModelSection
from pe_dpo.runs.run import Run

logger = logging.getLogger(__name__)

Kind = Literal["run", "adapter", "model"]


class Target(NamedTuple):
    """A folder understood."""

    kind: Kind
    model: ModelSection
    """Which base, and how it is loaded; of a whole model, the model itself."""
    adapter: Path | None
    recipe: Recipe | None
    """Of a run, with `model` in it."""


def find_target(target: Path, *, base: str | None = None, quantize: str | None = None) -> Target:
    """Return what a folder holds.

    Args:
        target: a run folder, any LoRA adapter, or a whole model.
        base: the base of a run or an adapter, if not the one named there.
        quantize: how the base is loaded; by default as in the run, by its size for an adapter, not at all for a whole model.

    Raises:
        UsageError: none of the three, a run that has no adapter yet, or an adapter that names no base.
        ModelError: the adapter is no LoRA adapter.
    """
    if Run(target).exists:
        return _find_run(target, base, quantize)
    if (target / "adapter_config.json").is_file():
        config = read_adapter_config(target)
        named = base or config.base_model_name_or_path
        if not named:
            raise UsageError(f"{target}: does not say which base it belongs to; name it with --base")
        section = _model_section(str(named), quantize or "auto", None if base else config.revision)
        return Target("adapter", section, target, None)
    if (target / "config.json").is_file():
        return Target("model", _model_section(str(target), quantize or "none"), None, None)
    raise UsageError(
        f"{target}: is neither a run (run.json), an adapter (adapter_config.json) nor a model (config.json); "
        "name the folder of one of them"
    )


def load_target_tokenizer(target: Target) -> Any:
    """Return the tokenizer beside the adapter where there is one (a plain PEFT folder may have none), else the base's.

    Raises:
        ModelError: neither has one.
    """
    if target.adapter is not None and (target.adapter / "tokenizer_config.json").is_file():
        return load_tokenizer(str(target.adapter))
    return load_tokenizer(target.model.base, revision=target.model.revision)


def check_same_base(run: Path, facts: BaseFacts, fingerprint: str) -> None:
    """Check that a loaded base is the one that a run was trained on, where the run says which that was.

    Args:
        run: the run folder.
        facts: of the loaded base.
        fingerprint: of the loaded base; see `base_fingerprint`.

    Raises:
        UsageError: it is another one.
    """
    info = Run(run).info
    recorded, trained = info.hashes.base, info.base
    if recorded is None or recorded == fingerprint:
        return
    dtype = str(facts.dtype).removeprefix("torch.")
    if (trained.get("quantize"), trained.get("dtype")) == (facts.quantize, dtype):
        raise UsageError(f"{run}: {facts.base} is not the base of the run any more; restore it, or name the base with --base")
    logger.warning(f"trained on {trained.get('quantize')}/{trained.get('dtype')}, evaluated on {facts.quantize}/{dtype}")


def _find_run(run: Path, base: str | None, quantize: str | None) -> Target:
    recipe = Run(run).recipe
    if not (run / "adapter_model.safetensors").is_file():
        status = Run(run).info.status
        again = f"pe-dpo train {shlex.quote(str(run / 'recipe.yaml'))} --resume"
        raise UsageError(f"{run}: this run has no adapter yet (status: {status}); finish it with: {again}")
    wishes: dict[str, str | None] = {key: value for key, value in (("base", base), ("quantize", quantize)) if value is not None}
    if base is not None:
        wishes["revision"] = None  # it was one of the other base
    model = recipe.model.model_copy(update=wishes)
    return Target("run", model, run, recipe.model_copy(update={"model": model}))


def _model_section(base: str, quantize: str, revision: str | None = None) -> ModelSection:
    return ModelSection.model_validate({"base": base, "quantize": quantize, "revision": revision})

"""Policy and reference from one model: adapters on is π, adapters off (or a frozen adapter) is π0; and where one is saved.

run.json, recipe.yaml, adapter    a run: knows its base, its data and its loss
adapter_config.json               any LoRA adapter: names its base, at best
config.json                       a whole (merged) model, with no reference inside
"""

import logging
import shlex
from collections.abc import Collection
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from pe_dpo.data.template import set_template
from pe_dpo.errors import ModelError, UsageError
from pe_dpo.model.adapter import (
    POLICY,
    adapter_parameters,
    as_reference,
    attach_adapter,
    lay_under,
    load_adapter_for_evaluation,
    scaled,
    start_from_adapter,
)
from pe_dpo.model.adapter_config import read_adapter_config, trained_folder
from pe_dpo.model.base import BaseInfo, answer_end_tokens, evaluating, inspect_base, load_base, load_tokenizer
from pe_dpo.model.provenance import adapter_fingerprints, changed
from pe_dpo.recipe import Recipe
from pe_dpo.recipe.schema import ModelSection
from pe_dpo.runs.files import BEST_FILE, best_folder, read_object
from pe_dpo.runs.run import Run, RunInfo

logger = logging.getLogger(__name__)

Kind = Literal["run", "adapter", "model"]


class Policy:
    """A model that can be its own reference.

    Args:
        model: a PEFT model with the policy active; or a whole model, which has no reference inside.
        tokenizer: of the model.
        base: what is known of its base.
        end_tokens: that end an answer.
    """

    def __init__(self, model: Any, tokenizer: Any, base: BaseInfo, end_tokens: Collection[int]) -> None:
        self.model, self.tokenizer, self.base = model, tokenizer, base
        self.end_tokens = frozenset(end_tokens)

    @property
    def causal_lm(self) -> Any:
        """The model without PEFT around it; its adapters act all the same."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        """Of the model."""
        device: torch.device = self.model.device
        return device

    def reference(self) -> AbstractContextManager[Any]:
        """Return a block in which, without gradients, the model is π0; see `model.adapter.as_reference`."""
        return as_reference(self.model)

    def scaled(self, scale: float) -> AbstractContextManager[Any]:
        """Return a block in which the policy is scaled toward the reference; see `model.adapter.scaled`."""
        return scaled(self.model, scale)

    def evaluating(self) -> AbstractContextManager[None]:
        """Return a block in which the model is in eval mode and makes no gradients."""
        return evaluating(self.model)


class SavedPolicy:
    """A run, any LoRA adapter, or a whole model in a folder, understood and not yet loaded.

    Args:
        folder: that holds it.
        base: the base of a run or an adapter, if not the one named there.
        quantize: how the base is loaded; by default as in the run, by its size for an adapter, not at all for a whole model.
        best: of a run, the adapter of its best evaluation instead of the last.

    Raises:
        UsageError: none of the three, a run that has no adapter yet or kept no best one, or an adapter that names no base.
        ModelError: the adapter is no LoRA adapter, or the best one is damaged.
    """

    kind: Kind
    section: ModelSection
    """Which base, and how it is loaded; of a whole model, the model itself."""
    recipe: Recipe | None = None
    """Of a run, with `section` in it."""

    run = RunInfo()
    """Its run.json; of anything else an empty one."""

    def __init__(self, folder: str | Path, *, base: str | None = None, quantize: str | None = None, best: bool = False) -> None:
        self.folder = Path(folder)
        self.is_as_trained = base is None and quantize is None
        """Whether nothing was asked for but what the folder says."""
        self.adapter: Path | None = self.folder
        if best and not Run(folder).exists:
            raise UsageError(f"{folder}: is no run, and only a run has a best adapter; leave `best` out")
        if Run(folder).exists:
            self.kind, self.run = "run", Run(folder).info
            if best:
                self.adapter = best_folder(folder)
                recorded = read_object(self.adapter / BEST_FILE).get("adapter", {})
                if others := changed(recorded, adapter_fingerprints(self.adapter)):
                    again = "resume the run, or take another copy of it"
                    raise ModelError(f"{self.adapter / others[0]}: is not what training wrote (sha256); {again}")
            elif not (self.folder / "adapter_model.safetensors").is_file():
                again = f"pe-dpo train {shlex.quote(str(self.folder / 'recipe.yaml'))} --resume"
                raise UsageError(f"{folder}: this run has no adapter yet (status: {self.run.status}); finish it with: {again}")
            # The revision was one of the other base.
            wishes = {} if base is None else {"base": base, "revision": None}
            wishes |= {} if quantize is None else {"quantize": quantize}
            recipe = Run(folder).recipe
            self.section = recipe.model.model_copy(update=wishes)
            self.recipe = recipe.model_copy(update={"model": self.section})
        elif (self.folder / "adapter_config.json").is_file():
            self.kind = "adapter"
            config = read_adapter_config(folder)
            named = base or config.base_model_name_or_path
            if not named:
                raise UsageError(f"{folder}: does not say which base it belongs to; name it with `base`")
            revision = None if base else config.revision
            how = {"quantize": quantize or "auto", "quantize_experts": False}  # which no other tool does
            self.section = ModelSection.model_validate({"base": named, "revision": revision, **how})
        elif (self.folder / "config.json").is_file():
            self.kind, self.adapter = "model", None
            self.section = ModelSection.model_validate({"base": str(folder), "quantize": quantize or "none"})
        else:
            raise UsageError(
                f"{folder}: is neither a run (run.json), an adapter (adapter_config.json) nor a model (config.json); "
                "name the folder of one of them"
            )
        if self.adapter is not None:
            trained_folder(self.adapter)  # which refuses half of a sum

    def inspect(self) -> BaseInfo:
        """Return what is known of the base, or of a whole model, without its weights."""
        info, layers = inspect_base(**self.section.model_dump()), self.run.base.get("quantized_layers")
        if layers and self.is_as_trained:
            return info.as_recorded(layers)
        return info._replace(quantize_bypassed=True) if self.kind == "adapter" else info

    def tokenizer(self) -> Any:
        """Return the tokenizer beside the adapter where there is one (a plain PEFT folder may have none), else the base's.

        Raises:
            ModelError: neither has one.
        """
        if self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file():
            return load_tokenizer(str(self.adapter))
        return load_tokenizer(self.section.base, revision=self.section.revision)

    def check_base(self, base: BaseInfo, fingerprint: str) -> None:
        """Check that a loaded base is the one that a run was trained on, where the run says it and nothing else was asked for.

        Args:
            base: that is loaded.
            fingerprint: of it; see `base_fingerprint`.

        Raises:
            UsageError: it is another one.
        """
        recorded, trained = self.run.hashes.base, self.run.base
        if not self.is_as_trained or recorded is None or recorded == fingerprint:
            return
        dtype = str(base.dtype).removeprefix("torch.")
        if (trained.get("quantize"), trained.get("dtype")) == (base.quantize, dtype):
            raise UsageError(
                f"{self.folder}: {base.base} is not the base of the run any more; restore it, or name the base with `base`"
            )
        logger.warning(f"trained on {trained.get('quantize')}/{trained.get('dtype')}, evaluated on {base.quantize}/{dtype}")


def load_policy(
    source: Recipe | SavedPolicy | str | Path,
    *,
    base: Any = None,
    info: BaseInfo | None = None,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
) -> Policy:
    """Return a policy, loaded: ready to train from a recipe, in eval mode from a folder.

    Args:
        source: a recipe, whose adapter is made, or started from; or what `SavedPolicy` understands.
        base: loaded already, without adapters.
        info: of the base, where it was inspected already.
        tokenizer: where it was loaded already.
        device: by default a GPU where there is one.

    Raises:
        ModelError: the base, its tokenizer or an adapter cannot be used, or nothing in the model is trainable.
        UsageError: see `SavedPolicy`.
    """
    if not isinstance(source, Recipe | SavedPolicy):
        source = SavedPolicy(source)
    section = source.model if isinstance(source, Recipe) else source.section
    if info is None:
        info = inspect_base(**section.model_dump()) if isinstance(source, Recipe) else source.inspect()
    if base is None:
        base = load_base(info, device=default_device() if device is None else device)
    if isinstance(source, SavedPolicy):
        tokenizer = source.tokenizer() if tokenizer is None else tokenizer
        model = base.eval() if source.adapter is None else load_adapter_for_evaluation(base, source.adapter)
    else:
        if tokenizer is None:
            tokenizer = load_tokenizer(section.base, revision=section.revision)
            set_template(tokenizer, source.data)
        model = _to_train(base, source)
    return Policy(model, tokenizer, info, answer_end_tokens(tokenizer, section.base, revision=section.revision))


def default_device() -> str:
    """Return where models are loaded unless told otherwise: on a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _to_train(base: Any, recipe: Recipe) -> Any:
    """Return a base with the adapter that a recipe trains."""
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
            exclude=adapter.exclude,
            init="gaussian" if adapter.init == "gaussian" else "default",
            rslora=adapter.rslora,
            seed=recipe.train.seed_of("adapter"),
        )
    if adapter.over:
        model = lay_under(model, adapter.over)
    if not adapter_parameters(model):
        raise ModelError(
            "no parameter of the adapter is trainable, so nothing would be learned: PEFT before 0.21 freezes it when a frozen "
            f"copy is loaded beside it (this is PEFT {version('peft')}); install peft>=0.21"
        )
    bare = sorted(model.peft_config[POLICY].target_parameters or ())
    if bare:
        logger.warning(
            f"the adapter is also on {', '.join(bare)}, experts or routers that PEFT trains as bare parameters; `pe-dpo merge` "
            "cannot merge those. Name adapter.targets (q_proj, v_proj, …) to leave them out"
        )
    return model

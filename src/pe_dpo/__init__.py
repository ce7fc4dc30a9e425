"""pe-dpo: parameter-efficient preference fine-tuning on one GPU.

What the commands do is here as functions (`load_recipe`, `train`, `evaluate`, `compare`, `merge`), a run folder is a `Run`, and
there are the parts for anyone's own loop (`preference_loss`, `completion_logprobs`, `attach_mixout`, `mixout`, `MixLinear`).
`Policy` is provisional. Names are loaded when they are first used: importing the package imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pe_dpo.evaluation.evaluate import evaluate
    from pe_dpo.experiments.compare import compare
    from pe_dpo.inference.policy import Policy
    from pe_dpo.merging.merge import merge
    from pe_dpo.model.mixout import MixLinear, attach_mixout, mixout
    from pe_dpo.objective import answer_logprobs, completion_logprobs, preference_loss
    from pe_dpo.recipe import describe, load_recipe
    from pe_dpo.runs.run import Run
    from pe_dpo.training.train import train

__version__ = "0.1.0"

_HOMES = {
    "MixLinear": "pe_dpo.model.mixout",
    "Policy": "pe_dpo.inference.policy",
    "Run": "pe_dpo.runs.run",
    "answer_logprobs": "pe_dpo.objective",
    "attach_mixout": "pe_dpo.model.mixout",
    "compare": "pe_dpo.experiments.compare",
    "completion_logprobs": "pe_dpo.objective",
    "describe": "pe_dpo.recipe",
    "evaluate": "pe_dpo.evaluation.evaluate",
    "load_recipe": "pe_dpo.recipe",
    "merge": "pe_dpo.merging.merge",
    "mixout": "pe_dpo.model.mixout",
    "preference_loss": "pe_dpo.objective",
    "train": "pe_dpo.training.train",
}

__all__ = [
    "MixLinear",
    "Policy",
    "Run",
    "answer_logprobs",
    "attach_mixout",
    "compare",
    "completion_logprobs",
    "describe",
    "evaluate",
    "load_recipe",
    "merge",
    "mixout",
    "preference_loss",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pe_dpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

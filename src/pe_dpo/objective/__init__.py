"""Tensors only: the loss family, log-probs of answers, and the regimes of pairs. Imports nothing else of this package."""

from pe_dpo.objective.head import LogitTransform, head_logprobs
from pe_dpo.objective.logprobs import AnswerLogprobs, answer_logprobs, token_logprobs
from pe_dpo.objective.loss import PreferenceLoss, apply_link, preference_loss
from pe_dpo.objective.regimes import (
    QUADRANT_TITLES,
    QUADRANTS,
    Quadrant,
    RegimeTable,
    Saturation,
    Transitions,
    correlation,
    is_dead,
    length_slope,
    mcnemar,
    regime_table,
    saturation,
    share_right,
    transitions,
)

__all__ = [
    "QUADRANTS",
    "QUADRANT_TITLES",
    "AnswerLogprobs",
    "LogitTransform",
    "PreferenceLoss",
    "Quadrant",
    "RegimeTable",
    "Saturation",
    "Transitions",
    "answer_logprobs",
    "apply_link",
    "correlation",
    "head_logprobs",
    "is_dead",
    "length_slope",
    "mcnemar",
    "preference_loss",
    "regime_table",
    "saturation",
    "share_right",
    "token_logprobs",
    "transitions",
]

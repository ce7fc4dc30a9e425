"""Tensors only: the loss family, log-probs of answers, and the regimes of pairs. Imports nothing else of this package."""

from pe_dpo.objective.head import LogitTransform, head_logprobs
from pe_dpo.objective.logprobs import AnswerLogprobs, answer_logprobs, token_logprobs
from pe_dpo.objective.loss import PreferenceLoss, apply_link, preference_loss
from pe_dpo.objective.regimes import QUADRANT_TITLES, QUADRANTS, Quadrant, RegimeTable, is_dead, regime_table, share_right

__all__ = [
    "QUADRANTS",
    "QUADRANT_TITLES",
    "AnswerLogprobs",
    "LogitTransform",
    "PreferenceLoss",
    "Quadrant",
    "RegimeTable",
    "answer_logprobs",
    "apply_link",
    "head_logprobs",
    "is_dead",
    "preference_loss",
    "regime_table",
    "share_right",
    "token_logprobs",
]

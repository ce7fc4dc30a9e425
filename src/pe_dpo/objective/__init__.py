"""Tensors only: the loss family and log-probs of answers. Imports nothing else of this package."""

from pe_dpo.objective.head import LogitTransform, head_logprobs
from pe_dpo.objective.logprobs import AnswerLogprobs, answer_logprobs, token_logprobs
from pe_dpo.objective.loss import PreferenceLoss, apply_link, preference_loss

__all__ = [
    "AnswerLogprobs",
    "LogitTransform",
    "PreferenceLoss",
    "answer_logprobs",
    "apply_link",
    "head_logprobs",
    "preference_loss",
    "token_logprobs",
]

"""Tensors only: the loss family and log-probs of answers."""

from pe_dpo.objective.head import LogitTransform, head_logprobs
from pe_dpo.objective.logprobs import AnswerLogprobs, PairLogprobs, answer_logprobs, completion_logprobs, token_logprobs
from pe_dpo.objective.loss import Loss, PairTerms, PreferenceLoss, apply_link, preference_loss

__all__ = [
    "AnswerLogprobs",
    "LogitTransform",
    "Loss",
    "PairLogprobs",
    "PairTerms",
    "PreferenceLoss",
    "answer_logprobs",
    "apply_link",
    "completion_logprobs",
    "head_logprobs",
    "preference_loss",
    "token_logprobs",
]

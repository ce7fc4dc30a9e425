"""Published losses as data: each is a point of the one formula in `objective.loss`, with the paper it comes from."""

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A named loss."""

    title: str
    source: str
    values: dict[str, Any]
    """Keys of the recipe's loss section; a gamma of "1x" means equal to beta."""


PRESETS: dict[str, Preset] = {
    "dpo": Preset("DPO", "Rafailov et al. 2023, arXiv 2305.18290", {"beta": 0.1, "gamma": "1x"}),
    "gdpo": Preset(
        "generalized DPO (not the online method GDPO)", "Cho, 'Continued musing on DPO'", {"beta": 0.1, "gamma": "0.5x"}
    ),
    "hdpo": Preset("H-DPO with α = β/γ", "Omura et al. 2024, arXiv 2411.07595", {"beta": 0.1, "gamma": "1.1x"}),
    "cdpo": Preset(
        "conservative DPO",
        "Mitchell 2023, 'A note on DPO with noisy preferences'",
        {"beta": 0.1, "gamma": "1x", "label_smoothing": 0.1, "label_smoothing_mode": "conservative"},
    ),
    "robust": Preset(
        "robust DPO",
        "Chowdhury et al. 2024, arXiv 2403.00409",
        {"beta": 0.1, "gamma": "1x", "label_smoothing": 0.1, "label_smoothing_mode": "unbiased"},
    ),
    "ipo": Preset(
        "IPO with τ = β/(2·margin), on per-token log-probs, β² times the paper's loss",
        "Azar et al. 2023, arXiv 2310.12036",
        {"beta": 0.1, "gamma": "1x", "margin": 0.5, "link": "squared", "reduce": "mean"},
    ),
    "hinge": Preset(
        "the hinge loss, RSO's hinge-norm",
        "Liu et al. 2023, arXiv 2309.06657",
        {"beta": 0.1, "gamma": "1x", "margin": 1.0, "link": "hinge"},
    ),
    "gen-hinge": Preset(
        "generalized hinge",
        "Cho, 'Continued musing on DPO', with a margin so that pairs which π0 ranks wrong can flip",
        {"beta": 0.1, "gamma": "0.5x", "margin": 1.0, "link": "hinge"},
    ),
    "slic": Preset(
        "SLiC-HF",
        "Zhao et al. 2023, arXiv 2305.10425",
        {"beta": 1.0, "gamma": 0.0, "margin": 1.0, "link": "hinge", "sft_weight": 0.1},
    ),
    "simpo": Preset(
        "SimPO",
        "Meng et al. 2024, arXiv 2405.14734",
        {"beta": 2.0, "gamma": 0.0, "margin": 1.0, "reduce": "mean"},
    ),
    "repo": Preset(
        "RePO",
        "Wu et al. 2025, arXiv 2503.07426",
        {"beta": 1.0, "gamma": 0.0, "margin": 0.5, "link": "hinge", "reduce": "mean"},
    ),
    "cpo": Preset("CPO", "Xu et al. 2024, arXiv 2401.08417", {"beta": 0.1, "gamma": 0.0, "sft_weight": 1.0}),
    "dpo-norm": Preset(
        "length-normalised DPO",
        "Lambert et al. 2024 (Tülu 3), arXiv 2411.15124",
        {"beta": 5.0, "gamma": "1x", "reduce": "mean"},
    ),
    "hypo": Preset("HyPO", "arXiv 2602.11902", {"beta": 0.1, "gamma": "1x", "reference_floor": 0.0}),
    "rdpo": Preset("R-DPO", "Park et al. 2024, arXiv 2403.19159", {"beta": 0.1, "gamma": "1x", "length_penalty": 0.01}),
    "dpo-shift": Preset(
        "DPO-Shift with f(λ) fixed",
        "Yang et al. 2025, arXiv 2502.07599",
        {"beta": 0.01, "gamma": "1x", "rejected_weight": 0.95},
    ),
}

ALIASES = {"sigmoid": "dpo", "sigmoid_norm": "dpo-norm", "rso": "hinge"}
"""What the same losses are called elsewhere."""

NOT_HERE = {
    "orpo": "odds ratio plus likelihood, without a reference; nearest: simpo or cpo",
    "kto": "for single answers with a label; nearest, for pairs: dpo",
    "kto_pair": "KTO on pairs, each answer against an estimate of the KL; nearest: dpo",
    "apo_zero": "raises the chosen and lowers the rejected answer by separate terms; nearest: dpo with sft_weight",
    "apo_down": "lowers both answers, the rejected one more; nearest: dpo",
    "bco_pair": "a binary classifier of each answer around a running mean; nearest: dpo",
    "sppo_hard": "squares each answer's log-ratio against ±½; nearest: ipo",
    "nca_pair": "contrasts each answer with the reference; nearest: dpo with sft_weight",
    "exo_pair": "the reverse KL between two distributions over the pair; nearest: cdpo",
    "aot": "sorts rewards across the batch, so that no pair has a loss of its own; nearest: dpo",
    "aot_pair": "sorts rewards across the batch, so that no pair has a loss of its own; nearest: dpo",
    "aot_unpaired": "sorts rewards across the batch, so that no pair has a loss of its own; nearest: dpo",
    "discopop": "a logistic loss mixed with an exponential one; nearest: dpo",
    "sft": "the likelihood of the chosen answer alone; use an SFT tool, or sft_weight beside another loss",
    "alphapo": "another shape of the reward than the log-prob; nearest: simpo",
    "bco": "for single answers with a label; nearest, for pairs: dpo",
    "grpo": "an online method: it samples answers and scores them; pairs that are there already are for dpo",
    "ppo": "an online method: it samples answers and scores them; pairs that are there already are for dpo",
}
"""Losses of other tools that are no point of the formula: what they are, and the nearest preset."""

"""Mixout: while training, a random share p of an adapted model is taken from the reference (Lee, Cho & Kang 2020).

W̃ = W0 + M ⊙ (W − W0) / (1−p),   P(M = 1) = 1−p      so that E[W̃] = W

masks       which units are taken from the reference: a pure function of seed, draw and the layer's name
weights     a weight mixed with its pretrained value, for anyone's own loop: `mixout`, `MixLinear`
updates     LoRA layers: W − W0 is ΔW = s·B·A, and W0 may be 4-bit
whole       modules that are trained whole beside LoRA (PEFT's modules_to_save): norms, linear layers, embeddings
attach      what is mixed, what is refused
"""

from pe_dpo.model.mixout.attach import attach_mixout
from pe_dpo.model.mixout.masks import Form, Mixout
from pe_dpo.model.mixout.weights import MixLinear, mixout

__all__ = ["Form", "MixLinear", "Mixout", "attach_mixout", "mixout"]

"""Loss and adapter gradient of a step in float64: plain transformers and plain PEFT, pair by pair, the formula written out.

The weights are those that the step has: the base's, or the values of its 4-bit codes. What 16 bits make of a step is judged by
its distance to this, since two programs that round in other places may differ by more than either does from the truth.
"""

from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.agreement import Outcome
from benchmarks.models import ALPHA, BETA, RANK, Dtype, ModelName, adapter_of, fill_adapter, load_policy, saved_base
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.model.quantization import four_bit_layers, values_in


def true_outcome(name: ModelName, dtype: Dtype, pairs: Sequence[EncodedPair]) -> Outcome:
    """Return the DPO loss of an optimizer batch and its adapter gradients, in float64."""
    base = AutoModelForCausalLM.from_pretrained(saved_base(name), dtype=torch.float64)
    if dtype == "nf4":
        quantized = load_policy(name, "nf4").get_base_model()
        for path, layer in four_bit_layers(quantized):
            weight = base.get_submodule(path.replace(".base_layer", "")).weight
            weight.data.copy_(values_in(layer.weight, torch.float64))
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = fill_adapter(get_peft_model(base, adapter).double())
    loss = 0.0
    for pair in pairs:
        with torch.no_grad(), model.disable_adapter():
            reference = _shift(model, pair)
        one = -torch.nn.functional.logsigmoid(BETA * (_shift(model, pair) - reference)) / len(pairs)
        one.backward()
        loss += float(one.detach())
    return Outcome(loss, {key: parameter.grad.detach() for key, parameter in adapter_of(model).items()})


def _shift(model: torch.nn.Module, pair: EncodedPair) -> torch.Tensor:
    """log p(chosen) − log p(rejected)."""
    sums = []
    for answer in (pair.chosen_ids, pair.rejected_ids):
        prompt, ids = len(pair.prompt_ids), torch.tensor([*pair.prompt_ids.tolist(), *answer.tolist()])
        logits = model(input_ids=ids[None], use_cache=False).logits[0, prompt - 1 : -1]
        sums.append(logits.log_softmax(-1).gather(1, ids[prompt:, None]).sum())
    return sums[0] - sums[1]

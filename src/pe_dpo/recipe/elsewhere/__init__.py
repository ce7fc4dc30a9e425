"""What other tools call things, and what the same word means there.

One set of data: `pe-dpo convert` reads its defaults and differences here, the loader its answers to unknown keys, and
`docs/coming-from-other-tools.md` is made of it. A key is added in the table of its tool.
"""

from pe_dpo.recipe.elsewhere.axolotl import AXOLOTL
from pe_dpo.recipe.elsewhere.key import Key, Tool
from pe_dpo.recipe.elsewhere.llama_factory import LLAMA_FACTORY
from pe_dpo.recipe.elsewhere.swift import SWIFT
from pe_dpo.recipe.elsewhere.torchtune import TORCHTUNE
from pe_dpo.recipe.elsewhere.trl import SIMPO, TRL

__all__ = ["OTHER_WORDS", "TOOLS", "Key", "Tool", "key_elsewhere"]

TOOLS = {
    "trl": TRL,
    "simpo": SIMPO,
    "axolotl": AXOLOTL,
    "llama-factory": LLAMA_FACTORY,
    "torchtune": TORCHTUNE,
    "ms-swift": SWIFT,
}

OTHER_WORDS = {
    "model_name": Key("model.base"),
    "cpo_simpo_gamma": TRL.keys["simpo_gamma"],
    "dpo_lambda": Key("loss.rejected_weight"),
    **dict.fromkeys(("dpo_lambda_min", "dpo_lambda_max"), Key("loss.rejected_weight", "which stays what it is along the run")),
    "dpo_lambda_strategy": Key("", "loss.rejected_weight stays what it is along the run (fixed); drop the key"),
    "r": Key("adapter.rank"),
    "target_modules": Key("adapter.targets"),
    "modules_to_save": TRL.keys["lora_modules_to_save"],
    "init_lora_weights": Key("adapter.init"),
    "max_seq_length": AXOLOTL.keys["sequence_len"],
    "max_seq_len": AXOLOTL.keys["sequence_len"],
    "lr": Key("train.learning_rate"),
    "batch_size": Key("train.pairs_per_step"),
    "train_batch_size": Key("train.pairs_per_step"),
    "quantization": Key("model.quantize"),
}
"""Names that people write who come from PEFT, Unsloth or a script of their own."""


def key_elsewhere(name: str) -> Key | None:
    """Return what a key is that some other tool has; of several tools the first, which has most users. None for none."""
    if name in OTHER_WORDS:
        return OTHER_WORDS[name]
    return next((tool.keys[name] for tool in TOOLS.values() if name in tool.keys), None)

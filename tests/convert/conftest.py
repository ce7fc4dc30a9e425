"""Files of other tools, written and converted."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pe_dpo.convert.convert import Conversion, convert

TRL = "model_name_or_path: b\ndataset_name: d\nuse_peft: true\n"
AXOLOTL = "base_model: b\nadapter: lora\nlora_r: 8\nlora_alpha: 16\nlearning_rate: 1e-4\ndatasets: [{path: d}]\nrl: dpo\n"
LLAMA_FACTORY = "model_name_or_path: b\nstage: dpo\ndataset: d\n"
SWIFT = "model: b\nrlhf_type: dpo\ndataset: [d]\n"
TORCHTUNE = """
model: {_component_: torchtune.models.llama3_1.lora_llama3_1_8b}
checkpointer: {checkpoint_dir: b}
dataset: {_component_: torchtune.datasets.hh_rlhf_helpful_dataset}
batch_size: 4
epochs: 1
"""
MINIMAL = {"trl": TRL, "axolotl": AXOLOTL, "llama-factory": LLAMA_FACTORY, "ms-swift": SWIFT, "torchtune": TORCHTUNE}


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., Conversion]:
    """Convert a tool's smallest file with more lines below it; a line wins over one of the same key above."""

    def converted(tool: str, more: str = "", *, cards: int | None = None, name: str = "config.yaml") -> Conversion:
        keys = {line.partition(":")[0] for line in more.splitlines() if line and line[0] not in " -"}
        lines = [line for line in MINIMAL[tool].splitlines() if line.partition(":")[0] not in keys]
        path = tmp_path / name
        path.write_text("\n".join([*lines, more]), encoding="utf-8")
        return convert(path, cards=cards)

    return converted

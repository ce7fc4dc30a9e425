"""A LoRA adapter as a GGUF file, which llama.cpp adds to its base while it runs (`--lora`).

    W·x + (alpha / r)·B·A·x        A and B of each matrix, under the name that the matrix has in the base's file

The file has one alpha for all. It is chosen so that most matrices keep the numbers of training; what another scaling asks for
(rsLoRA, patterns of ranks and alphas) is multiplied into B. Rows of queries and keys lie as in the base's file.

Source: names and kinds follow llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp, autumn 2026.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from pe_dpo.errors import UsageError
from pe_dpo.export.gguf_file import gguf_writer, permuted, read_config, tensor_names
from pe_dpo.model.adapter_files import AdapterFiles, Change


def write_gguf_adapter(adapter: AdapterFiles, base: Path, output: Path, *, description: str) -> list[int]:
    """Write an adapter as a GGUF file, in float32, and return the rank of each matrix.

    Args:
        adapter: plain LoRA on the matrices of attention, MLP and head.
        base: folder of the model that it belongs to; its weights are not read.
        output: file to write; appears under its name when it is complete.
        description: of the base, for whoever looks into the file.

    Raises:
        UsageError: the gguf package is missing, or base or adapter are of a kind that llama.cpp does not load.
        ModelError: the adapter cannot be read.
    """
    config = read_config(base)
    names = tensor_names(config)
    matrices: dict[str, tuple[Tensor, Tensor, float]] = {}
    for name, change in adapter.changes.items():
        found = names.get_name(name, try_suffixes=(".weight",))
        why = _what_is_not_said(change, name, config) if found else "is no tensor that llama.cpp knows"
        if why is not None:
            raise UsageError(
                f"{adapter.folder}: {name} {why}, which no GGUF adapter says; merge it, and export the merged model"
            )
        assert change.a is not None and change.b is not None, "plain LoRA"
        a, b = adapter.tensors.read(change.a).float(), adapter.tensors.read(change.b).float()
        matrices[found] = a.contiguous(), permuted(b, name, config).contiguous(), change.scaling * len(a)
    # llama.cpp takes an alpha of 0 for a scaling of 1.
    alpha = Counter(product for *_, product in matrices.values()).most_common(1)[0][0] or 1.0
    with gguf_writer(output, config) as writer:
        writer.add_type("adapter")
        writer.add_name(output.stem)
        writer.add_description(description)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for found, (a, b, product) in matrices.items():
            writer.add_tensor(f"{found}.lora_a", a.numpy())
            writer.add_tensor(f"{found}.lora_b", (b if product == alpha else b * (product / alpha)).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return [len(a) for a, *_ in matrices.values()]


def _what_is_not_said(change: Change, name: str, config: Any) -> str | None:
    """What an adapter does to a tensor that a GGUF adapter cannot say; None for plain LoRA."""
    if change.magnitude is not None:
        return "has DoRA"
    if change.replacement is not None or change.rows is not None:
        return "is saved whole (modules_to_save, trained tokens)"
    if change.addition is not None:
        return "has a trained bias"
    if change.is_transposed:
        return "has LoRA on the embedding"
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "has LoRA on a head that is tied to the embedding"
    return None

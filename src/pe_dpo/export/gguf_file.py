"""A model as one GGUF file, for llama.cpp, Ollama and what is built on them.

    header | metadata: architecture, RoPE, tokenizer, chat template | table of tensors | tensors, each read, cast, written

Only families whose conversion was checked tensor by tensor are written: Llama, Mistral, Qwen2 and Qwen3. Memory is
that of a few copies of the largest tensor.

Source: the layout is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names, and what is permuted, follow llama.cpp's
converter (conversion/llama.py and conversion/qwen.py, August 2026).
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pe_dpo.disk import sync
from pe_dpo.errors import ModelError, UsageError
from pe_dpo.export.gguf_tokenizer import Vocabulary, read_vocabulary, refuse
from pe_dpo.model.tensor_files import TensorFacts, TensorFiles

Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""model_type -> architecture in the file; llama.cpp runs Mistral as Llama."""

_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
"""general.file_type, as `LlamaFileType` of the gguf package."""


class GgufFacts(NamedTuple):
    """What was written."""

    path: Path
    bytes: int
    tensors: int
    kind: Kind
    is_lossless: bool
    """Every value is written exactly as the model has it."""
    remarks: tuple[str, ...]
    """What differs from the model, or will in llama.cpp."""


class _Planned(NamedTuple):
    """One tensor of the file: where it comes from, and as what it is written."""

    name: str
    source: TensorFacts | None
    shape: tuple[int, ...]
    type: str


def write_gguf(
    model: Path,
    output: Path,
    *,
    kind: Kind,
    progress: Callable[[str, int, int], None] | None = None,
) -> GgufFacts:
    """Write a model as a GGUF file and return what was written.

    Args:
        model: folder of a whole model: config.json, safetensors, tokenizer.
        output: file to write; appears under its name when it is complete.
        kind: type of the matrices; vectors (norms, biases) are float32 always, and with q4_0 the embedding is q8_0.
        progress: called with ("writing", tensors done, tensors in all).

    Raises:
        UsageError: the gguf package is missing, or the model is one that this does not convert; the message has the command.
        ModelError: tensors are missing, or not finite in the wanted type.
    """
    gguf = import_gguf()
    config = _read_config(model)
    vocabulary = read_vocabulary(model, config.vocab_size)
    files = TensorFiles(model)
    planned = _plan(model, config, files, kind)
    partial = output.with_name(f".{output.name}.partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURES[config.model_type])
    try:
        _add_model(writer, model, config, kind)
        _add_vocabulary(writer, vocabulary)
        _write_tensors(writer, files, planned, config, progress)
        writer.close()
        _settle(partial, output)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    remarks = (*vocabulary.remarks, *_remarks(config, planned, kind))
    is_lossless = all(_is_exact(one) for one in planned)
    return GgufFacts(output, output.stat().st_size, len(planned), kind, is_lossless, remarks)


def load_gguf(file: Path, model: Path) -> Any:
    """Return the causal LM of a GGUF file, in float32 and eval mode, for comparison with the model it was written from.

    transformers reads neither RoPE scaling nor, for Qwen, the size of a head from GGUF files (5.23); those two come from the
    model's configuration.

    Args:
        file: written by `write_gguf`.
        model: folder that it was written from.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    original = _read_config(model)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    config.head_dim = _head_size(original)
    config.rope_parameters = original.rope_parameters
    config.attention_bias = getattr(original, "attention_bias", False)
    config.mlp_bias = getattr(original, "mlp_bias", False)
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=config, dtype=torch.float32, trust_remote_code=False
    )
    return loaded.eval()


def import_gguf() -> Any:
    """Return the gguf package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UsageError('GGUF files need the gguf package: pip install "pe-dpo[gguf]"') from error
    return gguf


def _read_config(model: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{model}: no model found there: {error}") from error
    if config.model_type not in ARCHITECTURES:
        raise refuse(model, f"model_type {config.model_type} is none of those exported here ({', '.join(ARCHITECTURES)})")
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"{model}: its weights are quantized; export the merged model in 16 bits instead")
    if config.hidden_act != "silu":
        raise refuse(model, f"its activation is {config.hidden_act}, not silu")
    if config.model_type.startswith("qwen") and getattr(config, "use_sliding_window", False):
        raise refuse(model, "some of its layers attend to a sliding window")
    if _is_windowed_by_layer(config):
        raise refuse(model, "its layers attend differently")
    _check_rope(model, config)
    return config


def _is_windowed_by_layer(config: Any) -> bool:
    return len(set(getattr(config, "layer_types", None) or ["full_attention"])) > 1


def _check_rope(model: Path, config: Any) -> None:
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    families = {"default": "llama qwen2 qwen3", "linear": "llama qwen2 qwen3", "yarn": "llama qwen2 qwen3", "llama3": "llama"}
    if ARCHITECTURES[config.model_type] not in families.get(kind, "").split():
        raise refuse(model, f"its RoPE is {kind}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse(model, "its RoPE turns a part of each head only")
    extras = {"attention_factor", "mscale", "mscale_all_dim", "truncate"} & {key for key in rope if rope[key] is not None}
    if kind == "yarn" and extras:
        raise refuse(model, f"its RoPE is yarn with {', '.join(sorted(extras))}")


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _plan(model: Path, config: Any, files: TensorFiles, kind: Kind) -> list[_Planned]:
    """All tensors of the file in the order in which they are written."""
    gguf = import_gguf()
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    planned = []
    for facts in files:
        if _is_derived(facts.name) or (facts.name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        name = names.get_name(facts.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise refuse(model, f"it has a tensor {facts.name} that this does not know")
        planned.append(_Planned(name, facts, facts.shape, _type_of(name, facts.shape, kind)))
    _check_complete(model, config, {one.name for one in planned})
    if config.rope_parameters.get("rope_type") == "llama3":
        planned.append(_Planned("rope_freqs.weight", None, (_head_size(config) // 2,), "f32"))
    return planned


def _is_derived(name: str) -> bool:
    """Tables that old files hold and that follow from the configuration."""
    return name.endswith("rotary_emb.inv_freq")


def _type_of(name: str, shape: tuple[int, ...], kind: Kind) -> str:
    """Vectors stay float32; rows that do not divide into blocks of 32 fall back to float16, as in llama.cpp's converter.

    With q4_0 the embedding and the head are q8_0 (llama-quantize takes a K-quant of 6 bits): the mean KL on golden prompts
    falls from 0.0072 to 0.0049 with the quickstart's base, and from 0.021 to 0.013 with a dialogue model of 4 M parameters.
    """
    if len(shape) == 1:
        return "f32"
    if kind in ("q8_0", "q4_0") and shape[-1] % 32:
        return "f16"
    return "q8_0" if kind == "q4_0" and name in ("token_embd.weight", "output.weight") else kind


def _is_exact(planned: _Planned) -> bool:
    types = {torch.bfloat16: "bf16", torch.float16: "f16"}
    return planned.type == "f32" or (planned.source is not None and types.get(planned.source.dtype) == planned.type)


def _check_complete(model: Path, config: Any, names: set[str]) -> None:
    wanted = {"token_embd.weight", "output_norm.weight"} | ({"output.weight"} if not config.tie_word_embeddings else set())
    parts = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
    parts += ["attn_q_norm", "attn_k_norm"] if config.model_type == "qwen3" else []
    biases = ("attn_q", "attn_k", "attn_v") if config.model_type == "qwen2" else ()
    for layer in range(config.num_hidden_layers):
        wanted |= {f"blk.{layer}.{part}.weight" for part in parts} | {f"blk.{layer}.{part}.bias" for part in biases}
    missing = sorted(wanted - names)
    if missing:
        raise ModelError(f"{model}: {len(missing)} tensors are missing from its files ({missing[0]}, …); make it again")


def _add_model(writer: Any, model: Path, config: Any, kind: Kind) -> None:
    gguf = import_gguf()
    writer.add_type("model")
    writer.add_name(model.resolve().name)
    writer.add_file_type(_FILE_TYPES[kind])
    if kind in ("q8_0", "q4_0"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_size(config))
    _add_rope(writer, config.rope_parameters)


def _add_rope(writer: Any, rope: dict[str, Any]) -> None:
    gguf = import_gguf()
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32.0))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1.0))


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_token_scores(vocabulary.scores)
    for name, index in vocabulary.special_ids.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    writer.add_add_space_prefix(vocabulary.adds_space_prefix)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _write_tensors(
    writer: Any,
    files: TensorFiles,
    planned: list[_Planned],
    config: Any,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    import numpy as np

    gguf = import_gguf()
    for one in planned:
        kind = gguf.GGMLQuantizationType[one.type.upper()]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), math.prod(one.shape) // block * size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, data in enumerate(_arrays(files, planned, config), 1):
        writer.write_tensor_data(data)
        if progress:
            progress("writing", done, len(planned))


def _arrays(files: TensorFiles, planned: list[_Planned], config: Any) -> Iterator[Any]:
    for one in planned:
        if one.source is None:
            yield llama3_factors(config).numpy()
            continue
        tensor = files.read(one.source.name)
        if ARCHITECTURES[config.model_type] == "llama":
            tensor = _permuted(tensor, one.source.name, config)
        yield _encoded(tensor, one)


def _permuted(tensor: Tensor, name: str, config: Any) -> Tensor:
    """Rows of queries and keys in ggml's order for Llama: RoPE turns neighbours there, the two halves of a head here."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    halves = tensor.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(tensor.shape)


def _encoded(tensor: Tensor, planned: _Planned) -> Any:
    """The bytes of a tensor in its type, as a numpy array."""
    gguf = import_gguf()
    kinds = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    values = tensor.to(kinds.get(planned.type, torch.float32)).contiguous()
    if not bool(torch.isfinite(values).all()):
        raise ModelError(f"{planned.name}: has values that are not finite as {planned.type}; try bf16, or look at the model")
    if planned.type in kinds:
        return values.view(torch.uint8).numpy()
    return gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[planned.type.upper()])


def llama3_factors(config: Any) -> Tensor:
    """Return by what llama.cpp divides each frequency of a RoPE of type llama3.

    Short waves stay, long ones are stretched by `factor`, those between by a mixture:

        1                                     wave < context / high_freq_factor
        factor                                wave > context / low_freq_factor
        1 / ((1 - s) / factor + s)            else, s = (context / wave - low) / (high - low)

    Args:
        config: with rope_parameters of type llama3.

    Returns:
        float32 (half the size of a head,).

    Source: https://github.com/meta-llama/llama-models, `apply_scaling`.
    """
    rope, size = config.rope_parameters, _head_size(config)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] / waves
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).to(torch.float32)


def _remarks(config: Any, planned: list[_Planned], kind: Kind) -> Iterator[str]:
    odd = [one.name for one in planned if kind in ("q8_0", "q4_0") and one.type == "f16"]
    if odd:
        yield f"{len(odd)} tensors are f16, their rows do not divide into blocks of 32: {odd[0]}, …"
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    if window is not None and window < config.max_position_embeddings:
        yield f"llama.cpp lets every token see all before it, the model the last {window}; they differ in longer texts"


def _settle(partial: Path, output: Path) -> None:
    """Give the finished file its name once it is on disk."""
    sync(partial)
    partial.replace(output)
    sync(output.parent)

"""A model as one GGUF file, for llama.cpp, Ollama and what is built on them.

    header | metadata: architecture, RoPE, tokenizer, chat template | table of tensors | tensors, each read, cast, written

Only what llama.cpp was seen to load and to compute is written (`tests/engines/test_llama_cpp.py`): Llama, Mistral, Qwen2 and
Qwen3. Memory is that of a few copies of the largest tensor.

Source: the layout is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names, and what is permuted, follow llama.cpp's
converter (conversion/llama.py and conversion/qwen.py, August 2026).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pe_dpo.disk import sync
from pe_dpo.errors import ModelError, UsageError
from pe_dpo.export.gguf_tokenizer import Vocabulary, refuse
from pe_dpo.model.tensor_files import TensorFiles, TensorInfo
from pe_dpo.progress import advance, progress

Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""model_type -> architecture in the file; llama.cpp runs Mistral as Llama."""

_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
"""general.file_type, as `LlamaFileType` of the gguf package."""

_PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""Types whose values are numbers of their own, not codes in blocks."""


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


def write_gguf(model: Path, output: Path, *, kind: Kind) -> GgufFacts:
    """Write a model as a GGUF file and return what was written.

    Args:
        model: folder of a whole model: config.json, safetensors, tokenizer.
        output: file to write; appears under its name when it is complete.
        kind: type of the matrices; vectors (norms, biases) are float32 always, and with q4_0 the embedding is q8_0.

    Raises:
        UsageError: the gguf package is missing, or the model is one that this does not convert; the message has the command.
        ModelError: tensors are missing, or not finite in the wanted type.
    """
    config = read_config(model)
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"{model}: its weights are quantized; export the merged model in 16 bits instead")
    vocabulary = Vocabulary(model, config.vocab_size)
    files = TensorFiles(model)
    planned = _plan(model, config, files, kind)
    with gguf_writer(output, config) as writer:
        _add_metadata(writer, model, config, vocabulary, kind)
        _write_tensors(writer, files, planned, config)
    remarks = list(vocabulary.remarks)
    odd = [name for name, (_, kind_of) in planned.items() if kind in ("q8_0", "q4_0") and kind_of == "f16"]
    if odd:
        remarks.append(f"{len(odd)} tensors are f16, their rows do not divide into blocks of 32: {odd[0]}, …")
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    if window is not None and window < config.max_position_embeddings:
        remarks.append(
            f"llama.cpp lets every token see all before it, the model the last {window}; they differ in longer texts"
        )
    is_lossless = all(
        kind_of == "f32" or (source is not None and source.dtype == _PLAIN.get(kind_of)) for source, kind_of in planned.values()
    )
    return GgufFacts(output, output.stat().st_size, len(planned), kind, is_lossless, tuple(remarks))


@contextmanager
def gguf_writer(output: Path, config: Any) -> Iterator[Any]:
    """Yield a writer of a GGUF file, which appears under its name at the end of the block, unless the block raises.

    Args:
        output: the file.
        config: of the model, whose architecture it names.
    """
    partial = output.with_name(f".{output.name}.partial")
    writer = import_gguf().GGUFWriter(partial, ARCHITECTURES[config.model_type])
    try:
        yield writer
        writer.close()
        sync(partial)
        partial.replace(output)
        sync(output.parent)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def load_gguf(file: Path, model: Path) -> Any:
    """Return the causal LM of a GGUF file, in float32 and eval mode, for comparison with the model it was written from.

    transformers reads neither RoPE scaling nor, for Qwen, the size of a head from GGUF files (5.23); those two come from the
    model's configuration.

    Args:
        file: written by `write_gguf`.
        model: folder that it was written from.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    original = read_config(model)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    config.head_dim = head_size(original)
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


def read_config(model: Path) -> Any:
    """Return the configuration of a model.

    Raises:
        ModelError: there is none.
        UsageError: it is not of a kind that is written here, or that llama.cpp loads.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{model}: no model found there: {error}") from error
    if config.model_type not in ARCHITECTURES:
        raise refuse(model, f"model_type {config.model_type} is none of those exported here ({', '.join(ARCHITECTURES)})")
    if config.hidden_act != "silu":
        raise refuse(model, f"its activation is {config.hidden_act}, not silu")
    _check_is_loaded(model, config)
    if config.model_type.startswith("qwen") and getattr(config, "use_sliding_window", False):
        raise refuse(model, "some of its layers attend to a sliding window")
    if len(set(getattr(config, "layer_types", None) or ["full_attention"])) > 1:
        raise refuse(model, "its layers attend differently")
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
    return config


def _check_is_loaded(model: Path, config: Any) -> None:
    """Check that llama.cpp loads the shape of a model.

    Its qwen2 has heads of hidden size / heads, and its qwen3 no bias behind the attention.
    """
    unreadable = None
    if config.model_type == "qwen2" and head_size(config) * config.num_attention_heads != config.hidden_size:
        unreadable = (
            f"its {config.num_attention_heads} heads of {head_size(config)} are not its hidden size, {config.hidden_size}"
        )
    if config.model_type == "qwen3" and config.attention_bias:
        unreadable = "its attention has biases"
    if unreadable is not None:
        raise UsageError(
            f"{model}: {unreadable}, and llama.cpp does not load a {config.model_type} of this kind, whoever converts it; "
            "serve the model itself, with vLLM or `transformers serve`"
        )


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _plan(model: Path, config: Any, files: TensorFiles, kind: Kind) -> dict[str, tuple[TensorInfo | None, str]]:
    """All tensors of the file in the order in which they are written.

    Vectors stay float32; rows that do not divide into blocks of 32 fall back to float16, as in llama.cpp's converter. With q4_0
    the embedding and the head are q8_0 (llama-quantize takes a K-quant of 6 bits): the mean KL on golden prompts falls from
    0.0072 to 0.0049 with the quickstart's base, and from 0.021 to 0.013 with a dialogue model of 4 M parameters.

    Returns:
        Name in the file -> tensor of the model (None for the factors of a RoPE of type llama3), and type in the file.
    """
    names = tensor_names(config)
    planned: dict[str, tuple[TensorInfo | None, str]] = {}
    for tensor in files:
        if tensor.name.endswith("rotary_emb.inv_freq"):
            continue  # old files hold what follows from the configuration
        if tensor.name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise refuse(model, f"it has a tensor {tensor.name} that this does not know")
        own: str = kind
        if len(tensor.shape) == 1:
            own = "f32"
        elif kind in ("q8_0", "q4_0") and tensor.shape[-1] % 32:
            own = "f16"
        elif kind == "q4_0" and name in ("token_embd.weight", "output.weight"):
            own = "q8_0"
        planned[name] = tensor, own
    parts = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
    parts += ["attn_q_norm", "attn_k_norm"] if config.model_type == "qwen3" else []
    expected = [f"{part}.weight" for part in parts]
    expected += ["attn_q.bias", "attn_k.bias", "attn_v.bias"] if config.model_type == "qwen2" else []
    expected = [f"blk.{layer}.{part}" for layer in range(config.num_hidden_layers) for part in expected]
    expected += ["token_embd.weight", "output_norm.weight", *([] if config.tie_word_embeddings else ["output.weight"])]
    missing = sorted({*expected} - planned.keys())
    if missing:
        raise ModelError(f"{model}: {len(missing)} tensors are missing from its files ({missing[0]}, …); make it again")
    if config.rope_parameters.get("rope_type") == "llama3":
        planned["rope_freqs.weight"] = None, "f32"
    return planned


def tensor_names(config: Any) -> Any:
    """Return gguf's map from the names of a model's tensors to those in its file."""
    gguf = import_gguf()
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    return gguf.get_tensor_name_map(architecture, config.num_hidden_layers)


def _add_metadata(writer: Any, model: Path, config: Any, vocabulary: Vocabulary, kind: Kind) -> None:
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
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size(config))
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    scaling = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}.get(rope.get("rope_type"))
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if scaling == gguf.RopeScalingType.YARN:
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32.0))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1.0))
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


def _write_tensors(writer: Any, files: TensorFiles, planned: dict[str, tuple[TensorInfo | None, str]], config: Any) -> None:
    gguf = import_gguf()
    for name, (source, kind) in planned.items():
        number = gguf.GGMLQuantizationType[kind.upper()]
        block, size = gguf.GGML_QUANT_SIZES[number]
        shape = (head_size(config) // 2,) if source is None else source.shape
        writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with progress("writing"):
        for done, (name, (source, kind)) in enumerate(planned.items(), 1):
            tensor = llama3_factors(config) if source is None else permuted(files.read(source.name), source.name, config)
            values = tensor.to(_PLAIN.get(kind, torch.float32)).contiguous()
            if not bool(torch.isfinite(values).all()):
                raise ModelError(f"{name}: has values that are not finite as {kind}; try bf16, or look at the model")
            if kind in _PLAIN:
                writer.write_tensor_data(values.view(torch.uint8).numpy())
            else:
                writer.write_tensor_data(gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[kind.upper()]))
            advance(done, len(planned))


def permuted(tensor: Tensor, name: str, config: Any) -> Tensor:
    """Return a tensor with rows of queries and keys in ggml's order for Llama.

    RoPE turns neighbours there, the two halves of a head here.

    Args:
        tensor: with the rows that the weight of this name has, or a bias.
        name: of the model's tensor.
        config: of the model.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or ARCHITECTURES[config.model_type] != "llama":
        return tensor
    halves = tensor.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(tensor.shape)


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
    rope, size = config.rope_parameters, head_size(config)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] / waves
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).to(torch.float32)

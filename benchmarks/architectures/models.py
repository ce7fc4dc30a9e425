"""The table of architectures: a configuration for each, small enough that a run and its merge take seconds.

Two layers, or as many as it takes to have each kind of layer once; 64 wide; 4 experts. The vocabulary is that of the embedded
quickstart, whose tokenizer they are given. Wrappers are made with the class that the public checkpoints name, so that their
files have the public layout: transformers renames backwards when it saves.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

VOCABULARY = 1024
TOKENS = {"bos_token_id": 1, "eos_token_id": 5, "pad_token_id": 0}
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "initializer_range": 0.15, "tie_word_embeddings": False, **TOKENS,
}  # fmt: skip
GROUPED = COMMON | {"num_key_value_heads": 2}
HEADS_OF_16 = GROUPED | {"head_dim": 16}
TIED = {"tie_word_embeddings": True}
SLIDING = {"sliding_window": 32}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]} | SLIDING
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA = HEADS_OF_16 | TIED | {"query_pre_attn_scalar": 16}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.15, **TOKENS}
MAMBA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "initializer_range": 0.15,
    "state_size": 8,
    **TOKENS,
}
HYBRID_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
SIGLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
          "patch_size": 14, "vision_use_head": False}  # fmt: skip
PIXTRAL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
           "patch_size": 16, "head_dim": 16}  # fmt: skip
QWEN_VISION = {"depth": 2, "num_heads": 2, "out_hidden_size": 64, "hidden_size": 32, "intermediate_size": 48}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
LLAMA3_ROPE = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 256}}  # fmt: skip


def _without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    old = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    return name if old is None else prefixes[old] + name.removeprefix(old)


class Architecture(NamedTuple):
    """One kind of base."""

    stands_for: str
    """Public models of this kind."""
    config: Callable[[], Any]
    model_class: str | None = None
    """Of transformers, in which the public files are saved; None for the causal language model of the configuration."""
    language_model: Callable[[], Any] | None = None
    """Configuration of the language model that is saved alone, under `prefix`, where the whole cannot be built here."""
    prefix: str = ""
    public_prefixes: Mapping[str, str] = {}
    """Beginnings of names as transformers saves them, and as the public files have them."""

    def save(self, folder: Path, *, seed: int = 0) -> None:
        """Write a random base of this kind as it would be published."""
        torch.manual_seed(seed)
        config = (self.language_model or self.config)()
        model = getattr(hf, self.model_class)(config) if self.model_class else hf.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # scales that begin at 0 would keep whole branches silent
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.1)
        model.save_pretrained(folder)
        if self.language_model is not None:
            self.config().save_pretrained(folder)
        renamed = {**self.public_prefixes, **({"model.": self.prefix} if self.prefix else {})}
        if renamed:
            path = folder / "model.safetensors"
            save_file({_renamed(name, renamed): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


ARCHITECTURES: dict[str, Architecture] = {
    # ------------------------------------------------------------ dense
    "llama": Architecture("Llama-2, TinyLlama, Vicuna, Yi", lambda: hf.LlamaConfig(**COMMON)),
    "llama3": Architecture("Llama-3, 3.1, DeepSeek-R1-Distill", lambda: hf.LlamaConfig(**GROUPED, **LLAMA3_ROPE)),
    "llama3.2": Architecture("Llama-3.2 1B/3B, SmolLM2", lambda: hf.LlamaConfig(**GROUPED | TIED, **LLAMA3_ROPE)),
    "mistral": Architecture("Mistral-7B, Nemo, Zephyr", lambda: hf.MistralConfig(**GROUPED, **SLIDING)),
    "ministral": Architecture("Ministral-8B", lambda: hf.MinistralConfig(**HEADS_OF_16, **ALTERNATING)),
    "ministral3": Architecture("Ministral-3, text", lambda: hf.Ministral3Config(**HEADS_OF_16)),
    "qwen2": Architecture("Qwen2, Qwen2.5 7B", lambda: hf.Qwen2Config(**GROUPED)),
    "qwen2.5": Architecture("Qwen2.5 0.5B to 3B", lambda: hf.Qwen2Config(**GROUPED | TIED)),
    "qwen3": Architecture("Qwen3 dense", lambda: hf.Qwen3Config(**HEADS_OF_16 | TIED)),
    "qwen3.5": Architecture("Qwen3.5, text", lambda: hf.Qwen3_5TextConfig(**HEADS_OF_16, **LINEAR)),
    "gemma": Architecture("Gemma", lambda: hf.GemmaConfig(**HEADS_OF_16 | TIED)),
    "gemma2": Architecture(
        "Gemma-2", lambda: hf.Gemma2Config(**GEMMA, **SLIDING, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    ),
    "gemma3": Architecture("Gemma-3 270M, 1B", lambda: hf.Gemma3TextConfig(**GEMMA, **ALTERNATING)),
    "gemma3n": Architecture(
        "Gemma-3n, text",
        lambda: hf.Gemma3nTextConfig(
            **HEADS_OF_16 | TIED, **ALTERNATING, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8,
            laurel_rank=8, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0],
        ),
    ),
    "gemma4": Architecture(
        "Gemma-4, text",
        lambda: hf.Gemma4TextConfig(
            **HEADS_OF_16 | TIED, **ALTERNATING, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8
        ),
    ),
    "vaultgemma": Architecture("VaultGemma", lambda: hf.VaultGemmaConfig(**GEMMA, **ALTERNATING)),
    "phi": Architecture("Phi-1.5, Phi-2", lambda: hf.PhiConfig(**COMMON)),
    "phi3": Architecture("Phi-3, Phi-3.5", lambda: hf.Phi3Config(**COMMON, **SLIDING)),
    "phi4": Architecture("Phi-4, Phi-4-mini", lambda: hf.Phi3Config(**GROUPED | TIED)),
    "smollm3": Architecture("SmolLM3", lambda: hf.SmolLM3Config(**GROUPED | TIED, no_rope_layers=[1, 0])),
    "granite": Architecture(
        "Granite 3",
        lambda: hf.GraniteConfig(
            **GROUPED | TIED, logits_scaling=4.0, attention_multiplier=0.2, residual_multiplier=0.5, embedding_multiplier=2.0
        ),
    ),
    "falcon": Architecture(
        "Falcon-7B",
        lambda: hf.FalconConfig(
            **_without(COMMON, "intermediate_size", "max_position_embeddings"), multi_query=True, alibi=False, bias=False
        ),
    ),
    "falcon3": Architecture("Falcon3", lambda: hf.LlamaConfig(**HEADS_OF_16)),
    "gpt2": Architecture("GPT-2", lambda: hf.GPT2Config(**GPT2)),
    "gpt-neox": Architecture("Pythia, Dolly", lambda: hf.GPTNeoXConfig(**COMMON)),
    "gpt-j": Architecture("GPT-J", lambda: hf.GPTJConfig(**GPT2 | {"tie_word_embeddings": False}, rotary_dim=8)),
    "gpt-neo": Architecture(
        "GPT-Neo",
        lambda: hf.GPTNeoConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            max_position_embeddings=512, window_size=32, initializer_range=0.15, **TOKENS,
        ),
    ),
    "gpt-bigcode": Architecture("StarCoder, SantaCoder", lambda: hf.GPTBigCodeConfig(**GPT2, multi_query=True)),
    "starcoder2": Architecture("StarCoder2", lambda: hf.Starcoder2Config(**GROUPED | TIED, **SLIDING)),
    "opt": Architecture(
        "OPT",
        lambda: hf.OPTConfig(
            **_without(COMMON, "intermediate_size", "initializer_range", "tie_word_embeddings"),
            ffn_dim=96, init_std=0.15, word_embed_proj_dim=64,
        ),
    ),
    "bloom": Architecture(
        "BLOOM",
        lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.15, **TOKENS),
    ),
    "mpt": Architecture(
        "MPT-7B", lambda: hf.MptConfig(vocab_size=VOCABULARY, d_model=64, n_layers=2, n_heads=4, max_seq_len=512, **TOKENS)
    ),
    "stablelm": Architecture("StableLM 2", lambda: hf.StableLmConfig(**GROUPED)),
    "olmo": Architecture("OLMo", lambda: hf.OlmoConfig(**COMMON)),
    "olmo2": Architecture("OLMo-2, Tülu 3", lambda: hf.Olmo2Config(**GROUPED)),
    "olmo3": Architecture("OLMo-3", lambda: hf.Olmo3Config(**GROUPED, **ALTERNATING)),
    "cohere": Architecture("Command-R, Aya-23", lambda: hf.CohereConfig(**GROUPED | TIED, logit_scale=0.25)),
    "cohere2": Architecture("Command-R7B", lambda: hf.Cohere2Config(**HEADS_OF_16 | TIED, **ALTERNATING, logit_scale=0.25)),
    "glm": Architecture("GLM-4-9B", lambda: hf.GlmConfig(**HEADS_OF_16)),
    "glm4": Architecture("GLM-4-0414", lambda: hf.Glm4Config(**HEADS_OF_16)),
    "ernie4.5": Architecture("ERNIE-4.5 0.3B", lambda: hf.Ernie4_5Config(**HEADS_OF_16 | TIED)),
    "exaone4": Architecture("EXAONE-4", lambda: hf.Exaone4Config(**GROUPED, **ALTERNATING)),
    "nemotron": Architecture("Minitron, Nemotron-4", lambda: hf.NemotronConfig(**HEADS_OF_16)),
    "seed-oss": Architecture("Seed-OSS", lambda: hf.SeedOssConfig(**HEADS_OF_16)),
    "hunyuan": Architecture("Hunyuan dense", lambda: hf.HunYuanDenseV1Config(**HEADS_OF_16 | TIED)),
    "arcee": Architecture("AFM-4.5B", lambda: hf.ArceeConfig(**GROUPED)),
    "apertus": Architecture("Apertus", lambda: hf.ApertusConfig(**GROUPED)),
    "bitnet": Architecture("BitNet b1.58, bf16", lambda: hf.BitNetConfig(**GROUPED | TIED)),
    "helium": Architecture("Helium", lambda: hf.HeliumConfig(**HEADS_OF_16)),
    "persimmon": Architecture("Persimmon", lambda: hf.PersimmonConfig(**COMMON)),
    "jais2": Architecture("Jais-2", lambda: hf.Jais2Config(**HEADS_OF_16)),
    # ------------------------------------------------------------ experts
    "qwen2-moe": Architecture(
        "Qwen1.5-MoE, Qwen2-57B-A14B",
        lambda: hf.Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=32, decoder_sparse_step=1),
    ),
    "qwen3-moe": Architecture("Qwen3-30B-A3B", lambda: hf.Qwen3MoeConfig(**HEADS_OF_16, **EXPERTS)),
    "qwen3-next": Architecture(
        "Qwen3-Next-80B-A3B", lambda: hf.Qwen3NextConfig(**HEADS_OF_16, **EXPERTS, **LINEAR, shared_expert_intermediate_size=32)
    ),
    "qwen3.5-moe": Architecture(
        "Qwen3.5-35B-A3B, text",
        lambda: hf.Qwen3_5MoeTextConfig(**HEADS_OF_16, **EXPERTS, **LINEAR, shared_expert_intermediate_size=32),
    ),
    "mixtral": Architecture("Mixtral", lambda: hf.MixtralConfig(**GROUPED, **LOCAL)),
    "olmoe": Architecture("OLMoE", lambda: hf.OlmoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2)),
    "phimoe": Architecture("Phi-3.5-MoE", lambda: hf.PhimoeConfig(**GROUPED, **LOCAL)),
    "gpt-oss": Architecture(
        "gpt-oss",
        lambda: hf.GptOssConfig(
            **HEADS_OF_16, **ALTERNATING, **LOCAL, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
        ),
    ),
    "granitemoe": Architecture("Granite-3 MoE", lambda: hf.GraniteMoeConfig(**GROUPED | TIED, **LOCAL)),
    "deepseek-v2": Architecture(
        "DeepSeek-V2-Lite", lambda: hf.DeepseekV2Config(**COMMON, **ROUTED, **LATENT, first_k_dense_replace=1)
    ),
    "deepseek-v3": Architecture(
        "DeepSeek-V3, Moonlight",
        lambda: hf.DeepseekV3Config(
            **COMMON, **ROUTED, **LATENT, num_key_value_heads=4, n_group=1, topk_group=1, first_k_dense_replace=1
        ),
    ),
    "glm4-moe": Architecture("GLM-4.5-Air", lambda: hf.Glm4MoeConfig(**HEADS_OF_16, **ROUTED, first_k_dense_replace=1)),
    "ernie4.5-moe": Architecture(
        "ERNIE-4.5-21B-A3B",
        lambda: hf.Ernie4_5_MoeConfig(
            **GROUPED | TIED, moe_num_experts=4, moe_k=2, moe_intermediate_size=32, moe_num_shared_experts=1
        ),
    ),
    "dots1": Architecture("dots.llm1", lambda: hf.Dots1Config(**HEADS_OF_16, **ROUTED, first_k_dense_replace=1)),
    "minimax": Architecture(
        "MiniMax-Text-01",
        lambda: hf.MiniMaxConfig(**HEADS_OF_16, **LOCAL, layer_types=["linear_attention", "full_attention"], block_size=16),
    ),
    "minimax-m2": Architecture("MiniMax-M2", lambda: hf.MiniMaxM2Config(**HEADS_OF_16, **LOCAL)),
    "hunyuan-moe": Architecture(
        "Hunyuan-A13B", lambda: hf.HunYuanMoEV1Config(**HEADS_OF_16 | TIED, num_experts=4, moe_topk=2)
    ),
    # ------------------------------------------------------------ state spaces and hybrids
    "mamba": Architecture("Mamba", lambda: hf.MambaConfig(**MAMBA)),
    "mamba2": Architecture(
        "Mamba-2, Codestral-Mamba", lambda: hf.Mamba2Config(**MAMBA, num_heads=8, head_dim=16, n_groups=1, chunk_size=16)
    ),
    "falcon-mamba": Architecture("Falcon-Mamba", lambda: hf.FalconMambaConfig(**MAMBA)),
    "falcon-h1": Architecture(
        "Falcon-H1", lambda: hf.FalconH1Config(**HEADS_OF_16 | {"initializer_range": 0.05}, **HYBRID_MAMBA, mamba_d_ssm=128)
    ),
    "zamba2": Architecture(
        "Zamba2",
        lambda: hf.Zamba2Config(
            **COMMON | TIED, layers_block_type=["mamba", "hybrid"], mamba_d_state=8, n_mamba_heads=8, chunk_size=16,
            num_key_value_heads=4, use_mamba_kernels=False, adapter_rank=8,
        ),
    ),
    "bamba": Architecture("Bamba", lambda: hf.BambaConfig(**GROUPED, **HYBRID_MAMBA, attn_layer_indices=[1])),
    "jamba": Architecture(
        "Jamba",
        lambda: hf.JambaConfig(
            **GROUPED, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4,
            num_experts_per_tok=2, mamba_d_state=8, mamba_dt_rank=8, use_mamba_kernels=False,
        ),
    ),
    "granite4": Architecture(
        "Granite-4 hybrid",
        lambda: hf.GraniteMoeHybridConfig(
            **GROUPED | TIED, **LOCAL, **HYBRID_MAMBA, layer_types=["mamba", "attention"], shared_intermediate_size=32
        ),
    ),
    "nemotron-h": Architecture(
        "Nemotron-H, Nemotron Nano 2 and 3",
        lambda: hf.NemotronHConfig(
            **HEADS_OF_16 | {"num_hidden_layers": 4}, layers_block_type=["mamba", "attention", "mlp", "moe"], ssm_state_size=8,
            mamba_num_heads=8, mamba_head_dim=16, n_groups=1, chunk_size=16, **ROUTED, moe_shared_expert_intermediate_size=32,
            use_mamba_kernels=False,
        ),
    ),
    "recurrent-gemma": Architecture(
        "RecurrentGemma",
        lambda: hf.RecurrentGemmaConfig(
            **_without(GROUPED, "initializer_range", "max_position_embeddings") | TIED, block_types=["recurrent", "attention"],
            attention_window_size=32, lru_width=64,
        ),
    ),
    "lfm2": Architecture("LFM2", lambda: hf.Lfm2Config(**GROUPED | TIED, layer_types=["conv", "full_attention"])),
    "lfm2-moe": Architecture(
        "LFM2-8B-A1B",
        lambda: hf.Lfm2MoeConfig(**GROUPED | TIED, **EXPERTS, layer_types=["conv", "full_attention"], num_dense_layers=1),
    ),
    "rwkv": Architecture(
        "RWKV-4",
        lambda: hf.RwkvConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, context_length=512, **TOKENS),
    ),
    # ------------------------------------------------------------ wrappers
    "gemma3-4b": Architecture(
        "Gemma-3 4B to 27B",
        lambda: hf.Gemma3Config(text_config=GEMMA | ALTERNATING, vision_config=SIGLIP, mm_tokens_per_image=4),
        "Gemma3ForConditionalGeneration",
        public_prefixes={"vision_tower.": "vision_tower.vision_model."},
    ),
    "gemma3n-e2b": Architecture(
        "Gemma-3n E2B, E4B",
        lambda: hf.Gemma3nConfig(text_config=ARCHITECTURES["gemma3n"].config().to_dict()),
        language_model=lambda: ARCHITECTURES["gemma3n"].config(),
        prefix="model.language_model.",
    ),
    "gemma4-e2b": Architecture(
        "Gemma-4 E2B to 31B",
        lambda: hf.Gemma4Config(
            text_config=ARCHITECTURES["gemma4"].config().to_dict(),
            vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                           "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64},
        ),
        "Gemma4ForConditionalGeneration",
    ),
    "llama4": Architecture(
        "Llama-4 Scout",
        lambda: hf.Llama4Config(
            text_config=HEADS_OF_16 | LOCAL | {
                "attention_chunk_size": 32, "intermediate_size_mlp": 96, "no_rope_layers": [1, 0], "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 2,
            },
            vision_config={"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                           "image_size": 28, "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32,
                           "projector_output_dim": 32},
        ),
        "Llama4ForConditionalGeneration",
    ),
    "mllama": Architecture(
        "Llama-3.2 Vision",
        lambda: hf.MllamaConfig(
            text_config=GROUPED | {"num_hidden_layers": 3, "cross_attention_layers": [1]} | LLAMA3_ROPE,
            vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
                           "attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 64,
                           "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1},
        ),
        "MllamaForConditionalGeneration",
    ),
    "qwen3.5-vl": Architecture(
        "Qwen3.5 as published",
        lambda: hf.Qwen3_5Config(
            text_config=HEADS_OF_16 | LINEAR | {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0,
                                    "mrope_section": [2, 3, 3], "mrope_interleaved": True}
            },
            vision_config=QWEN_VISION,
        ),
        "Qwen3_5ForConditionalGeneration",
    ),
    "qwen3.5-moe-vl": Architecture(
        "Qwen3.5-35B-A3B as published",
        lambda: hf.Qwen3_5MoeConfig(
            text_config=HEADS_OF_16 | LINEAR | EXPERTS | {
                "shared_expert_intermediate_size": 32,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0,
                                    "mrope_section": [2, 3, 3], "mrope_interleaved": True},
            },
            vision_config=QWEN_VISION,
        ),
        "Qwen3_5MoeForConditionalGeneration",
    ),
    "qwen2-vl": Architecture(
        "Qwen2-VL",
        lambda: hf.Qwen2VLConfig(
            text_config=GROUPED | SECTIONS,
            vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2},
        ),
        "Qwen2VLForConditionalGeneration",
    ),
    "qwen2.5-vl": Architecture(
        "Qwen2.5-VL",
        lambda: hf.Qwen2_5_VLConfig(text_config=GROUPED | SECTIONS, vision_config=QWEN_VISION | {"fullatt_block_indexes": [1]}),
        "Qwen2_5_VLForConditionalGeneration",
    ),
    "qwen3-vl": Architecture(
        "Qwen3-VL",
        lambda: hf.Qwen3VLConfig(
            text_config=HEADS_OF_16 | SECTIONS, vision_config=QWEN_VISION | {"deepstack_visual_indexes": [0]}
        ),
        "Qwen3VLForConditionalGeneration",
    ),
    "mistral3": Architecture(
        "Mistral Small 3.1, 3.2",
        lambda: hf.Mistral3Config(
            tie_word_embeddings=False,
            text_config=HEADS_OF_16 | {"model_type": "mistral"}, vision_config=PIXTRAL | {"model_type": "pixtral"}
        ),
        "Mistral3ForConditionalGeneration",
    ),
    "ministral3-vl": Architecture(
        "Ministral-3 as published",
        lambda: hf.Mistral3Config(
            tie_word_embeddings=False,
            text_config=HEADS_OF_16 | {"model_type": "ministral3"}, vision_config=PIXTRAL | {"model_type": "pixtral"}
        ),
        "Mistral3ForConditionalGeneration",
    ),
    "llava": Architecture(
        "LLaVA-1.5",
        lambda: hf.LlavaConfig(
            text_config=COMMON | {"model_type": "llama"},
            vision_config=SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 32},
        ),
        "LlavaForConditionalGeneration",
        public_prefixes={"vision_tower.": "vision_tower.vision_model."},
    ),
    "phi4-multimodal": Architecture(
        "Phi-4-multimodal",
        lambda: hf.Phi4MultimodalConfig(
            **GROUPED, original_max_position_embeddings=512,
            vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                           "image_size": 28, "crop_size": 28, "patch_size": 14},
            audio_config={"hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 2,
                          "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32,
                          "input_size": 16},
        ),
    ),
}  # fmt: skip

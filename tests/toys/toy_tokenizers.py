"""Tokenizers built from bytes, small enough that expected ids are written by hand."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# as Qwen3 writes an answer without thoughts: an empty think block that the generation prompt does not have
THINK_IN_ANSWERS = CHATML.replace(
    "m['content'] +", "('<think>\\n\\n</think>\\n\\n' if loop.last and m['role'] == 'assistant' else '') + m['content'] +"
)
# as DeepSeek-R1: the generation prompt opens a think block that rendered answers do not have
THINK_IN_GENERATION_PROMPT = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")


def build_tokenizer(
    *, template: str | None = None, bos: str | None = None, eos: str | None = "<e>", merges: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerFast:
    """One token a byte, plus merges; `bos` is added by the tokenizer itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = {"bos_token": bos, "eos_token": eos} if bos else {"eos_token": eos}
    chat = ["<|im_start|>", "<|im_end|>"] if template else []
    tokenizer.add_special_tokens([token for token in (bos, eos, *chat) if token])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=chat, **specials)
    wrapped.chat_template = template
    return wrapped

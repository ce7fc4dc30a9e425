"""Chat templates in the styles of published models, and chats as servers meet them."""

import random
from typing import Any

from toy_tokenizers import build_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}" + CHATML
)
QWEN_3 = (
    "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m.content %}{% if m.role == 'assistant' and loop.index0 < last.user %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') if '</think>' in text else text %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_3_DATED = (
    "{{ bos_token }}{% set told = messages[0].content if messages[0].role == 'system' else '' %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n{{ told }}<|eot_id|>"
    "{% for m in (messages[1:] if messages[0].role == 'system' else messages) %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] if loop.first and system else m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text + ' [/INST]' }}"
    "{% else %}{{ ' ' + text + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA_3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set start = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set start = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ start if loop.first }}{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_3 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %}"
    "{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
DIALOGUE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '\n\nHuman: ' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '\n\nAssistant: ' + m.content + (eos_token if loop.last else '') }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
HOSTILE = ZEPHYR.replace("'<|'", '\'{{ """ }}\u3000\U0001f600 {\'').replace("'|>\n'", "'{\\n- '")
"""With everything that a Go template or a Modelfile would read otherwise."""

STYLES = {
    "chatml": CHATML,
    "qwen": QWEN,
    "qwen3": QWEN_3,
    "llama3": LLAMA_3,
    "llama3-dated": LLAMA_3_DATED,
    "llama2": LLAMA_2,
    "gemma3": GEMMA_3,
    "mistral": MISTRAL,
    "mistral3": MISTRAL_3,
    "zephyr": ZEPHYR,
    "dialogue": DIALOGUE,
    "hostile": HOSTILE,
}

CONTENTS = (
    "",
    " a \n",
    "Hi {there}",
    "Hello!\n\n- one",
    '{{ .Role }} """ \\',
    "<think>\nHm.\n</think>\n\nB.",
    "日本語 🚀\u3000\u200b",
)


def random_chats(count: int) -> list[list[dict[str, str]]]:
    """Return chats of one to six messages of any role in any order, always the same ones."""
    draw = random.Random(0)
    roles = ("system", "user", "user", "assistant", "assistant", "tool")
    return [
        [{"role": draw.choice(roles), "content": draw.choice(CONTENTS)} for _ in range(draw.randint(1, 6))]
        for _ in range(count)
    ]


def styled(style: str) -> Any:
    """Return a tokenizer with a chat template of a style; it adds BOS to a text."""
    return build_tokenizer(template=STYLES[style], bos="<s>", eos="</s>")

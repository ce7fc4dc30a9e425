"""Chat templates that came with a download: whatever they do, they end soon, and write what transformers writes."""

import resource
import time
from typing import Any

import chat_templates
import pytest
from toy_tokenizers import CHATML, build_tokenizer

from pe_dpo.data import sandbox
from pe_dpo.data.sandbox import LONGEST_SOURCE, apply_chat_template
from pe_dpo.data.template import Template
from pe_dpo.errors import DataError
from pe_dpo.recipe import DataSection

MANY = "{% for a in range(99999) %}"
DOUBLE = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = DOUBLED %}{% endfor %}{{ n.x }}"
COSTLY = {
    "loops in loops": f"{MANY}{MANY}{{% endfor %}}{{% endfor %}}",
    "a loop in which nothing is left": f"{MANY}{{% for b in range(99999) if false %}}{{% endfor %}}{{% endfor %}}",
    "a long range": "{% for i in range(1000000000) %}{% endfor %}",
    "a multiplied text": "{{ 'a' * 500000000 }}",
    "a multiplied text twice": "{{ 9999 * ('a'|safe * 99999) }}",
    "a power": "{% set x = 9999999 %}{{ x ** x }}",
    "a growing number": "{% set n = namespace(x=7) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "added": DOUBLE.replace("DOUBLED", "n.x + n.x"),
    "joined": DOUBLE.replace("DOUBLED", "n.x ~ n.x"),
    "formatted": DOUBLE.replace("DOUBLED", "'{}{}'.format(n.x, n.x)"),
    "a list within itself": DOUBLE.replace("DOUBLED", "[n.x, n.x, n.x]"),
    "a list as JSON": DOUBLE.replace("DOUBLED", "[n.x, n.x]").replace("{{ n.x }}", "{{ n.x | tojson }}"),
    "a namespace within itself": "{% set n = namespace() %}{% set n.x = [n, n] %}{{ n }}",
    "a macro that calls itself": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a recursive loop": "{% for x in range(9) recursive %}{% if loop.depth < 40 %}{{ loop(range(9)) }}{% endif %}{% endfor %}",
    "a text in a loop": MANY + "x" * 50_000 + "{% endfor %}",
    "a macro's text in a loop": "{% macro m() %}" + "x" * 50_000 + "{% endmacro %}" + MANY + "{{ m() }}{% endfor %}",
    "a width": "{{ '%2000000000d' % 1 }}",
    "a width from elsewhere": "{{ '%*d' % (2000000000, 1) }}",
    "a width of format": "{{ '{:{}}'.format(1, 2000000000) }}",
    "a width of a filter": "{{ '%2000000000d' | format(1) }}",
    "center": "{{ 'a' | center(2000000000) }}",
    "ljust": "{{ 'a'.ljust(2000000000) }}",
    "join": "{{ range(99999) | join('a' * 99999) }}",
    "join of an iterator": "{{ (range(99999) | map('string')) | join('a' * 99999) }}",
    "replace": "{{ ('a' * 9999).replace('a', 'b' * 99999) }}",
    "indent": "{{ ('\n' * 99999) | indent(99999) }}",
    "round": "{{ 1 | round(1000000000, 'ceil') }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "lipsum": "{{ lipsum(100000) }}",
    "one hash": "{{ dict.fromkeys(range(0, 2305843009213693951 * 50000, 2305843009213693951)) }}",
    "tags": "{{ ('<!-- -->' * 200000) | striptags }}",
    "comparisons": f"{{% set x, y = 'a' * 999999, 'a' * 999999 %}}{MANY}{{% if x == y %}}{{% endif %}}{{% endfor %}}",
    "searches": f"{{% set x = 'a' * 999999 %}}{MANY}{{% if 'b' in x %}}{{% endif %}}{{% endfor %}}",
    "slices": f"{{% set x = 'a' * 999999 %}}{MANY}{{% set y = x[1:] %}}{{% endfor %}}",
    "split": MANY + "{% set x = ('a b ' * 99999).split() %}{% endfor %}",
    "sum": "{{ ([[0] * 999] * 9999) | sum(start=[]) | length }}",
    "sort": MANY + "{% set x = range(99999) | sort %}{% endfor %}",
}  # fmt: skip
CHAT = [{"role": "user", "content": "hi"}]


def tokenizer_of(template: str) -> Any:
    tokenizer = build_tokenizer(template=template, eos="<|im_end|>")
    tokenizer.name_or_path = "owner/base"
    return tokenizer


@pytest.mark.parametrize("name", COSTLY)
def test_a_template_that_would_not_end_or_fill_memory_is_stopped_by_name(name: str, monkeypatch: Any) -> None:
    """With a tenth of the allowance, of which time and memory are a tenth, too."""
    monkeypatch.setattr(sandbox, "ALLOWANCE", sandbox.ALLOWANCE // 10)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(DataError, match=r"chat template of owner/base was stopped: it takes more time or memory") as error:
        apply_chat_template(tokenizer_of(COSTLY[name]), CHAT)
    assert "\n" not in str(error.value)
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_a_costly_template_stops_a_run_before_its_first_row() -> None:
    """It is no fault of a row, which would be one of a million."""
    with pytest.raises(DataError, match="was stopped"):
        Template(tokenizer_of(COSTLY["a multiplied text"]), DataSection(train="-", template="chat"))


@pytest.mark.parametrize("source", [
    "{{ 1 }}" * LONGEST_SOURCE,
    "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
    "{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__ }}",
    "{% include 'x' %}",
    "{{ raise_exception('a' * 1000000) }}",
    "{{ 1 // 0 }}",
])  # fmt: skip
def test_whatever_else_a_template_does_wrong_is_one_short_line(source: str) -> None:
    """Template() tries it on probes, so the error comes either from there or from the row."""
    with pytest.raises(Exception, match=r"is refused by the chat template|has 700,000 characters") as error:
        Template(tokenizer_of(source), DataSection(train="-", template="chat")).render(CHAT)
    assert type(error.value).__name__ in ("RowError", "DataError") and len(str(error.value)) < 450


EVERYTHING = (
    "{% set ns = namespace(n=0, t='') %}{% for m in messages recursive %}{% set ns.n = ns.n + loop.index %}"
    "{% set ns.t = ns.t ~ m.role ~ loop.length ~ (loop.last or '') %}{{ m.content | trim | upper | replace('A', 'b') }}"
    "{{ loop.previtem.role if loop.previtem is defined }}{{ loop.cycle('a', 'b') }}{% else %}none{% endfor %}"
    "{{ 'a' + 'b' * 2 + '%s-%03d' % ('x', 7) }}{{ 7 // 2 ** 2 - 1.5 + 2 }}{{ [1] + [2] }}{{ ('a', 'b') | join('-') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | tojson(indent=2) }}"
    "{{ messages[1:] | length }}{{ messages[::-1][0].role }}{{ 1 < 2 < 3 }}{{ 'a' in 'abc' and 'z' not in ['a'] }}"
    "{% macro m(x, y=1) %}<{{ x }}{{ y }}{{ caller() if caller }}>{% endmacro %}{{ m('p') }}{% call m('q', 2) %}in{% endcall %}"
    "{% set block %}A{{ ns.n }}B{% endset %}{{ block }}{% filter upper %}abc{% endfilter %}{% block b %}blk{% endblock %}"
    "{{ '{:>5}|{!r}|{0}'.format('a', 'b') if false else '{:>5}|{!r}'.format('a', 'b') }}{{ 'a,b'.split(',') }}{{ none }}"
    "{{ dict(a=1).items() | list }}{{ {'k': [1, {'z': 'ü\n'}]} | tojson }}{{ {'k': 'v'} }}{{ undefined_name }}"
    "{{ range(3) | sum }}{{ [3, 1, 2] | sort | first }}{{ 'abc' | list }}{{ [1, 2, 3] | batch(2) | list }}{{ 2.50 | round(1) }}"
    "{% generation %}{{ 'gen' }}{% endgeneration %}{{ messages | groupby('role') | length }}{{ strftime_now('%%') }}"
    "{%- for k, v in {'a': 1}.items() if v %}{{ k }}{% if loop.first %}{% continue %}{% endif %}{% break %}{% endfor %}\n"
)


def test_what_it_writes_is_what_transformers_writes() -> None:
    styles = [source for name, source in vars(chat_templates).items() if name.isupper() and isinstance(source, str)]
    turns = [
        {"role": role, "content": f" {word} \n<b>ä"} for role, word in zip(("user", "assistant") * 3, "abcdef", strict=True)
    ]
    written = set()
    for source in [EVERYTHING, CHATML, *styles]:
        tokenizer = tokenizer_of(source)
        options = {"bos_token": "<s>", "add_generation_prompt": True}
        expected = tokenizer.apply_chat_template(turns, tokenize=False, **options)
        assert apply_chat_template(tokenizer, turns, **options) == expected
        written.add(expected)
    assert len(written) >= 10


def test_a_long_chat_is_written_whatever_it_costs() -> None:
    turns = [{"role": "user", "content": "long " * 400_000}] * 20
    assert len(apply_chat_template(tokenizer_of(CHATML), turns)) > 40_000_000

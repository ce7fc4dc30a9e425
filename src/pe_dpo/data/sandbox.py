"""Chat templates, which are programs that came with a download, run within bounds of time, memory and output.

transformers runs them in Jinja's sandbox, out of which they cannot reach; but nothing there ends `{% for i in range(99999) %}`
in itself, or keeps `'a' * 10**9` out of memory. Here each rendering has an allowance, of which everything that a template does
takes its part beforehand: a character of text that it makes costs 1, an operation `STEP`. It is counted, not timed, so that
the same template is stopped at the same place on every machine.

The templates are compiled in a copy of transformers' own environment, so what they write is what transformers writes.
"""

import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Environment, TemplateError, nodes, pass_context
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from pe_dpo.errors import DataError

ALLOWANCE = 20_000_000
"""What one rendering may cost, and `PER_CHARACTER` more for each character of what it is given. Templates in the styles of 11
published ones took 1,500 for two messages and half a million for 400; one that takes all of it runs for a second or two."""
PER_CHARACTER = 200
STEP = 30
"""What an operation costs: a round of a loop, a call, a filter, a text that is written."""
LONGEST_SOURCE = 100_000
"""Characters of a template; the longest published ones have 30,000. One of this length is compiled in two seconds."""
MOST_BITS = 65_536
"""Of a number: Python's time for the product of longer ones grows faster than their length."""

TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError,
                   RuntimeError, SyntaxError, TypeError, ValueError)  # fmt: skip
"""What a template may raise: it is a program, and Jinja makes Python of it."""

_PIECE = 64
"""Bytes of memory that a short text takes, whatever its length."""
_LAZY = {"map", "select", "reject", "selectattr", "rejectattr"}
"""Filters that give an iterator."""
_WHOLE = {"join", "list", "sort", "unique", "groupby", "sum", "min", "max", "batch", "slice"}
"""Filters that take all items of one."""
_FREE = {"default", "d", "length", "count", "first", "last", "attr", "random"}
_COSTS: dict[str, Callable[[int, int, int], int]] = {
    "join": lambda size, length, more: size + length * (more + 1),
    "round": lambda size, length, more: size + 1000 * more,
    "sum": lambda size, length, more: size + (size * length if more else 0),  # of lists, each of which is copied again
    "list": lambda size, length, more: _PIECE * size,
    "unique": lambda size, length, more: size + length**2 // 100,  # numbers may all have one hash
    **dict.fromkeys(("tojson", "indent"), lambda size, length, more: size * (1 + more)),
    **dict.fromkeys(("urlencode", "e", "escape", "forceescape"), lambda size, length, more: 6 * size),
    **dict.fromkeys(("sort", "dictsort", "groupby", "min", "max"), lambda size, length, more: 20 * size + more),
    # whose time may grow with the square of the text
    **dict.fromkeys(("pprint", "urlize", "striptags", "wordwrap", "wordcount", "title", "xmlattr"),
                    lambda size, length, more: size * (1 + more) + size**2 // 100),
}  # fmt: skip
"""What a filter costs, from the size of its value, eight times its items, and the size of its arguments; else the two sizes."""
_COMPARISONS = {
    "eq",
    "ne",
    "lt",
    "gt",
    "le",
    "ge",
    "in",
    "==",
    "!=",
    "<",
    ">",
    "<=",
    ">=",
    "equalto",
    "lessthan",
    "greaterthan",
}
_ITEMS: Any = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))


def apply_chat_template(tokenizer: Any, messages: Sequence[Any], **options: Any) -> str:
    """Return messages as text, as the tokenizer's method of this name does.

    Args:
        tokenizer: A transformers tokenizer, or what stands in for one.
        messages: The chat.
        options: Of the tokenizer's method; arguments of the template among them.

    Raises:
        DataError: The template takes more time or memory than a chat can need.
        Exception: One of `TEMPLATE_ERRORS`, which the template raises.
    """
    if "transformers" not in sys.modules:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    from transformers.utils import chat_template_utils

    def compile_bounded(source: str) -> Any:
        template = _compile(str(source), original)
        environment: Any = template.environment
        environment.name, environment.left = getattr(tokenizer, "name_or_path", "") or "", ALLOWANCE
        environment.given = [messages, options]
        return template

    with _one_at_a_time:
        original = chat_template_utils._compile_jinja_template
        chat_template_utils._compile_jinja_template = compile_bounded
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
        finally:
            chat_template_utils._compile_jinja_template = original


_one_at_a_time = threading.RLock()


@lru_cache(maxsize=64)
def _compile(source: str, original: Callable[[str], Any]) -> Any:
    return _environment(original).from_string(source)


@lru_cache(maxsize=1)
def _environment(original: Callable[[str], Any]) -> "BoundedEnvironment":
    return BoundedEnvironment(original("").environment)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Another environment's extensions, filters, tests and globals, each of which takes its part of an allowance.

    Attributes:
        left: What is left of the allowance of this rendering.
        given: The messages and arguments, until they are weighed, which is when the allowance without them is spent.
        name: The tokenizer's, for messages.
    """

    intercepted_binops = frozenset(("-", "*", "/", "//", "**", "%"))

    def __init__(self, other: Environment) -> None:
        """Begin with nothing spent.

        Args:
            other: What transformers compiles templates in.
        """
        super().__init__(
            trim_blocks=other.trim_blocks,
            lstrip_blocks=other.lstrip_blocks,
            extensions=[type(extension) for extension in other.extensions.values()],
            optimized=False,  # else constants are computed while the template is compiled
        )
        self.left, self.name = ALLOWANCE, ""
        self.given: list[Any] | None = None
        self.globals.update(other.globals)
        self.tests.update(
            {name: self._bounded_test(test) if name in _COMPARISONS else test for name, test in other.tests.items()}
        )
        self.filters.update({name: self._bounded_filter(name, one) for name, one in other.filters.items()})
        # What `compile` puts into a template are filters, which Jinja calls with the least ado; no template can name these.
        meters = (self.written, self.added, self.weighed, self.sliced, self.bounded, self.begun)
        self.filters.update({f"<{meter.__name__}>": meter for meter in meters})

    def compile(self, source: Any, *args: Any, **options: Any) -> Any:
        """Return a template compiled, in which whatever is done says what it costs before it is done.

        Raises:
            DataError: It is too long to be a chat template.
        """
        if len(source) > LONGEST_SOURCE:
            raise DataError(
                f"the chat template{self._of()} has {len(source):,} characters, and the longest published ones 30,000; "
                "take that of the base's publisher (data.template: file.jinja)"
            )
        return super().compile(_Meters(self).visit(self.parse(source)), *args, **options)

    def spend(self, cost: int) -> None:
        """Take a cost from what is left.

        Raises:
            DataError: There is not as much.
        """
        self.left -= cost
        if self.left < 0 and self.given is not None:
            given, self.given, left = self.given, None, self.left
            self.left = sys.maxsize  # they are weighed whatever they weigh
            self.left = left + PER_CHARACTER * self.weigh(given)
        if self.left < 0:
            raise DataError(
                f"the chat template{self._of()} was stopped: it takes more time or memory than writing a chat can take "
                "(loops in loops, or texts multiplied); take that of the base's publisher (data.template: file.jinja)"
            )

    def _of(self) -> str:
        return f" of {self.name}" if self.name else ""

    def weigh(self, value: Any) -> int:
        """Return how many characters a value has as text, about.

        Raises:
            DataError: More than is left.
        """
        if isinstance(value, str):
            return len(value)
        one: Any
        total, rest = 0, [value]
        while rest:
            one = rest.pop()
            if isinstance(one, str | bytes):
                total += 4 * len(one)  # a character may be written as \x00
            elif isinstance(one, dict):
                total += 24 + 48 * len(one)
                rest += [*one.keys(), *one.values()]
            elif isinstance(one, _ITEMS):
                total += 16 + 16 * len(one)
                rest += one
            elif isinstance(one, range):
                total += 8 * len(one)
            elif isinstance(one, Namespace):
                rest.append(object.__getattribute__(one, "_Namespace__attrs"))
            else:
                total += 24
            if total > self.left:
                self.spend(total)
        return total

    @pass_context  # which keeps Jinja from doing it while it compiles
    def written(self, context: Context, value: Any) -> Any:
        """Return a value that is written into the text."""
        self.spend(STEP + (len(value) if type(value) is str else self.weigh(value)))
        return value

    def added(self, *parts: Any) -> Any:
        """Return the sum of parts, which mostly are texts."""
        if all(type(part) is str for part in parts):
            self.spend(STEP + sum(map(len, parts)))
            return "".join(parts)
        total = parts[0]
        for part in parts[1:]:
            self.spend(STEP + _length(total) + _length(part) + (_bits(total) + _bits(part) > MOST_BITS) * sys.maxsize)
            total = total + part
        return total

    def begun(self, cost: int) -> int:
        """Return what a round or a call costs that has begun."""
        self.spend(STEP + cost)
        return cost

    def weighed(self, value: Any) -> Any:
        """Return a value that is compared or joined with others."""
        self.spend(self.weigh(value))
        return value

    def sliced(self, value: Any) -> Any:
        """Return a value of which a part is copied."""
        self.spend(_length(value))
        return value

    def bounded(self, items: Any, cost: int) -> Any:
        """Return the items of a loop, each of which costs as much and a step."""
        if hasattr(items, "__len__"):
            self.spend(len(items) * (STEP + cost))
            return items

        def count() -> Iterator[Any]:
            for item in items:
                self.spend(STEP + cost)
                yield item

        return count()

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return what an operator gives."""
        bits = _bits(left) * abs(right) if operator == "**" and isinstance(right, int) else _bits(left) + _bits(right)
        self.spend(STEP + (bits > MOST_BITS) * sys.maxsize)
        if operator == "*":
            times = next((abs(one) for one in (left, right) if isinstance(one, int)), 1)
            self.spend(times * max(_length(left), _length(right)))
        elif operator == "%" and isinstance(left, str | bytes):
            self.spend(_percent_cost(self, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Return what a call gives."""
        owner = getattr(obj, "__self__", None)
        if isinstance(obj, Macro):
            self.spend(10 * STEP)
            return super().call(context, obj, *args, **kwargs)
        name = getattr(obj, "__name__", type(obj).__name__)
        if name == "join" and args and not hasattr(args[0], "__len__"):
            args = ([*self.bounded(args[0], 0)], *args[1:])
        self.spend(3 * STEP + self._call_cost(name, owner, [*args, *kwargs.values()]))
        return super().call(context, obj, *args, **kwargs)

    def _call_cost(self, name: str, owner: Any, values: Sequence[Any]) -> int:
        size = _length(owner)
        if name == "replace" and isinstance(owner, str | bytes) and len(values) > 1:
            return size + _replace_cost(owner, *values[:2])
        cost = size + sum(abs(value) if isinstance(value, int) else self.weigh(value) for value in values)
        match name:
            case "expandtabs" | "strftime_now":
                return (1 + size) * (1 + cost) * 100
            case "generate_lorem_ipsum":
                return 10_000 * (1 + cost)
            case "LoopContext":
                return 10 * STEP + cost
            case "join" if values:
                return cost + size * _length(values[0])
            case "translate":
                return (1 + size) * cost
            case "fromkeys" | "TemplateDict":  # numbers may all have one hash
                return cost + (cost // 50) ** 2 // 10
        return cost * (_PIECE if "split" in name else 1)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a text's `format`, if it is that, which takes its part for each value it writes."""
        if super().wrap_str_format(value) is None:
            return None
        text, takes_map = value.__self__, value.__name__ == "format_map"
        formatter: Any = _EscapeFormatter(self, escape=text.escape) if isinstance(text, Markup) else _Formatter(self)

        def write(*args: Any, **kwargs: Any) -> str:
            return type(text)(formatter.vformat(text, () if takes_map else args, args[0] if takes_map else kwargs))

        return write

    def _bounded_test(self, test: Any) -> Callable[..., bool]:
        @wraps(test)
        def run(*args: Any) -> bool:
            self.spend(STEP + sum(map(self.weigh, args)))
            return bool(test(*args))

        return run

    def _bounded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def run(*given: Any, **kwargs: Any) -> Any:
            args = list(given)
            if name in _LAZY | _WHOLE and len(args) > first and not hasattr(args[first], "__len__"):
                args[first] = self.bounded(args[first], 0)
                args[first] = args[first] if name in _LAZY else [*args[first]]
            self.spend(STEP + self._filter_cost(name, [*args[first:], *kwargs.values()]))
            return function(*args, **kwargs)

        return run

    def _filter_cost(self, name: str, values: Sequence[Any]) -> int:
        value, *rest = values or [""]
        if name in _FREE:
            return 0
        if name in _LAZY:
            return STEP * _length(value) + sum(map(self.weigh, rest))
        if name == "replace" and len(rest) > 1:
            return self.weigh(value) + _replace_cost(str(value), *rest[:2])
        if name == "format":
            return _percent_cost(self, value, rest)
        more = sum(abs(one) if isinstance(one, int) else self.weigh(one) for one in rest)
        return _COSTS.get(name, lambda size, length, more: size + more)(self.weigh(value), _length(value), more)


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        environment: Any = self._env
        environment.spend(STEP + environment.weigh(value) + sum(map(int, re.findall(r"\d{1,20}", format_spec))))
        return super().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        environment: Any = self._env
        environment.spend(environment.weigh(value))
        return super().convert_field(value, conversion)


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    pass


class _Meters(NodeTransformer):
    """Puts into a template what says the cost of each thing that it does."""

    def __init__(self, environment: BoundedEnvironment) -> None:
        self.environment = environment

    def meter(self, name: str, value: Any, *more: nodes.Expr) -> nodes.Filter:
        """Return a value that goes through one of the environment's meters."""
        made = nodes.Filter(value, f"<{name}>", list(more), [], None, None)
        made.set_environment(self.environment).set_lineno(value.lineno, override=True)
        return made

    def weighed(self, value: nodes.Expr) -> nodes.Expr:
        """Return a value that is weighed, unless it is a constant or true or false."""
        items = value.items if isinstance(value, nodes.List | nodes.Tuple) else [value]
        is_small = all(isinstance(item, nodes.Const | nodes.Compare | nodes.Test | nodes.Not) for item in items)
        return value if is_small else self.meter("weighed", value)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        is_text = nodes.TemplateData, nodes.Const
        node.nodes = [one if isinstance(one, is_text) else self.meter("written", one) for one in node.nodes]
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        cost = nodes.Const(_cost([*node.body, *filter(None, [node.test])]))
        self.generic_visit(node)
        node.iter = self.meter("bounded", node.iter, cost)
        if node.recursive:
            node.body.insert(0, nodes.ExprStmt(self.meter("begun", cost)))
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        cost = nodes.Const(_cost(node.body))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self.meter("begun", cost)))
        return node

    visit_CallBlock = visit_Block = visit_Macro

    def visit_Add(self, node: nodes.Expr) -> nodes.Node:
        parts = []
        while isinstance(node, nodes.Add):
            parts.append(node.right)
            node = node.left
        first, *rest = map(self.visit, [node, *reversed(parts)])
        return self.meter("added", first, *rest)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = list(map(self.weighed, node.nodes))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        one, other = node.expr, node.ops[0]
        ends_soon = other.op not in ("in", "notin") and nodes.Const in (type(one), type(other.expr))  # at the first difference
        if len(node.ops) > 1 or not ends_soon:
            node.expr = self.weighed(one)
            for operand in node.ops:
                operand.expr = self.weighed(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self.meter("sliced", node.node)
        return node


def _cost(body: Iterable[nodes.Node]) -> int:
    """Return what a part of a template costs each time, whatever is done of it: its text, and a few for each operation."""
    cost = 0
    for node in body:
        for one in (node, *node.find_all(nodes.Node)):
            match one:
                case nodes.TemplateData(data=str() as text) | nodes.Const(value=str() as text):
                    cost += len(text)
                case nodes.Getattr() | nodes.Getitem() | nodes.Call() | nodes.Filter() | nodes.Test() | nodes.NSRef():
                    cost += STEP
                case _:
                    cost += 3
    return cost


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _length(value: Any) -> int:
    """Return the characters of a text, or eight for each item of anything else that has some."""
    if isinstance(value, str | bytes):
        return len(value)
    return 8 * len(value) if hasattr(value, "__len__") else 0


def _replace_cost(text: str | bytes, old: Any, new: Any) -> int:
    if not isinstance(old, type(text)) and not (isinstance(old, str) and isinstance(text, str)):
        return _length(new)
    return (text.count(old) if old else len(text) + 1) * _length(new)  # type: ignore[arg-type]


def _percent_cost(environment: BoundedEnvironment, text: Any, values: Any) -> int:
    """Return what `text % values` costs; a width may stand in the text, or be one of the values."""
    cost = environment.weigh(text) + environment.weigh(values)
    numbers = [int(found) for found in re.findall(r"\d{1,20}", str(text))]
    if "*" in str(text):
        given = values if isinstance(values, tuple | list) else [values]
        numbers += [abs(one) for value in given for one in (value if isinstance(value, tuple | list) else [value])
                    if isinstance(one, int)]  # fmt: skip
    return cost + sum(numbers)

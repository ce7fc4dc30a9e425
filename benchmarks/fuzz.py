"""Damaged and hostile files, made at random: whatever a person hands over ends well or in one line, never in a traceback.

    python -m benchmarks.fuzz --minutes 20 [--seed 1] [--only rows]

Six targets take turns in one process: rows (JSON lines, JSON, CSV, Parquet, gz), recipes, chat templates, heads of safetensors,
adapters, and what lies beside the weights of a base. A case is made of its target, the seed and its number alone, so that
`--only rows --first 1234 --cases 1` makes it again. An error of the package is what is expected; anything else, and a case
of more than 20 CPU s, is a crash, which is printed with its case.
"""

import argparse
import copy
import gzip
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from pe_dpo.data.characters import Characters
from pe_dpo.data.pairs import RowError
from pe_dpo.data.preparation import prepare_pairs
from pe_dpo.data.template import Template
from pe_dpo.errors import PeDpoError
from pe_dpo.model.adapter_config import check_adapter
from pe_dpo.model.adapter_files import AdapterFiles
from pe_dpo.model.base import end_token_ids, inspect_base, load_tokenizer
from pe_dpo.model.tensor_files import TensorFiles
from pe_dpo.model.weight_files import weight_files
from pe_dpo.quickstart.demo import BASE
from pe_dpo.recipe import DataSection
from pe_dpo.recipe.load import recipe_from_yaml, recipe_to_yaml
from pe_dpo.recipe.shipped import FOLDER as RECIPES

SECONDS = 20
"""Of the processor, that a case may take."""
MEMORY = 8_000_000_000
"""Bytes of address space for the whole."""

HOSTILE: list[Any] = [
    *(None, True, 0, -1, 1e308, -0.0, float("nan"), float("inf"), 10**18, 10**400, "", " ", "\n", "\0", "\ud800", "\u202e"),
    *("\x1b[31m", "a" * 5000, "[red]x", "<script>", "../../etc/passwd", "/dev/zero", "~", "*", "**/*", "null", "true", "1e999"),
    *("=1+1", "-2+3"),
    *("{{ x }}", "{% for a in range(9) %}", "Human: a\n\nAssistant: b", "<think>", "[INST]"),
    *('[{"role": "user", "content": 1}]', "{'role': 'user'}", "array([{'role': 'user'}])"),
    *([], {}, [[]], [None], {"": None}, ["a", "b"], [{"role": "user", "content": "a"}], [[1]] * 20, {"a": {"b": {"c": []}}}),
]  # fmt: skip
ROWS: list[Any] = [
    {"prompt": "What?", "chosen": "a", "rejected": "b", "margin": 0.5, "source": "x"},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
    {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "a"}],
     "rejected": [{"role": "assistant", "content": "b"}], "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "a"},
     "rejected": {"from": "gpt", "value": "b"}, "chosen_score": 2, "rejected_score": 1},
    {"instruction": "Say.", "input": "x", "system": "s", "chosen": "a", "rejected": "b", "history": [["a", "b"]]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}], "rejected_response": "b"},
    {"input": {"messages": [{"role": "user", "content": "Hi"}]}, "preferred_output": [{"role": "assistant", "content": "a"}],
     "non_preferred_output": [{"role": "assistant", "content": "b"}]},
    {"prompt": "What?", "response_0": "a", "response_1": "b", "better_response_id": 0},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "",
     "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "content": "1"}],
     "chosen": "a", "rejected": "b"},
]  # fmt: skip
TEMPLATES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}",
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}"
    "{% endif %}{{ m.content | trim }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
    "{% set ns = namespace(x=0) %}{% for m in messages[::-1] %}{% set ns.x = ns.x + 1 %}{{ m | tojson }}{% endfor %}{{ ns.x }}",
    "{% macro f(m) %}{{ m.content }}{% endmacro %}{% for m in messages %}{{ f(m) ~ loop.length }}{% endfor %}{{ tools }}",
)
PIECES = (
    "{{", "}}", "{%", "%}", "{#", "#}", "for a in range(99999)", "endfor", "if", "endif", "set x =", "macro f()", "endmacro",
    "x ~ x", "x + x", "x * x", "x ** 99999", "'a' * 99999999", "% 9999999999", "'%9999999999d'", "| center(99999999)",
    "| join(x)", "| list", "| tojson(indent=99999)", ".format(x)", "'{:99999999}'", "[x, x]", "x[::-1]", "f(f(x))", "(", ")",
    "messages", ".__class__", "| attr('__init__')", "loop(x)", "namespace(x=x)", "| map('upper')", "| batch(99999999)",
    "recursive",
    "| replace('', x)", ".replace('a', 'b' * 9999)", "call", "endcall", "caller()", "generation", "endgeneration", "break",
)  # fmt: skip


STRAY = (b"\0", b"\xff", b'"', b"[" * 2000, b"{", b"\\ud800", b"\r", b"\xef\xbb\xbf", b"9" * 5000)
OF_YAML = (b"&a ", b"*a", b"!!python/object:os.system ", b": ", b"- ", b"|\n", b"? ", b"\t", b"<<: ")


def damaged(random_: random.Random, value: Any) -> Any:
    """Return a JSON value with one to four parts of it replaced, doubled, renamed or removed."""
    value = copy.deepcopy(value)
    for _ in range(random_.randint(1, 4)):
        holder, key = value, None
        while isinstance(holder, dict | list) and holder:
            key = random_.choice(list(holder)) if isinstance(holder, dict) else random_.randrange(len(holder))
            if not isinstance(holder[key], dict | list) or not holder[key] or random_.random() < 0.4:
                break
            holder = holder[key]
        if not isinstance(holder, dict | list) or key is None:
            return random_.choice(HOSTILE)
        match random_.randrange(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[str(random_.choice(HOSTILE))[:50]] = holder.pop(key)
            case 2 if isinstance(holder, list):
                holder.extend(copy.deepcopy(holder) * random_.randint(1, 3))
            case 3:
                holder[key] = [holder[key]]
            case _:
                holder[key] = copy.deepcopy(random_.choice(HOSTILE))
    return value


def torn(random_: random.Random, data: bytes) -> bytes:
    """Return bytes of which some were changed, cut, repeated or put elsewhere."""
    made = bytearray(data)
    for _ in range(random_.randint(1, 6)):
        at, length = random_.randrange(len(made) + 1), random_.choice((1, 1, 2, 4, 8, 64))
        match random_.randrange(6):
            case 0:
                made[at : at + length] = random_.randbytes(length)
            case 1:
                del made[at : at + length]
            case 2:
                made[at:at] = made[at : at + length] * random_.choice((1, 2, 300))
            case 3:
                made[at:at] = random_.choice(STRAY)
            case 4:
                del made[at:]
            case _:
                made[at:at] = random_.choice(OF_YAML)
    return bytes(made)


def as_json(value: Any) -> bytes:
    """Return the JSON of a value, halves of surrogate pairs as escapes."""
    return json.dumps(value, ensure_ascii=True, default=str).encode()


def fuzz_rows(random_: random.Random, folder: Path) -> None:
    """Prepare the pairs of a file of rows."""
    row = random_.choice(ROWS)
    rows = [damaged(random_, row) if random_.random() < 0.6 else row for _ in range(random_.randint(1, 25))]
    suffix = random_.choice((".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".parquet"))
    lines = b"\n".join(map(as_json, rows))
    match suffix:
        case ".jsonl":
            data = lines
        case ".json":
            data = as_json(random_.choice((rows, {"data": rows}, {"train": rows, "test": rows}, damaged(random_, rows))))
        case ".parquet":
            import pyarrow
            from pyarrow import parquet

            try:
                table = pyarrow.Table.from_pylist([row for row in rows if isinstance(row, dict)])
                parquet.write_table(table, folder / "x.parquet")
            except (pyarrow.ArrowException, ValueError, TypeError, OverflowError, UnicodeError):
                return  # no table can be made of these
            data = (folder / "x.parquet").read_bytes()
        case _:
            separator = "," if suffix == ".csv" else "\t"
            cells = [[str(cell) for cell in row.values()] for row in rows if isinstance(row, dict)]
            text = "\n".join(separator.join(f'"{cell}"' for cell in line) for line in [[*row], *cells])
            data = text.encode("utf-8", random_.choice(("replace", "surrogatepass")))
    if random_.random() < 0.4:
        data = torn(random_, data)
    if random_.random() < 0.1 and suffix != ".parquet":
        data, suffix = gzip.compress(data, 1), f"{suffix}.gz"
        data = torn(random_, data) if random_.random() < 0.5 else data
    path = folder / f"x{suffix}"
    path.write_bytes(data)
    settings = DataSection(train=str(path), bad_rows=random_.choice(("error", "drop")), overlong="drop", max_length=64)
    prepare_pairs(settings, tokenizer=Characters())


def fuzz_recipe(random_: random.Random, folder: Path) -> None:
    """Read a recipe, and read again what is written of it."""
    text = random_.choice(sorted(RECIPES.glob("*.yaml"))).read_text(encoding="utf-8")
    if random_.random() < 0.5:
        lines = text.splitlines()
        at = random_.randrange(len(lines))
        key = lines[at].partition(":")[0]
        value = random_.choice(HOSTILE)
        words = (json.dumps(value), str(value), "[" * 3000, "{a: " * 300, "!!binary x", "&a [*a, *a]", '"\\ud800"')
        words = (*words, '"\\U00110000"', "9" * 6000)
        lines[at] = f"{key}: {random_.choice(words)}"
        text = "\n".join(lines)
    data = torn(random_, text.encode("utf-8", "replace")) if random_.random() < 0.5 else text.encode("utf-8", "replace")
    overrides = [random_.choice(("train.epochs", "loss.beta", "data.train", "output", "x.y", ""))
                 + random_.choice(("=", "")) + str(random_.choice(HOSTILE))] * random_.randint(0, 1)  # fmt: skip
    recipe = recipe_from_yaml(data.decode("utf-8", "replace"), "x.yaml", overrides, default_output="runs/x")
    again = recipe_from_yaml(recipe_to_yaml(recipe), "again.yaml")
    assert recipe_to_yaml(again) == recipe_to_yaml(recipe), "what is written reads otherwise"


def fuzz_template(random_: random.Random, folder: Path) -> None:
    """Write chats with a template."""
    tokenizer = _tokenizer()
    source = random_.choice(TEMPLATES)
    for _ in range(random_.randint(1, 5)):
        at = random_.randrange(len(source) + 1)
        piece = random_.choice(PIECES)
        around = random_.choice(("{}", "{{{{ {} }}}}", "{{% {} %}}", "{{{{ x {} }}}}", "{{% set x = {} %}}"))
        source = source[:at] + around.format(piece) + source[at + random_.choice((0, 0, 3, 20)) :]
    tokenizer.chat_template = source
    roles = ("user", "assistant", "tool")[: random_.randint(1, 3)]
    turns = [{"role": role, "content": str(random_.choice(HOSTILE))} for role in roles]
    template = Template(tokenizer, DataSection(train="-", template="chat"))
    template.render(turns, opens=random_.random() < 0.5, tools=random_.choice((None, [{"function": {"name": "f"}}])))


def fuzz_safetensors(random_: random.Random, folder: Path) -> None:
    """Read the tensors of files of a model."""
    data = _small_tensors()
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    match random_.randrange(4):
        case 0:
            data = torn(random_, data)
        case 1:
            new = as_json(damaged(random_, head))
            data = len(new).to_bytes(8, "little") + new + data[8 + length :]
        case 2:
            data = random_.choice((0, 1, length * 2, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little") + data[8:]
        case _:
            index = damaged(random_, {"metadata": {}, "weight_map": dict.fromkeys(head, "model-1.safetensors")})
            (folder / "model.safetensors.index.json").write_bytes(as_json(index))
            (folder / "model-1.safetensors").write_bytes(data)
            data = b""
    if data:
        (folder / "model.safetensors").write_bytes(data)
    files = TensorFiles(folder)
    for info in files:
        files.read(info.name)


def fuzz_adapter(random_: random.Random, folder: Path) -> None:
    """Read an adapter, and what it does to its base."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
              "bias": "none", "base_model_name_or_path": "x", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {},
              "use_rslora": False,
              "modules_to_save": None, "lora_dropout": 0.0, "init_lora_weights": True, "fan_in_fan_out": False,
              "layers_to_transform": [0], "trainable_token_indices": None, "use_dora": False}  # fmt: skip
    text = as_json(damaged(random_, config))
    (folder / "adapter_config.json").write_bytes(torn(random_, text) if random_.random() < 0.3 else text)
    tensors = _small_tensors()
    (folder / "adapter_model.safetensors").write_bytes(torn(random_, tensors) if random_.random() < 0.3 else tensors)
    with suppress(PeDpoError):
        check_adapter(folder)
    files = AdapterFiles(folder)
    for change in files.changes.values():
        files.low_rank_update(change, "cpu")


def fuzz_base(random_: random.Random, folder: Path) -> None:
    """Read what lies beside the weights of a base."""
    for file in BASE.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    files = [file for file in sorted(folder.iterdir()) if file.suffix == ".json"]
    for file in random_.sample(files, random_.randint(1, 2)):
        value = json.loads(file.read_text(encoding="utf-8"))
        text = as_json(damaged(random_, value))
        file.write_bytes(torn(random_, text) if random_.random() < 0.3 else text)
    for read in (inspect_base, load_tokenizer, end_token_ids, weight_files):
        with suppress(PeDpoError):
            read(str(folder))


@cache
def _tokenizer() -> Any:
    return load_tokenizer(str(BASE))


@cache
def _small_tensors() -> bytes:
    import torch
    from safetensors.torch import save

    name = "base_model.model.model.layers.0.self_attn.q_proj"
    return bytes(save({f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}))


TARGETS: dict[str, Callable[[random.Random, Path], None]] = {
    "rows": fuzz_rows,
    "recipe": fuzz_recipe,
    "template": fuzz_template,
    "safetensors": fuzz_safetensors,
    "adapter": fuzz_adapter,
    "base": fuzz_base,
}


def run_case(target: str, seed: int, number: int, folder: Path) -> str | None:
    """Return the traceback of a case that crashed or took too long; None for one that ended well or in an error of ours."""
    random_ = random.Random(f"{target} {seed} {number}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings(action="ignore"):
            TARGETS[target](random_, folder)
    except (PeDpoError, RowError) as error:
        if "\n" in str(error) and target not in ("recipe", "rows"):  # which show what to write, line by line
            return f"{type(error).__name__} of several lines: {error}"
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  (which is what is looked for; a panic in Rust is no Exception)
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def main() -> None:
    """Run for as many minutes as asked for, print each crash as it comes, and write down what was run."""
    asked = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__.splitlines()[0])
    asked.add_argument("--minutes", type=float, default=1.0)
    asked.add_argument("--seed", type=int, default=1)
    asked.add_argument("--only", choices=TARGETS)
    asked.add_argument("--first", type=int, default=0, help="number of the first case")
    asked.add_argument("--cases", type=int, help="of each target, instead of minutes")
    asked.add_argument("--out", type=Path, help="JSON with what was run")
    options = asked.parse_args()
    targets = [options.only] if options.only else list(TARGETS)

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"a case took more than {SECONDS} CPU s")

    signal.signal(signal.SIGPROF, too_long)
    for module in ("peft", "datasets", "pyarrow.parquet", "transformers.models.llama.modeling_llama"):
        with suppress(ImportError):
            import_module(module)  # which takes longer than a case may
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    cases, crashes = dict.fromkeys(targets, 0), dict.fromkeys(targets, 0)
    number, began, seconds = options.first, time.monotonic(), dict.fromkeys(targets, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PE_DPO_CACHE"] = folder
        while number - options.first < options.cases if options.cases else time.monotonic() - began < 60 * options.minutes:
            for target in targets:
                start = time.process_time()
                found = run_case(target, options.seed, number, Path(folder, "case"))
                seconds[target] += time.process_time() - start
                cases[target] += 1
                if found is not None:
                    crashes[target] += 1
                    again = f"--only {target} --seed {options.seed} --first {number} --cases 1"
                    print(f"CRASH {again}\n{found}", flush=True)
            number += 1
    for target in targets:
        print(f"{target:12} {cases[target]:8,} cases  {crashes[target]:4} crashes  {seconds[target]:8.0f} CPU s")
    if options.out:
        from benchmarks.results import machine

        found = {"machine": machine(), "seed": options.seed, "minutes": options.minutes, "cases": cases, "crashes": crashes,
                 "cpu_seconds": {name: round(value, 1) for name, value in seconds.items()}}  # fmt: skip
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(crashes.values()))


if __name__ == "__main__":
    main()

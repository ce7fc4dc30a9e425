"""The command `data`: seconds and peak memory of preparing 10,000, 100,000 and a million pairs, before and after.

Rows are HH's own texts, drawn with a number in front so that no two prompts are equal. A process reads, renders, tokenizes and
splits them as every command does (`prepare_run`), a second one does it again and finds what the first one kept.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

from benchmarks.models import tokenized_base
from benchmarks.pairs import shared_folder
from benchmarks.processes import BEFORE, emptied, environment, package_root, run_process
from benchmarks.results import Settings, load, save, temporary_folder

SIZES = (10_000, 100_000, 1_000_000)
SCRIPT = """
import json, resource, sys, time
from pe_dpo.recipe import load_recipe
from pe_dpo.training.preparation import prepare_run
wall, cpu = time.perf_counter(), time.process_time()
before = resource.getrusage(resource.RUSAGE_CHILDREN)
data = prepare_run(load_recipe(sys.argv[1])).data
after = resource.getrusage(resource.RUSAGE_CHILDREN)
children = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
found = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu + children}
pairs = len(data.train) + len(data.held_out)
tokens = sum(len(data.train[n].chosen_ids) for n in range(min(1000, len(data.train))))
json.dump(found | {"pairs": pairs, "tokens": tokens}, open(sys.argv[2], "w"))
"""


def run_data(settings: Settings, sizes: tuple[int, ...], sides: tuple[str, ...]) -> None:
    """Prepare so many pairs in each version, twice; what the results have of other sizes and versions is kept."""
    path = settings.out / f"{settings.name}.json"
    found: dict[str, Any] = load(path)["sizes"] if path.is_file() else {}
    world = temporary_folder()
    roots = {"before": package_root(BEFORE), "after": package_root()}
    for size in sizes:
        recipe = write_rows(world, size)
        for side in sides:
            folder = emptied(world / "cache")
            variables = environment(roots[side], threads=0, PE_DPO_CACHE=str(folder), HF_HOME=str(folder / "hf"))
            for turn in ("first", "again"):
                command = [sys.executable, "-c", SCRIPT, str(recipe), str(world / "found.json")]
                spent = run_process(command, variables, world)
                one = json.loads((world / "found.json").read_text(encoding="utf-8")) | {"peak_mib": spent.peak_mib}
                found.setdefault(str(size), {}).setdefault(side, {})[turn] = one
                print(
                    f"  {size:>9} pairs, {side}, {turn}: {one['wall_seconds']:.1f} s ({one['cpu_seconds']:.1f} CPU s), "
                    f"peak {one['peak_mib']:.0f} MiB", flush=True,
                )  # fmt: skip
                if side == "before":
                    break  # it keeps nothing
            save(settings, {"before": BEFORE, "sizes": found})


def write_rows(folder: Path, count: int) -> Path:
    """Write so many pairs with HH's lengths and a recipe for them; return the recipe."""
    source = shared_folder() / "data" / "hh-harmless-explicit" / "train.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    draw = random.Random(0)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            row = draw.choice(rows)
            file.write(json.dumps({**row, "prompt": f"\n\nHuman: Number {number}.{row['prompt']}"}) + "\n")
    recipe = folder / "data.yaml"
    recipe.write_text(
        f"model: {{base: '{tokenized_base('m8k')}', quantize: none}}\n"
        f"data: {{train: '{folder / 'pairs.jsonl'}', max_length: 1024, bad_rows: drop, template: plain}}\n"
        f"output: '{folder / 'run'}'\n",
        encoding="utf-8",
    )
    return recipe

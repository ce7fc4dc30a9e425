"""Peak memory of a merge with verification, whole and layer by layer, on a model of 200 M parameters: a fresh process each.

    python -m benchmarks.merge_memory FOLDER            prints one line of JSON for each

Anonymous memory, polled: pages of files that are mapped count in the resident set too, and are given back when they are needed.
"""

import argparse
import ctypes
import gc
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from benchmarks.memory import _status_mib
from benchmarks.merge_cost import make_large

WAYS = ("whole", "layers")


def merge_verified(way: str, folder: Path) -> dict[str, float | str]:
    """Return the cost of one merge of the nf4 adapter, verified on eight pairs, in this process; imports are not in it."""
    import peft
    import transformers

    from pe_dpo.merging import memory
    from pe_dpo.merging.merge import merge

    transformers.AutoModelForCausalLM, peft.PeftModel, peft.tuners.lora  # noqa: B018 -- imports happen here
    if way == "layers":
        memory.free_bytes = lambda device: 1_000_000
    rows = [{"prompt": f"Number {row}?", "chosen": f"It is {'good ' * 20}{row}", "rejected": "No " * 15} for row in range(8)]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, is_done = _status_mib("RssAnon"), [0.0], threading.Event()

    def poll() -> None:
        while not is_done.wait(0.005):
            peak[0] = max(peak[0], _status_mib("RssAnon"))

    poller = threading.Thread(target=poll)
    poller.start()
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        report = merge(folder / "adapter-nf4", folder / way, pairs=8, data=str(folder / "pairs.jsonl"), force=True).report
        cost = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    finally:
        is_done.set()
        poller.join()
    shutil.rmtree(folder / way)
    return {"way": way, "peak_anonymous_mib": peak[0] - before, **cost, "kl": report["held_out"]["kl"]}


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.way is not None:
        print(json.dumps(merge_verified(options.way, options.folder)))
        return
    make_large(options.folder)
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.merge_memory", str(options.folder), "--way", way]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    _main()

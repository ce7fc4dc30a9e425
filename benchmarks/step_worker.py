"""Our step in a process of its own, in the package that PYTHONPATH names: lines of commands come in, lines of JSON go out.

prepare PAIRS.npz DTYPE    {"ours, reference stored": …}   warms up and says the losses
gradients FILE NAME        writes the gradients of a step
run NAME                   {"cpu_seconds": …}
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import pairs as made
from benchmarks.agreement import outcome
from benchmarks.ours import FULL_STACK, IN_STEP, OurStep, ladder
from benchmarks.rounds import timed

MODEL = "m8k"


def main() -> None:
    """Answer commands until the input ends."""
    torch.set_num_threads(1)
    steps: dict[str, OurStep] = {}
    for line in sys.stdin:
        command, *arguments = line.split("\t")
        arguments = [argument.strip() for argument in arguments]
        began = time.process_time()
        if command == "prepare":
            steps = prepare(*arguments)
            answer = {name: step() for name, step in steps.items()}
        elif command == "gradients":
            file, name = arguments
            loss = steps[name]()
            torch.save(outcome(steps[name].model, loss)._asdict(), file)
            answer = {"loss": loss}
        else:
            seconds, loss = timed(steps[arguments[0]])
            answer = {"cpu_seconds": seconds, "loss": loss}
        print(json.dumps(answer | {"all_cpu_seconds": time.process_time() - began}), flush=True)


def prepare(file: str, dtype: str) -> dict[str, OurStep]:
    """Return the steps over the pairs of a file, with the reference stored and in the step."""
    found = np.load(Path(file), allow_pickle=False)
    count = int(found["count"])
    parts = [[found[f"{part}{n}"] for part in ("prompt", "chosen", "rejected")] for n in range(count)]
    pairs = [made._pair(*part, where=f"pair:{n}", key=str(found[f"key{n}"])) for n, part in enumerate(parts)]
    rungs = [rung for rung in ladder() if rung.name in (IN_STEP, FULL_STACK)]
    return {rung.name: OurStep(rung, pairs, MODEL, dtype) for rung in rungs}  # type: ignore[arg-type]


if __name__ == "__main__":
    main()

"""`python -m benchmarks.vale_study run|collect|tables NAME`: see docs/study-gamma-vs-mixout.md."""

import argparse
from pathlib import Path

import torch

from benchmarks.vale_study.designs import NAMES
from benchmarks.vale_study.run import collect, run

OUT = Path(__file__).resolve().parents[1] / "results" / "study" / "vale"


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["run", "collect"])
    parser.add_argument("names", nargs="*", choices=NAMES, metavar="NAME", default=list(NAMES))
    parser.add_argument("--folder", type=Path, default=Path("runs/vale-study"), help="of the sweeps")
    parser.add_argument("--out", type=Path, default=OUT, help="of the numbers that are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names:
        if options.command == "run":
            run(name, options.folder)
        else:
            collect(name, options.folder, options.out)


if __name__ == "__main__":
    main()

"""What `docs/study-gamma-vs-mixout.md` is made from and by.

python -m benchmarks.study run NAME …            train an experiment in the vale, or go on with it (learning, explicit, luck)
python -m benchmarks.study collect NAME …        keep its numbers, without texts
python -m benchmarks.study pack SWEEP FOLDER     keep the numbers of a sweep on real pairs
python -m benchmarks.study unpack FOLDER SWEEP   a folder that `pe-dpo compare` and `pe-dpo report` read
python -m benchmarks.study page                  write the page's tables and figures from the numbers that are kept
"""

import argparse
import shutil
from pathlib import Path

import torch

from benchmarks.study.designs import NAMES


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "collect"):
        of_vale = commands.add_parser(name)
        of_vale.add_argument("names", nargs="+", choices=NAMES, metavar="NAME")
        of_vale.add_argument("--folder", type=Path, default=Path("runs/study"), help="of the sweeps")
    for name in ("pack", "unpack"):
        of_sweep = commands.add_parser(name)
        of_sweep.add_argument("source", type=Path)
        of_sweep.add_argument("target", type=Path)
    commands.add_parser("page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command in ("run", "collect"):
        from benchmarks.study.run import collect, run

        for name in options.names:
            (run if options.command == "run" else collect)(name, options.folder)
    elif options.command in ("pack", "unpack"):
        from benchmarks.study.packed import pack, unpack

        if options.command == "unpack":
            shutil.rmtree(options.target, ignore_errors=True)
        (pack if options.command == "pack" else unpack)(options.source, options.target)
    else:
        from benchmarks.study.page import write_page

        write_page()


if __name__ == "__main__":
    main()

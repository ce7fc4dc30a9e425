"""Runs one command and writes what it took: `python -I -S launch.py FOUND.json COMMAND …`.

A process of its own between the benchmark and the command, because the high-water mark of a process begins with what its
parent had when it was started: a benchmark that imported torch would lend its own to the smallest command.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    """Run the command of the arguments; children that it waited for count with it."""
    found, *command = sys.argv[1:]
    began = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    spent = {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": seconds,
        "peak_mib": usage.ru_maxrss / 1024,
        "own_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    Path(found).write_text(json.dumps(spent), encoding="utf-8")
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()

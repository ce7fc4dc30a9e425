"""Does a killed command end as one that nobody killed? `python -m benchmarks crash --kills N`.

job          what is run, and what it must come to                  jobs.py
process      a command in a process that dies where it is told to   process.py
chains       kill, go on, kill, …, end, compare                     run.py
"""

"""What only a GPU can show, in a few minutes: `bash tests/gpu.sh`; see its head for how to run it.

    __main__.py   the command: which parts, for how long, and the table at the end
    parts.py      the parts, in the order of their worth
    runner.py     runs parts, each in a process of its own, within its limit and the whole one
    machine.py    wheels, packages that are missing, the card, the commit
    report.py     what a part writes, and the table

and one module for each part, which also runs alone: python -m tests.gpu.PART --out DIR --scale S.
On a machine without a GPU every part is a dry run on the CPU, with its sizes divided.
"""

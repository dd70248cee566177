"""Tests and measurements that need a GPU and take a few minutes: `bash tests/gpu.sh`.

    __main__.py   the command: its flags, its output and the table at the end
    parts.py      the parts, most important first
    runner.py     runs each part in its own process, with a time limit per part and in total
    machine.py    wheels, missing packages, the GPU, the commit
    report.py     the results of a part
    table.py      the table of all parts

There is one module per part, which can also be run alone: python -m tests.gpu.PART --out DIR
--scale S. On a machine without a GPU every part is a dry run on the CPU, with its sizes divided.
"""

"""Eight ranks equal one process, in every mode: the cases of test_memory.py on a wider world."""

from itertools import product

import pytest

from tests.helpers.distributed import run_distributed
from tests.layers.test_memory import Case, _all_cases, _spec

# ten blocks of columns: uneven over 4 and 8 ranks
WORLD, WIDTH = 8, 80
# (memory group, column ranks): rows, columns, both, and groups that leave 2, 4 or 8 replicas
SHAPES = [(8, 1), (8, 8), (8, 2), (8, 4), (4, 1), (4, 4), (4, 2), (2, 1), (2, 2), (1, 1)]


def _cases() -> list[Case]:
    cases = [
        Case(
            _spec(memory_wire=wire, memory_value_dim=WIDTH),
            sharded,
            group_size=size,
            column_ranks=columns,
        )
        for (size, columns), wire, sharded in product(
            SHAPES, ("alltoall", "allgather"), (False, True)
        )
    ]
    # from no token to seven, recomputed, with a gradient buffer
    uneven = {"counts": tuple(range(WORLD)), "recompute": True, "buffer": True}
    return cases + [
        Case(
            _spec(memory_value_dim=WIDTH),
            True,
            group_size=size,
            column_ranks=columns,
            vary=size == WORLD,
            **uneven,
        )
        for size, columns in SHAPES
    ]


@pytest.mark.gloo
@pytest.mark.slow
def test_eight_ranks_equal_one_process() -> None:
    run_distributed(_all_cases, WORLD, _cases())

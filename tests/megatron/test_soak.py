"""A long run that dies again and again, and still has the losses of one that never did.

bash tests/run.sh tests/megatron/test_soak.py -m slow
"""

import random
from pathlib import Path

import pytest

from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.megatron.test_tiny_training import MEMORY, WIDE

STEPS, EVERY = 2000, 200
LONG = (
    *("--train-iters", STEPS, "--lr-decay-iters", STEPS),
    *("--eval-interval", 10 * STEPS, "--memory-optimizer", "lazy_adamw"),
)


def _curve(log: TrainingLog) -> dict[int, float]:
    """Iteration -> loss, without the second of a run, which Megatron prints as a mean of two."""
    pairs = list(zip(log.iterations, log.losses, strict=True))
    return dict(pairs[:1] + pairs[2:])


@pytest.mark.slow
@pytest.mark.gloo
def test_two_thousand_steps_through_kills(tmp_path: Path) -> None:
    whole = _curve(run_training("uninterrupted", 2, *MEMORY, *WIDE, *LONG))
    draw = random.Random(20)
    saving = ("--save", tmp_path, "--load", tmp_path, "--save-interval", EVERY)
    walked: dict[int, float] = {}
    deaths: list[str] = []
    while True:
        # the run dies in a random step, and every third time while it saves
        fault = f"kill {draw.randrange(2)} {draw.randrange(20, 700)}"
        if len(deaths) % 3 == 2:
            fault = f"kill-while-saving {draw.randrange(1, 3)}"
        log = run_training(
            f"after {len(deaths)} deaths",
            2,
            *(*MEMORY, *WIDE, *LONG, *saving),
            module="tests.helpers.faulty",
            environment={"FAULT": fault},
            check=False,
        )
        again = _curve(log)
        for step in walked.keys() & again.keys():
            assert again[step] == pytest.approx(walked[step], rel=2e-6), (step, deaths)
        walked |= again
        if log.returncode == 0:
            break
        assert log.iterations, log.tail()
        deaths.append(f"{fault}: at {log.iterations[-1]}")
        assert len(deaths) < 30, deaths
    assert len(deaths) >= 5, deaths
    assert max(walked) == STEPS and len(walked) > 0.98 * STEPS
    for step, loss in walked.items():
        assert loss == pytest.approx(whole.get(step, loss), rel=2e-6), (step, deaths)

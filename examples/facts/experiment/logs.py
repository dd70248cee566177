"""What the log of a training run says."""

import re
from dataclasses import dataclass
from statistics import median

ITERATION = re.compile(
    r"iteration +(\d+)/ *(\d+) \|.*?elapsed time per iteration \(ms\): ([\d.]+).*? lm loss: (\S+)"
)
VALIDATION = re.compile(
    r"validation loss at iteration (\d+) on validation set \| lm loss value: (\S+)"
)
PARAMETERS = re.compile(r"number of parameters on \(.*?\) model parallel rank \(.*?\): (\d+)")
ALLOCATED = re.compile(r"max allocated: ([\d.]+)")
# Megatron may log times of 0 for what it could not measure
MIB = 2**20


@dataclass(frozen=True)
class Point:
    """One logged iteration; seconds are those of training up to it."""

    iteration: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class TrainingLog:
    """The figures of a log, which may hold several starts of one run.

    Attributes:
        ms_per_iteration: the median of what was logged, the first of every start left out.
        allocated: peak bytes on the GPU; 0 where there is none.
    """

    points: tuple[Point, ...]
    ms_per_iteration: float | None
    validation_loss: float | None
    parameters: int | None
    allocated: int

    def seconds_at(self, iteration: int) -> float | None:
        """Training time up to an iteration, where one was logged."""
        found = [point.seconds for point in self.points if point.iteration == iteration]
        return found[0] if found else None


def read(text: str) -> TrainingLog:
    """Read a whole log; an iteration that was trained twice counts as it was trained last."""
    logged: dict[int, tuple[float, float]] = {}
    warm: list[float] = []
    before = 0
    for match in ITERATION.finditer(text):
        iteration, ms, loss = int(match[1]), float(match[3]), float(match[4])
        # what came after the checkpoint that a later start loaded is void
        if iteration <= before:
            logged = {n: value for n, value in logged.items() if n < iteration}
        elif logged:
            warm.append(ms)
        before = iteration
        logged[iteration] = (ms, loss)
    points, seconds, last = [], 0.0, 0
    for iteration, (ms, loss) in sorted(logged.items()):
        seconds += ms / 1000 * (iteration - last)
        last = iteration
        points.append(Point(iteration, loss, seconds))
    validation = [float(match[2]) for match in VALIDATION.finditer(text)]
    parameters = PARAMETERS.search(text)
    allocated = [float(match[1]) for match in ALLOCATED.finditer(text)]
    return TrainingLog(
        points=tuple(points),
        ms_per_iteration=median(warm or [p[0] for p in logged.values()]) if logged else None,
        validation_loss=validation[-1] if validation else None,
        parameters=int(parameters[1]) if parameters else None,
        allocated=int(max(allocated, default=0.0) * MIB),
    )


def last_iteration(text: str) -> tuple[int, float] | None:
    """Iteration and loss that were logged last."""
    found = ITERATION.findall(text)
    return (int(found[-1][0]), float(found[-1][3])) if found else None

"""The parts of `bash tests/gpu.sh`, in the order of their worth."""

from dataclasses import dataclass

MEGATRON = ("megatron.core", "megatron.training", "numpy", "PIL", "packaging")
"""Modules without which Megatron's training loop with memory layers does not start."""


@dataclass(frozen=True)
class Part:
    """A module of this package that runs in a process of its own."""

    name: str
    says: str
    """What it does, for --list."""

    limit: float
    """Seconds that it gets on a GPU, about twice of what it should take."""

    needs: tuple[str, ...] = ()
    """Modules beside torch and triton, without which it does not start."""

    wants: tuple[str, ...] = ()
    """Modules without which some of it fails."""

    beside: bool = False
    """It times nothing, so that neighbours in the list that time nothing run at the same time."""

    module: str = ""
    """Where it is, if not in tests.gpu.NAME."""

    @property
    def where(self) -> str:
        return self.module or f"tests.gpu.{self.name}"


PARTS = (
    Part("warm", "compiles the kernels that later parts launch, on all cores", 60),
    Part("answers", "known answers of every kernel at real sizes", 60),
    Part(
        "ranks",
        "two NCCL ranks on one GPU in Megatron's loop against one process",
        110,
        needs=MEGATRON,
        # Megatron's checkpoints
        wants=("psutil",),
        beside=True,
    ),
    Part(
        "tests",
        "pytest -m gpu",
        110,
        needs=("pytest",),
        wants=("hypothesis", "sortedcontainers", "rich"),
        beside=True,
    ),
    Part(
        "syncs",
        "host synchronisations of a step, and where they come from",
        110,
        needs=MEGATRON,
        beside=True,
    ),
    Part(
        "te",
        "memory layers among those of Transformer Engine, where that is installed",
        150,
        needs=MEGATRON,
        beside=True,
        module="tests.gpu.transformer_engine",
    ),
    Part("stages", "the stages of one memory layer, timed", 40, needs=("rich",)),
    Part(
        "step",
        "a training step of 16 layers of 2048, with and without 3 memory layers",
        90,
        needs=MEGATRON,
    ),
    Part("bench", "every op of megamem bench at one real size beside torch", 90, needs=("rich",)),
)
BY_NAME = {part.name: part for part in PARTS}


def chosen(names: list[str]) -> list[Part]:
    """The parts of these names in the order of PARTS; all of them where no name is given.

    Raises:
        ValueError: there is no part of that name.
    """
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise ValueError(
            f"there is no part {', '.join(unknown)}; the parts are {' '.join(BY_NAME)}"
        )
    return [part for part in PARTS if not names or part.name in names]

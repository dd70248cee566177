"""The parts of `bash tests/gpu.sh`, most important first."""

from dataclasses import dataclass

MEGATRON = ("megatron.core", "megatron.training", "numpy", "PIL", "packaging")
"""The modules that Megatron's training loop with memory layers needs to start."""


@dataclass(frozen=True)
class Part:
    """A module that is run in its own process."""

    name: str
    says: str
    """A description for --list."""

    limit: float
    """Time limit on a GPU in seconds, about twice the expected time."""

    needs: tuple[str, ...] = ()
    """Modules besides torch and triton that it needs to start."""

    wants: tuple[str, ...] = ()
    """Modules that some of its tests need."""

    beside: bool = False
    """It measures no times, so it runs at the same time as neighbours in the list that do not."""

    module: str = ""
    """The module, if it is not tests.gpu.NAME."""

    @property
    def where(self) -> str:
        """The module to run."""
        return self.module or f"tests.gpu.{self.name}"


PARTS = (
    Part("warm", "compile the kernels of later parts, on all cores", 60),
    Part("answers", "test every kernel on inputs with known results, at real sizes", 60),
    Part(
        "ranks",
        "compare two NCCL ranks on one GPU with one process, in Megatron's loop",
        110,
        needs=MEGATRON,
        # Megatron's checkpoints
        wants=("psutil",),
        beside=True,
    ),
    Part(
        "tests",
        "run pytest -m gpu",
        110,
        needs=("pytest",),
        wants=("hypothesis", "sortedcontainers", "rich"),
        beside=True,
    ),
    Part(
        "syncs",
        "count the host synchronisations of a step, by line of code",
        110,
        needs=MEGATRON,
        beside=True,
    ),
    Part(
        "te",
        "train memory layers with Transformer Engine, if that is installed",
        150,
        needs=MEGATRON,
        beside=True,
        module="tests.gpu.transformer_engine",
    ),
    Part("stages", "time the stages of one memory layer", 40, needs=("rich",)),
    Part(
        "step",
        "time a training step of 16 layers of width 2048, with and without 3 memory layers",
        120,
        needs=MEGATRON,
    ),
    Part(
        "pieces",
        "compare passes in pieces with passes in one, on two NCCL ranks, and time both",
        80,
    ),
    Part(
        "tune",
        "measure the candidates of every op with megamem tune, at one real size",
        90,
        needs=("rich", *MEGATRON),
    ),
    Part("bench", "time every op of megamem bench at one real size", 90, needs=("rich",)),
)
BY_NAME = {part.name: part for part in PARTS}


def chosen(names: list[str]) -> list[Part]:
    """The parts with these names in the order of PARTS; all parts if no name is given.

    Raises:
        ValueError: there is no part with that name.
    """
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise ValueError(
            f"there is no part {', '.join(unknown)}; the parts are {' '.join(BY_NAME)}"
        )
    return [part for part in PARTS if not names or part.name in names]

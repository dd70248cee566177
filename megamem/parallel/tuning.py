"""All ranks of a run use one set of choices: those of rank 0's tuning file, or the defaults.

Choices change the order of sums, so replicas of a table would drift apart if their ranks used
different ones. Only rank 0 reads the file, as other hosts have other cache folders.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megamem.ops import tuning
from megamem.ops.forms import ENVIRONMENT, selected
from megamem.spec import MemorySpec

logger = logging.getLogger("megamem")

OFF = "off"
"""The value of --memory-tuning with which no file is read."""


@dataclass(frozen=True)
class _Found:
    """What one rank found."""

    machine: tuning.Machine
    forms: dict[str, str]
    """Forms that the environment selects, which come before those of the file."""
    choices: tuning.Choices | None = None
    """The choices in the file; None without a file that can be used."""
    said: str = ""
    """A line about the file that is used."""
    ignored: str = ""
    """Why the file in the cache folder is not used."""
    problem: str = ""
    """Why the file that --memory-tuning names cannot be used."""


def load_tuning(spec: MemorySpec, dtype: torch.dtype) -> str:
    """Make all ranks use one set of choices; collective if torch.distributed is initialised.

    The file is the one that --memory-tuning names, or, if there is one, that for this kind of GPU
    in the cache folder of the user. The latter is ignored with a warning if it was measured on
    another machine or for a run of another kind. Ranks with different GPUs use the general choices.

    Args:
        spec: the spec of the run.
        dtype: the dtype of the model's weights.

    Returns:
        A line about the file in use; empty if there is none.

    Raises:
        ValueError: the file that --memory-tuning names cannot be used; on all ranks.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    found = _look(spec, dtype, reads=rank == 0)
    everybody = [found]
    if dist.is_initialized():
        everybody *= dist.get_world_size()
        dist.all_gather_object(everybody, found)
    first = everybody[0]
    if problem := first.problem or _different_forms(everybody):
        raise ValueError(problem)
    chosen, said, ignored = first.choices, first.said, first.ignored
    if difference := _different_cards(everybody):
        if spec.tuning not in ("", OFF):
            raise ValueError(
                f"--memory-tuning {spec.tuning} holds for one kind of GPU, but {difference}; drop "
                "it, or use GPUs of one kind."
            )
        chosen, said = tuning.GENERAL, ""
        ignored = f"{difference}, so all ranks use the choices for cards that were not measured"
    tuning.use(chosen)
    if ignored and rank == 0:
        logger.warning("%s", ignored)
    return said


def _look(spec: MemorySpec, dtype: torch.dtype, *, reads: bool) -> _Found:
    """This rank's machine, and, if it reads the file, what came of that."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    machine, forms, asked = tuning.this_machine(device), selected(), spec.tuning
    if not reads or asked == OFF:
        return _Found(machine, forms)
    path = Path(asked) if asked else tuning.default_path(machine.device)
    if not asked and (device.type == "cpu" or not path.exists()):
        return _Found(machine, forms)
    try:
        read = tuning.read(path, machine)
        if other := _other_run(read.sizes, spec, dtype):
            raise ValueError(f"{path} was measured for {other}; run python -m megamem tune again.")
    except (OSError, ValueError) as error:
        why = f"{path}: {error.strerror}" if isinstance(error, OSError) else str(error)
        if asked:
            return _Found(machine, forms, problem=f"--memory-tuning: {why}")
        return _Found(machine, forms, ignored=f"the tuning file is ignored: {why}")
    sizes = " ".join(f"{name}={size}" for name, size in read.sizes.items())
    said = f"megamem: kernels use the choices of {path}, measured at {sizes}"
    return _Found(machine, forms, read.choices, said)


def _other_run(sizes: dict[str, object], spec: MemorySpec, dtype: torch.dtype) -> str:
    """In what a file's run differs so that its forms may not hold for this one; empty if not."""
    ours = {"dtype": str(dtype).removeprefix("torch."), "topk": spec.topk}
    for name, value in ours.items():
        if sizes.get(name) != value:
            return f"{name} {sizes.get(name)}, not {name} {value}"
    return ""


def _different_forms(everybody: Sequence[_Found]) -> str:
    """A sentence if ranks were told to use different forms of ops; empty if not."""
    ours = everybody[0].forms
    for rank, found in enumerate(everybody):
        if found.forms != ours:
            return (
                f"{ENVIRONMENT} differs: it selects {_listed(ours)} on rank 0 and "
                f"{_listed(found.forms)} on rank {rank}; set it alike on every rank."
            )
    return ""


def _listed(forms: dict[str, str]) -> str:
    return ",".join(f"{op}={form}" for op, form in forms.items()) or "nothing"


def _different_cards(everybody: Sequence[_Found]) -> str:
    """Which rank has another kind of GPU than rank 0; empty if none has."""
    first = everybody[0].machine
    for rank, found in enumerate(everybody):
        machine = found.machine
        if (machine.device, machine.capability) != (first.device, first.capability):
            return f"rank 0 has {first.device} and rank {rank} has {machine.device}"
    return ""

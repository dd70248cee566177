"""What a run does with its spec before the model is built."""

import argparse
import sys

import torch.distributed as dist

from megamem.config import ConfigurationError
from megamem.megatron.reports import sizes
from megamem.megatron.startup.rank_consistency import broadcast_from_rank0, differing_flags
from megamem.megatron.startup.saved_model import checkpoint_problems
from megamem.parallel.tuning import load_tuning
from megamem.spec import MemorySpec


def begin(spec: MemorySpec, args: argparse.Namespace) -> None:
    """Compare the settings between ranks and with the checkpoint, and load the tuning file.

    All ranks must call it, and all raise the same error. The first writes a line about the sizes
    of the tables.

    Raises:
        ConfigurationError: the settings differ, or the tuning file is not one.
    """
    ConfigurationError.collect(differing_flags(spec, args))
    ConfigurationError.collect(broadcast_from_rank0(lambda: checkpoint_problems(spec, args)))
    try:
        tuned = load_tuning(spec, args.params_dtype)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    if dist.get_rank() == 0:
        sys.stdout.write(f" > {sizes.summary(spec)}\n")
        sys.stdout.write(f" > {tuned}\n" if tuned else "")

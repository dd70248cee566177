"""Builds one rank of a large run without its memory: real flags, real checks, the meta device.

    python -m tests.examples.dry_build < [[name, world size, {variable: value}, [flag, ...]], ...]

Prints a line of JSON for each: parameters of the rank, and shape and cut of its value tables. The
other ranks are stood in for by torch's fake process group, which answers every collective at once.
"""

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch.testing._internal.distributed.fake_pg import FakeStore

from megamem.cpu.runtime import _norm_under_sequence_parallelism
from megamem.megatron.launcher import attach
from megamem.patching import replace

# Transformer Engine's kernels, and others that want a GPU to be there
LOCAL = (
    *("--transformer-impl", "local", "--no-rope-fusion", "--no-gradient-accumulation-fusion"),
    *("--no-persist-layer-norm", "--no-masked-softmax-fusion", "--distributed-backend", "gloo"),
)


def main() -> None:
    """Build every job that standard input names."""
    attach()
    # torch's norms do where Transformer Engine's would stand
    replace(WrappedTorchNorm, "__new__", _norm_under_sequence_parallelism)
    torch.cuda.current_device = lambda: torch.device("meta")
    # Megatron asks how old the GPU is: an H100
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(major=9, minor=0)
    for name, world, environment, flags in json.load(sys.stdin):
        # Megatron keeps a run in globals; a copy of this process has them to itself
        child = os.fork()
        if not child:
            os.environ |= environment
            found = build(world, [*flags, *LOCAL])
            sys.stdout.write(json.dumps({"name": name, **found}) + "\n")
            sys.stdout.flush()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status:
            sys.exit(f"{name}: ended with {status}")


def build(world: int, flags: list[str]) -> dict[str, Any]:
    """The model of a command line, as rank 0 has it."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from examples import megatron_releases
    from megamem.megatron import compat
    from megamem.megatron.optimizer.chain import find_tables

    sys.argv = ["pretrain_gpt.py", *flags]
    args = megatron_releases.read_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size, create_gloo_process_groups=False
    )
    config = compat.CONFIG_MODULE.core_transformer_config_from_args(args)
    config.perform_initialization = False
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with torch.device("meta"):
        model = megatron_releases.build_gpt(args, config)(groups, True, True, None)
    assert all(param.is_meta for param in model.parameters())
    tables = find_tables([model])
    return {
        "parameters": sum(param.numel() for param in model.parameters()),
        "tables": {name: list(table.weight.shape) for name, table in tables.items()},
        "layers": [type(layer.mlp).__name__ for layer in model.decoder.layers],
    }


if __name__ == "__main__":
    main()

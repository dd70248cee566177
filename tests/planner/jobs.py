"""Jobs for the planner's tests: the published base models on any number of ranks."""

from megamem.config import MemoryConfig
from megamem.planner import Cluster, Job, preset
from megamem.planner.hardware import HARDWARE
from megamem.resolution import resolve
from megamem.spec import MemorySpec

LOOKUPS, TOKENS, WIDTH = 128, 8192, 2048
"""Lookups per token, tokens per rank and microbatch, numbers per row of the 1.3B base model."""
MILLION_ROWS = 2**20


def spec_of(base: str = "1.3b", num_keys: int = 1024, **settings) -> MemorySpec:
    """The memory layers' settings of a run on one rank."""
    return resolve(_config(base, num_keys, settings), preset(base)[0].hidden_size)


def job_of(base: str = "1.3b", num_keys: int = 1024, world: int = 64, **settings) -> Job:
    cluster = Cluster(world_size=world, **{"micro_batch_size": 4, **settings.pop("cluster", {})})
    gpu = settings.pop("gpu", "h100")
    shape, config = preset(base)[0], _config(base, num_keys, settings)
    spec = resolve(
        config,
        shape.hidden_size,
        tensor_ranks=cluster.tensor_model_parallel_size,
        stage_ranks=cluster.stage_ranks,
        ranks_per_node=cluster.gpus_per_node,
        link=HARDWARE[gpu].link,
        network=HARDWARE[gpu].network,
        microbatch_tokens=cluster.microbatch_tokens(shape.seq_length),
    )
    return Job(shape=shape, spec=spec, cluster=cluster, gpu=gpu, wire=config.memory_wire)


def _config(base: str, num_keys: int, settings: dict) -> MemoryConfig:
    defaults = {"memory_layers": preset(base)[1], "memory_num_keys": num_keys}
    return MemoryConfig(**defaults | settings)

"""Jobs to plan: the published bases on so many ranks."""

from megamem.config import MemoryConfig
from megamem.planner import Cluster, Job, preset

LOOKUPS, TOKENS, WIDTH = 128, 8192, 2048
"""Per token; per rank and microbatch; of a row of the 1.3B base."""
MILLION_ROWS = 2**20


def memory_of(base: str = "1.3b", num_keys: int = 1024, **settings) -> MemoryConfig:
    shape, places = preset(base)
    settings = {"memory_layers": places, "memory_num_keys": num_keys} | settings
    return MemoryConfig(**settings).resolve(shape.hidden_size)


def job_of(base: str = "1.3b", num_keys: int = 1024, world: int = 64, **settings) -> Job:
    cluster = Cluster(world_size=world, **{"micro_batch_size": 4, **settings.pop("cluster", {})})
    gpu = settings.pop("gpu", "h100")
    memory = memory_of(base, num_keys, **settings)
    return Job(shape=preset(base)[0], memory=memory, cluster=cluster, gpu=gpu)

"""A closed-form cost model of memory layers: parameters, bytes, traffic and time.

It needs no process group and no GPU. `make_plan` compares all layouts of a job.
"""

from megamem.planner.job import Cluster, Job, group_sizes
from megamem.planner.plan import Plan, gpus_needed, make_plan
from megamem.planner.sizes import PRESETS, ModelShape, preset
from megamem.planner.states import OPTIMIZERS, TableState, table_state

__all__ = [
    "OPTIMIZERS",
    "PRESETS",
    "Cluster",
    "Job",
    "ModelShape",
    "Plan",
    "TableState",
    "gpus_needed",
    "group_sizes",
    "make_plan",
    "preset",
    "table_state",
]

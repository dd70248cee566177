"""A closed-form cost model of memory layers: sizes, bytes, traffic and time, without any rank.

`make_plan` weighs all layouts of a job; `choose_mode` is the part of it that a run asks.
"""

from megamem.planner.job import Cluster, Job, Layout, asked_layout, group_sizes
from megamem.planner.plan import Plan, gpus_needed, make_plan
from megamem.planner.sizes import PRESETS, ModelShape, preset
from megamem.planner.states import OPTIMIZERS, TableState, table_state
from megamem.planner.traffic import ModeChoice, choose_mode

__all__ = [
    "OPTIMIZERS",
    "PRESETS",
    "Cluster",
    "Job",
    "Layout",
    "ModeChoice",
    "ModelShape",
    "Plan",
    "TableState",
    "asked_layout",
    "choose_mode",
    "gpus_needed",
    "group_sizes",
    "make_plan",
    "preset",
    "table_state",
]

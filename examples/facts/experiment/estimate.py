"""How long a run of a scale takes on one H100, estimated before it is run on one.

What a step takes there is the sum of four parts, though the first goes on beside the others, so
the sum is an upper estimate:

    host      launching kernels: operations of a step, counted on a CPU, at an assumed time for each
    matrices  FLOPs at the rate of a plain feed-forward, less in proportion where models are narrow
    other     what a measured step of Megatron's takes beside its matrices, by token, layer, channel
    table     lookups, gradient norm and step of the table: the planner's stages

The measurements are of one H100 (80 GB, torch 2.11.0, commit a4677c2), Megatron without Transformer
Engine and Apex: a plain feed-forward 2048-8192-2048 of 8,192 tokens 2.5 ms forward and backward; 16
layers of 2048, 16,384 tokens a step, 534 ms, with three memory layers on 1M rows 635 ms. The times
of an operation, of the start and of asking are assumed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from experiment.plan import Flags, Run, flops_per_token, memories, model_shape

from megamem.planner.cost import LayoutCost, layout_cost
from megamem.planner.job import Cluster, Job, layouts

MEASURED: Flags = {
    "num_layers": 16,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "ffn_hidden_size": 8192,
    "seq_length": 2048,
    "micro_batch_size": 2,
    "global_batch_size": 8,
}
MEASURED_VOCABULARY, MEASURED_SECONDS = 32_000, 0.534
# 2.5 ms, three passes of two products
MATRIX_RATE = 3 * 2 * 2 * 8192 * 2048 * 8192 / 2.5e-3
# operations of a step that are no views: 1,118 of dense at four layers, 2,350 with three memories
LAYER_OPERATIONS, MEMORY_OPERATIONS = 280, 411
# of an operation that is launched from Python, autograd included; assumed, 5 to 10 us are usual
OPERATION_SECONDS = 20e-6
# imports, model, data index, kernels that are compiled first; assumed
START_SECONDS = 40.0
# of one question at one point, most of it on the host; assumed
QUESTION_SECONDS = 3e-4


@dataclass(frozen=True)
class Step:
    """Seconds of the parts of a step."""

    host: float
    matrices: float
    other: float
    table: float

    @property
    def device(self) -> float:
        return self.matrices + self.other + self.table


def step(flags: Flags, vocab_size: int) -> Step:
    """The parts of a training step with these flags."""
    tokens = flags["global_batch_size"] * flags["seq_length"]
    memory_layers = len(flags.get("memory_layers", ()))
    operations = flags["num_layers"] * LAYER_OPERATIONS + memory_layers * MEMORY_OPERATIONS
    microbatches = flags["global_batch_size"] // flags["micro_batch_size"]
    found = cost(flags, vocab_size)
    return Step(
        host=operations * microbatches * OPERATION_SECONDS,
        matrices=_matrix_seconds(flags, vocab_size),
        other=tokens * flags["num_layers"] * flags["hidden_size"] * _other_seconds(),
        table=found.seconds["h100"].table if found else 0.0,
    )


def cost(flags: Flags, vocab_size: int) -> LayoutCost | None:
    """What the planner says of the table on one GPU; None without memories."""
    spec = memories(flags)
    if spec is None:
        return None
    cluster = Cluster(
        world_size=1,
        micro_batch_size=flags["micro_batch_size"],
        global_batch_size=flags["global_batch_size"],
        use_distributed_optimizer=False,
    )
    job = Job(shape=model_shape(flags, vocab_size), spec=spec, cluster=cluster)
    (layout,) = layouts(job)
    return layout_cost(job, layout)


def run_seconds(run: Run, vocab_size: int, questions: int) -> float:
    """One run from its start to its end, asked so many questions at every point."""
    each = step(run.flags, vocab_size)
    # at the last point in two phrasings
    asking = (len(run.points) + 1) * questions * QUESTION_SECONDS
    return START_SECONDS + run.iterations * (each.host + each.device) + asking


def sweep_seconds(runs: Iterable[Run], vocab_size: int, questions: int) -> float:
    """Runs side by side on one GPU, each with a core of its own: they wait for each other there."""
    runs = list(runs)
    device = [run.iterations * step(run.flags, vocab_size).device for run in runs]
    alone = (run_seconds(run, vocab_size, questions) for run in runs)
    return max(alone) + sum(device) - min(device)


def _matrix_seconds(flags: Flags, vocab_size: int) -> float:
    tokens = flags["global_batch_size"] * flags["seq_length"]
    rate = MATRIX_RATE * min(1.0, flags["hidden_size"] / MEASURED["hidden_size"])
    return flops_per_token(flags, vocab_size) * tokens / rate


def _other_seconds() -> float:
    """Of a token, a layer and a channel: attention's scores, norms, activations, optimizer."""
    flags, seconds = MEASURED, MEASURED_SECONDS - _matrix_seconds(MEASURED, MEASURED_VOCABULARY)
    tokens = flags["global_batch_size"] * flags["seq_length"]
    return seconds / (tokens * flags["num_layers"] * flags["hidden_size"])

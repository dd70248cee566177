"""Reports how the memory of a run is used to TensorBoard, wandb and the log.

Megatron's writers exist only on its last rank, so numbers are summed over all ranks and written
there: scalars every --tensorboard-log-interval, pictures and a line in the log every
--log-interval.
"""

import argparse
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.training.global_vars import get_args, get_tensorboard_writer, get_wandb_writer
from torch import Tensor, nn

from megamem.layers.memory import MemoryLayer
from megamem.layers.variants import table_names
from megamem.megatron.model.carried_spec import spec_of_model
from megamem.megatron.optimizer.chain import ChainWithTables, find_tables
from megamem.megatron.reports.usage_pictures import UsageMap, load_levels, relative_load
from megamem.metrics import Metrics, Report, Watched
from megamem.spec import MemorySpec

TITLES = {
    "rows_used": "rows used (%)",
    "kl_from_uniform": "KL divergence of reads from uniform (nats)",
    "top1_weight": "largest weight of a head (mean)",
    "score_entropy": "entropy of a head's weights (nats)",
    "weight_mean": "weight of a lookup (mean)",
    "gate_mean": "mean gate",
    "core_loss": "loss of the cores, without its weight",
    "balance_loss": "balance loss, without its weight",
    "grad_norm": "gradient norm of the table",
    "row_norm": "norm of a row (mean)",
    "learning_rate": "learning rate of the table",
    "trained_rows": "rows trained per step",
    "trained_lookups": "lookups that read a trained row (%)",
    "shard_load": "lookups of the busiest rank / mean of ranks",
    "sent_megabytes": "MB sent per rank and iteration",
    "lookup_ms": "time of the lookup in forward (ms)",
    "exchange_ms": "exposed communication in forward (ms)",
}
SUMMARY = ("rows_used", "kl_from_uniform", "score_entropy", "gate_mean")
IN_CONSOLE = {
    "rows_used": "rows used {:.1f}%",
    "kl_from_uniform": "KL from uniform {:.3f}",
    "top1_weight": "top-1 weight {:.3f}",
    "score_entropy": "entropy {:.3f}",
    "weight_mean": "mean weight {:.3g}",
    "gate_mean": "gate {:.4f}",
    "core_loss": "core loss {:.4g}",
    "balance_loss": "balance loss {:.4g}",
    "grad_norm": "table grad norm {:.3g}",
    "row_norm": "row norm {:.4g}",
    "trained_rows": "rows trained {:.4g}",
    "trained_lookups": "read by {:.1f}% of lookups",
    "shard_load": "shard load {:.2f}",
}


class TrainingMetrics:
    """Measures the model that Megatron sets up, and reports whenever Megatron logs."""

    def __init__(self, find_writers: Callable[[], tuple[Any, Any]] | None = None) -> None:
        """Measure nothing yet.

        Args:
            find_writers: returns the TensorBoard and wandb writers of this rank, either of which
                may be None; by default those of Megatron.
        """
        self.find_writers = find_writers or megatrons_writers
        self.metrics: Metrics | None = None
        self.optimizer: ChainWithTables | None = None
        self.writers: Writers | None = None
        self.iterations = 0
        self.usage: dict[int, Tensor] = {}

    def watch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A setup_model_and_optimizer() that also starts the measurement of what it returns."""

        def setup_model_and_optimizer(*rest: Any, **more: Any) -> Any:
            found = original(*rest, **more)
            chunks, optimizer, *_ = found
            spec = spec_of_model(chunks)
            if spec is not None:
                self.attach(chunks, optimizer, spec, get_args())
            return found

        return setup_model_and_optimizer

    def log(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A training_log() that afterwards reports the memory."""
        signature = inspect.signature(original)

        def training_log(*rest: Any, **more: Any) -> Any:
            done = original(*rest, **more)
            if self.metrics is not None:
                self.report(get_args(), signature.bind(*rest, **more).arguments["iteration"])
            return done

        return training_log

    def attach(
        self,
        chunks: Iterable[nn.Module],
        optimizer: Any,
        spec: MemorySpec,
        args: argparse.Namespace,
    ) -> None:
        """Start to measure these chunks of a model, unless --memory-metrics is off."""
        # a run that only evaluates has no optimizer of the tables, and nothing to record
        if not is_measured(spec, args) or not isinstance(optimizer, ChainWithTables):
            return
        watched = Watched(
            layers=spec.layers,
            tables=table_names(spec),
            num_keys=spec.keys_per_side,
            heads=spec.heads,
            topk=spec.reads_per_head,
            softmax=not spec.tucker_rank,
        )
        self.metrics, self.optimizer = Metrics(watched, torch.cuda.current_device()), optimizer
        self.iterations = 0
        for module in (module for chunk in chunks for module in chunk.modules()):
            if isinstance(module, MemoryLayer):
                module.metrics = self.metrics.layers[module.layer]
                if module.losses is not None:
                    module.losses.metrics = module.metrics
        for name, table in find_tables(chunks).items():
            table.metrics = self.metrics.tables[name]

    def report(self, args: argparse.Namespace, iteration: int) -> None:
        """Report an iteration, if this is one at which Megatron logs; all ranks must call it."""
        if self.metrics is None:
            return
        assert self.optimizer is not None
        self.iterations += 1
        to_writer = iteration % args.tensorboard_log_interval == 0
        to_console = iteration % args.log_interval == 0
        if not (to_writer or to_console):
            return
        member = self.optimizer.tables
        for name, table in member.optimizer.tables.items():
            self.metrics.tables[name].fill(
                table.weight,
                table.shard,
                member.squares.get(name, 0.0),
                member.optimizer.chosen.pop(name, None),
                table.readers,
            )
        report = self.metrics.report(
            self.iterations, member.scale, wanted=dist.get_rank() == dist.get_world_size() - 1
        )
        self.iterations = 0
        if report is None:
            return
        rate = float(member.optimizer.param_groups[0]["lr"])
        for name in self.metrics.tables:
            report.scalars[f"memory/learning_rate/{name}"] = rate
        self._show(report, iteration, to_writer=to_writer, to_console=to_console)

    def _show(self, report: Report, iteration: int, *, to_writer: bool, to_console: bool) -> None:
        for layer, usage in report.usage.items():
            self.usage[layer] = self.usage[layer] + usage if layer in self.usage else usage
        if self.writers is None:
            self.writers = Writers(*self.find_writers(), reported=report.scalars)
        if to_writer:
            self.writers.scalars(report.scalars, iteration)
        if to_console:
            sys.stdout.write(f" {console_line(report.scalars)}\n")
            sys.stdout.flush()
            assert self.metrics is not None
            for layer, counted in self.usage.items():
                self.writers.pictures(layer, counted, self.metrics.watched.num_keys, iteration)
            self.usage.clear()


def megatrons_writers() -> tuple[Any, Any]:
    """Megatron's TensorBoard and wandb writers, which only its last rank has."""
    return get_tensorboard_writer(), get_wandb_writer()


class Writers:
    """Megatron's TensorBoard and wandb writers, either of which may be None.

    On the page Custom Scalars TensorBoard gives every run one colour. So that the lines of a chart
    differ in colour, each layer, table and group is a run of its own, in a folder of its name below
    that of Megatron's writer.
    """

    def __init__(self, board: Any, wandb: Any, reported: Iterable[str] = ()) -> None:
        """Write the layout of TensorBoard's page Custom Scalars.

        Args:
            board: a SummaryWriter, or None.
            wandb: the wandb module, or None.
            reported: names of the numbers in a report of this run, which get charts.
        """
        self.board, self.wandb = board, wandb
        self.lines: dict[str, Any] = {}
        self.usage_map: UsageMap | None = None
        if board is not None:
            board.add_custom_scalars(layout(reported))

    def scalars(self, scalars: dict[str, float], iteration: int) -> None:
        """Write every number under its name."""
        if self.board is not None:
            for name, value in scalars.items():
                self._line(name.rpartition("/")[2]).add_scalar(name, value, iteration)
            # Megatron flushes its own writer only
            for line in self.lines.values():
                line.flush()
        if self.wandb is not None:
            self.wandb.log(scalars, iteration)

    def _line(self, name: str) -> Any:
        """The writer of a layer, table or group."""
        if name not in self.lines:
            self.lines[name] = type(self.board)(os.path.join(self.board.log_dir, name))
        return self.lines[name]

    def pictures(self, layer: int, usage: Tensor, num_keys: int, iteration: int) -> None:
        """Write the usage map of a layer and the histogram of its cells, unless it read nothing."""
        if self.board is None and self.wandb is None or not usage.any():
            return
        load = relative_load(usage.cpu().numpy(), num_keys)
        levels, edges = load_levels(load)
        if self.usage_map is None:
            self.usage_map = UsageMap(num_keys)
        figure = self.usage_map.draw(load, f"layer {layer}, iteration {iteration}")
        map_name = f"memory/usage_map/layer_{layer}"
        histogram_name = f"memory/log2_relative_load/layer_{layer}"
        if self.board is not None:
            self.board.add_figure(map_name, figure, iteration)
            self.board.add_histogram(histogram_name, levels, iteration, bins=edges)
        if self.wandb is not None:
            # wandb.Image uses matplotlib.pyplot but does not import it
            importlib.import_module("matplotlib.pyplot")
            histogram = self.wandb.Histogram(np_histogram=np.histogram(levels, edges))
            shown = {map_name: self.wandb.Image(figure), histogram_name: histogram}
            self.wandb.log(shown, iteration)


def is_measured(spec: MemorySpec, args: argparse.Namespace) -> bool:
    """Whether --memory-metrics is on for this command line; the same on all ranks."""
    if spec.metrics == "auto":
        return bool(args.tensorboard_dir or getattr(args, "wandb_project", None))
    return spec.metrics == "on"


def layout(reported: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """The layout of TensorBoard's custom scalars, with one chart for all layers or tables.

    TensorBoard shows a chart also where nothing is written for it, so that only the numbers of a
    run have one: a layer may have no gate, and only sparse finetuning chooses rows.
    """
    kinds = {name.split("/")[1] for name in reported}
    charts = {
        title: ["Multiline", [f"memory/{name}/.*"]]
        for name, title in TITLES.items()
        if name in kinds
    }
    first = {TITLES[name]: charts[TITLES[name]] for name in SUMMARY if name in kinds}
    first = {"loss": ["Multiline", ["^lm loss$"]], **first}
    rest = {title: chart for title, chart in charts.items() if title not in first}
    return {"memory: how it is used": first, "memory: tables and ranks": rest}


def console_line(scalars: dict[str, float]) -> str:
    """The numbers of IN_CONSOLE, as means over layers or tables, in one line."""
    words = []
    for name, text in IN_CONSOLE.items():
        values = [value for key, value in scalars.items() if key.split("/")[1] == name]
        if values:
            words.append(text.format(math.fsum(values) / len(values)))
    return f"memory: {' | '.join(words) or 'nothing was read'}"

"""Shows what the memory of a run did: TensorBoard, wandb, and a line in the log.

Megatron's writers exist on its last rank alone, so all ranks sum and the last one writes: numbers
every --tensorboard-log-interval, a line and pictures every --log-interval.
"""

import argparse
import inspect
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.training.global_vars import get_args, get_tensorboard_writer, get_wandb_writer
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn

from megamem.config import MemoryConfig
from megamem.layers.expert_table import table_names
from megamem.layers.memory import MemoryLayer
from megamem.megatron.arguments import settings_from_args
from megamem.megatron.optimizer.chain import ChainWithTables, find_tables
from megamem.metrics import Metrics, Report, Watched

Pixels = NDArray[np.uint8]

TITLES = {
    "rows_used": "rows used (%)",
    "kl_from_uniform": "KL of reads from uniform (nats)",
    "top1_weight": "largest weight of a head",
    "score_entropy": "entropy of a head's weights (nats)",
    "gate_mean": "mean gate",
    "grad_norm": "gradient norm of the table",
    "row_norm": "norm of a row",
    "learning_rate": "learning rate of the table",
    "trained_rows": "rows trained per step",
    "trained_lookups": "lookups that read a trained row (%)",
    "shard_load": "lookups of the busiest rank / mean",
    "sent_megabytes": "MB sent per rank and iteration",
    "lookup_ms": "lookup, forward (ms)",
    "exchange_ms": "exchange that was waited for, forward (ms)",
}
SUMMARY = ("rows_used", "kl_from_uniform", "score_entropy", "gate_mean")
IN_CONSOLE = {
    "rows_used": "rows used {:.1f}%",
    "kl_from_uniform": "KL from uniform {:.3f}",
    "top1_weight": "top-1 weight {:.3f}",
    "score_entropy": "entropy {:.3f}",
    "gate_mean": "gate {:.4f}",
    "grad_norm": "table grad norm {:.3g}",
    "row_norm": "row norm {:.4g}",
    "trained_rows": "rows trained {:.4g}",
    "trained_lookups": "by {:.1f}% of lookups",
    "shard_load": "shard load {:.2f}",
}


class TrainingMetrics:
    """Measures the model that Megatron set up, and shows it when Megatron logs."""

    def __init__(self) -> None:
        self.metrics: Metrics | None = None
        self.optimizer: ChainWithTables | None = None
        self.writers: Writers | None = None
        self.iterations = 0
        self.usage: dict[int, Tensor] = {}

    def watch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """setup_model_and_optimizer that remembers what it returns."""

        def setup_model_and_optimizer(*rest: Any, **more: Any) -> Any:
            found = original(*rest, **more)
            chunks, optimizer, *_ = found
            settings = settings_from_args(get_args())
            if settings is not None and is_measured(get_args(), settings.memory):
                self._attach(chunks, optimizer, settings.memory)
            return found

        return setup_model_and_optimizer

    def log(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """training_log that shows the memory after the rest."""
        signature = inspect.signature(original)

        def training_log(*rest: Any, **more: Any) -> Any:
            done = original(*rest, **more)
            if self.metrics is not None:
                self._log(get_args(), signature.bind(*rest, **more).arguments["iteration"])
            return done

        return training_log

    def _attach(self, chunks: Iterable[nn.Module], optimizer: Any, memory: MemoryConfig) -> None:
        # a run that only evaluates has no tables' optimizer, and nothing to record
        if not isinstance(optimizer, ChainWithTables):
            return
        layers = sorted(memory.memory_layers)
        watched = Watched(
            layers=layers,
            tables=table_names(memory),
            num_keys=memory.memory_num_keys,
            heads=memory.memory_heads,
            topk=memory.memory_topk,
        )
        self.metrics, self.optimizer = Metrics(watched, torch.cuda.current_device()), optimizer
        self.iterations = 0
        for module in (module for chunk in chunks for module in chunk.modules()):
            if isinstance(module, MemoryLayer):
                module.metrics = self.metrics.layers[module.layer]
        for name, table in find_tables(chunks).items():
            table.metrics = self.metrics.tables[name]

    def _log(self, args: argparse.Namespace, iteration: int) -> None:
        assert self.metrics is not None and self.optimizer is not None
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
            self.writers = Writers(get_tensorboard_writer(), get_wandb_writer())
        if to_writer:
            self.writers.scalars(report.scalars, iteration)
        if to_console:
            sys.stdout.write(f" {console_line(report.scalars)}\n")
            sys.stdout.flush()
            assert self.metrics is not None
            for layer, counted in self.usage.items():
                self.writers.pictures(layer, counted, self.metrics.watched.num_keys, iteration)
            self.usage.clear()


class Writers:
    """Megatron's TensorBoard and wandb writers, either of which may be None."""

    def __init__(self, board: Any, wandb: Any) -> None:
        self.board, self.wandb = board, wandb
        if board is not None:
            board.add_custom_scalars(layout())

    def scalars(self, scalars: dict[str, float], iteration: int) -> None:
        """Every number under its name."""
        if self.board is not None:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, iteration)
        if self.wandb is not None:
            self.wandb.log(scalars, iteration)

    def pictures(self, layer: int, usage_PP: Tensor, num_keys: int, iteration: int) -> None:
        """The usage map and the histogram of a layer."""
        if self.board is None and self.wandb is None or not usage_PP.any():
            return
        load_PP = relative_load(usage_PP.cpu().numpy(), num_keys)
        images = {
            f"memory/usage_map/layer_{layer}": usage_map(load_PP),
            f"memory/usage_histogram/layer_{layer}": usage_histogram(load_PP),
        }
        if self.board is not None:
            for name, image in images.items():
                self.board.add_image(name, image, iteration, dataformats="HWC")
        if self.wandb is not None:
            shown = {name: self.wandb.Image(image) for name, image in images.items()}
            self.wandb.log(shown, iteration)


def is_measured(args: argparse.Namespace, memory: MemoryConfig) -> bool:
    """Whether --memory-metrics is on for this command line; all ranks answer alike."""
    if memory.memory_metrics == "auto":
        return bool(args.tensorboard_dir or getattr(args, "wandb_project", None))
    return memory.memory_metrics == "on"


def layout() -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's custom scalars: what matters on one page, all layers in one chart."""
    charts = {title: ["Multiline", [f"memory/{name}/.*"]] for name, title in TITLES.items()}
    first = {TITLES[name]: charts[TITLES[name]] for name in SUMMARY}
    first = {"loss": ["Multiline", ["^lm loss$"]], **first}
    rest = {title: chart for title, chart in charts.items() if title not in first}
    return {"memory: is it used?": first, "memory: tables and ranks": rest}


def console_line(scalars: dict[str, float]) -> str:
    """The mean over layers and tables of what matters, in one line."""
    words = []
    for name, text in IN_CONSOLE.items():
        values = [value for key, value in scalars.items() if key.split("/")[1] == name]
        if values:
            words.append(text.format(math.fsum(values) / len(values)))
    return f"memory: {' | '.join(words) or 'nothing was read'}"


def relative_load(usage_PP: NDArray[Any], num_keys: int) -> NDArray[np.float64]:
    """Reads of each cell over those of a uniform pick of rows -> [P, P]; 1 is uniform."""
    side = len(usage_PP)
    keys_P = np.bincount(np.arange(num_keys) * side // num_keys, minlength=side)
    expected_PP = np.outer(keys_P, keys_P) * (usage_PP.sum() / num_keys**2)
    return np.asarray(usage_PP / expected_PP, dtype=np.float64)


# log2 of the relative load at the ends of the colours
REACH = 6
# unread, then from dark to light: as even steps of lightness, which also print in grey
UNREAD = (0, 0, 0)
COLOURS = np.array(
    [(40, 20, 90), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=float
)
INK, PAPER, BARS = (30, 30, 30), (255, 255, 255), (87, 16, 110)
MARKS = {-REACH: f"1/{2**REACH}", -REACH // 2: f"1/{2 ** (REACH // 2)}", 0: "uniform"} | {
    REACH // 2: f"{2 ** (REACH // 2)}x",
    REACH: f"{2**REACH}x",
}


def usage_map(load_PP: NDArray[np.float64]) -> Pixels:
    """Sub-keys of the first half downwards, of the second across; colour is log2 of the load.

    Never read is black; the strip below says what colours mean.

    Returns:
        [height, width, 3], at least 256 wide.
    """
    zoom = max(1, -(-256 // len(load_PP)))
    cells = np.kron(_colours(load_PP), np.ones((zoom, zoom, 1), dtype=np.uint8))
    width = cells.shape[1]
    steps = np.exp2(np.linspace(-REACH, REACH, width))[None]
    strip = np.repeat(_colours(steps), 12, axis=0)
    canvas = Image.new("RGB", (width, len(cells) + 34), PAPER)
    canvas.paste(Image.fromarray(cells), (0, 0))
    canvas.paste(Image.fromarray(strip), (0, len(cells) + 4))
    _label(ImageDraw.Draw(canvas), 0, width - 1, len(cells) + 18)
    return np.asarray(canvas)


def usage_histogram(load_PP: NDArray[np.float64]) -> Pixels:
    """How many cells have what load, in half powers of two; the first bar is those never read.

    A cell is a row where N <= 256.

    Returns:
        [height, width, 3]
    """
    read = load_PP[load_PP > 0]
    edges = np.arange(-REACH - 0.25, REACH + 0.5, 0.5)
    counts, _ = np.histogram(np.clip(np.log2(read), -REACH, REACH), edges)
    unread = int(load_PP.size - read.size)
    tallest = max(int(counts.max()), unread)

    # as wide as TensorBoard shows it, so that the words stay legible
    width, height, margin = 256, 200, 20
    base, first, last = height - margin, 56, width - 14
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)

    def bar(middle: float, count: int, colour: tuple[int, int, int]) -> None:
        if count:
            top = base - max(1, (base - margin) * count / tallest)
            draw.rectangle((middle - 3, top, middle + 3, base), colour)

    middle = (first + last) / 2
    draw.line((middle, margin, middle, base), fill=(160, 160, 160))
    bar(margin, unread, UNREAD)
    for place, count in enumerate(counts):
        bar(first + (last - first) * place / (len(counts) - 1), int(count), BARS)
    draw.line((0, base, width, base), fill=INK)
    draw.text((2, 4), f"cells by load; tallest bar {tallest:,} of {load_PP.size:,}", INK)
    draw.text((2, base + 4), "unread", INK)
    _label(draw, first, last, base + 4)
    return np.asarray(canvas)


def _label(draw: ImageDraw.ImageDraw, first: float, last: float, top: float) -> None:
    for power, text in MARKS.items():
        at = first + (last - first) * (power + REACH) / (2 * REACH)
        anchor = "la" if at < 10 else "ra" if at > draw.im.size[0] - 10 else "ma"
        draw.text((at, top), text, INK, anchor=anchor)


def _colours(load: NDArray[np.float64]) -> Pixels:
    with np.errstate(divide="ignore"):
        level = (np.clip(np.log2(load), -REACH, REACH) + REACH) / (2 * REACH)
    at = level * (len(COLOURS) - 1)
    channels = [np.interp(at, np.arange(len(COLOURS)), channel) for channel in COLOURS.T]
    pixels = np.stack(channels, axis=-1)
    pixels[load <= 0] = UNREAD
    return pixels.astype(np.uint8)

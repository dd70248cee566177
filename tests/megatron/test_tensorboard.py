"""Reads the event files that a run writes, what wandb gets, and the pixels of the usage map."""

import argparse
import gc
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from megamem.config import MemoryConfig
from megamem.megatron.reports.tensorboard import (
    TITLES,
    Writers,
    console_line,
    is_measured,
    layout,
)
from megamem.megatron.reports.usage_pictures import (
    REACH,
    TICKS,
    UsageMap,
    load_levels,
    relative_load,
)
from megamem.resolution import resolve
from tests.helpers.megatron_runs import TrainingLog, run_training

MEMORY = (
    *("--memory-layers", 0, 1),
    *("--memory-num-keys", 9),
    *("--memory-heads", 2),
    *("--memory-topk", 4),
    *("--memory-lr", 3e-3),
)
OF_LAYERS = ("rows_used", "kl_from_uniform", "top1_weight", "score_entropy", "gate_mean")
OF_FINETUNING = ("trained_rows", "trained_lookups")
OF_ULTRAMEM = ("weight_mean", "core_loss", "balance_loss")
OF_OTHERS = (*OF_LAYERS, *OF_FINETUNING, *OF_ULTRAMEM)
OF_TABLES = tuple(name for name in TITLES if name not in OF_OTHERS)
# these depend on the layout of the table or on the clock
OF_LAYOUT = ("shard_load", "sent_megabytes", "lookup_ms", "exchange_ms")

VIRIDIS = [
    tuple(colour) for colour in matplotlib.colormaps["viridis"](range(256), bytes=True)[:, :3]
]


def _events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(
        str(folder), size_guidance={"images": 0, "scalars": 0, "histograms": 0}
    )
    return events.Reload()


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every number of the memory, each of which is in the run of its layer or table."""
    found = {}
    for run in (path for path in folder.iterdir() if path.is_dir()):
        events = _events(run)
        for tag in events.Tags()["scalars"]:
            assert tag.startswith("memory/") and tag.endswith(f"/{run.name}")
            found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Callable[..., tuple[TrainingLog, Path]]:
    def run(name: str, ranks: int, *flags: object) -> tuple[TrainingLog, Path]:
        folder = tmp_path_factory.mktemp(name)
        words = (*MEMORY, "--tensorboard-dir", folder, *flags)
        return run_training(name, ranks, *words), folder

    return run


@pytest.fixture(scope="module")
def alone(train) -> tuple[TrainingLog, Path]:
    return train("alone", 1)


@pytest.mark.gloo
def test_every_number_of_every_layer_and_table_is_written(alone) -> None:
    log, folder = alone
    scalars = _scalars(folder)
    expected = {f"memory/{name}/layer_{layer}" for name in OF_LAYERS for layer in (0, 1)}
    assert set(scalars) == expected | {f"memory/{name}/shared" for name in OF_TABLES}
    assert all([step for step, _ in values] == [1, 2, 3, 4, 5] for values in scalars.values())
    for layer in (0, 1):
        for name, low, high in (
            ("rows_used", 50, 100),
            ("kl_from_uniform", 0, np.log(81)),
            ("top1_weight", 1 / 4, 1),
            ("score_entropy", 0, np.log(4)),
        ):
            assert all(low < v <= high for _, v in scalars[f"memory/{name}/layer_{layer}"])
    assert scalars["memory/learning_rate/shared"][0][1] == pytest.approx(3e-3)
    # Megatron's norm includes that of the tables
    norms = [value for _, value in scalars["memory/grad_norm/shared"]]
    assert all(0 < n < whole for n, whole in zip(norms, log.grad_norms, strict=True))


@pytest.mark.gloo
@pytest.mark.parametrize(("variant", "sub_keys"), [("ultramem", 18), ("ultramem-v2", 9)])
def test_scores_that_are_no_softmax_are_measured(variant: str, sub_keys: int, train) -> None:
    """Of 81 rows, which ultramem reads as four virtual blocks."""
    flags = ("--memory-variant", variant, "--memory-final-topk", 6)
    _, folder = train(variant, 1, *flags, "--train-iters", 3)
    scalars = _scalars(folder)
    numbers = {*OF_LAYERS, "weight_mean"} - {"gate_mean"}
    expected = {f"memory/{name}/layer_{layer}" for name in numbers for layer in (0, 1)}
    expected |= {f"memory/{name}/layer_{layer}" for name in OF_TABLES for layer in (0, 1)}
    if variant == "ultramem":
        expected |= {f"memory/core_loss/layer_{layer}" for layer in (0, 1)}
    else:
        # a pass is timed once, with the values
        own = [name for name in OF_TABLES if not name.endswith("_ms")]
        expected |= {f"memory/{name}/layer_{layer}.p" for name in own for layer in (0, 1)}
    assert set(scalars) == expected
    for layer in (0, 1):
        for name, low, high in (
            ("rows_used", 50, 100),
            ("kl_from_uniform", 0, np.log(sub_keys**2)),
            ("top1_weight", 1 / 6, 1),
            ("score_entropy", 0, np.log(6)),
            # the initial gains make it about one
            ("weight_mean", 0.3, 4),
        ):
            assert all(low < v <= high for _, v in scalars[f"memory/{name}/layer_{layer}"]), name
        used = dict(scalars[f"memory/rows_used/layer_{layer}"])
        (*_, event) = _events(folder).Histograms(f"memory/log2_relative_load/layer_{layer}")
        # the map has a cell for each pair of sub-keys
        pairs = sub_keys**2 * used[event.step] / 100
        assert event.histogram_value.num == pytest.approx(pairs)


@pytest.mark.gloo
def test_pictures_and_one_page_for_all(alone) -> None:
    _, folder = alone
    events = _events(folder)
    assert set(events.Tags()["images"]) == {f"memory/usage_map/layer_{n}" for n in (0, 1)}
    loads = {f"memory/log2_relative_load/layer_{n}" for n in (0, 1)}
    assert set(events.Tags()["histograms"]) == loads
    for layer in (0, 1):
        images = events.Images(f"memory/usage_map/layer_{layer}")
        assert [image.step for image in images] == [1, 2, 3, 4, 5]
        pixels = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)))
        colours = {tuple(colour) for colour in pixels.reshape(-1, 3)}
        # the colours of cells and of the colour bar
        assert len(colours & set(VIRIDIS)) > 16
        histograms = events.Histograms(f"memory/log2_relative_load/layer_{layer}")
        used = dict(_scalars(folder)[f"memory/rows_used/layer_{layer}"])
        assert [event.step for event in histograms] == [1, 2, 3, 4, 5]
        for event in histograms:
            # the map of a table of 81 rows has a cell for each row
            assert event.histogram_value.num == pytest.approx(81 * used[event.step] / 100)
    config = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    page = layout_pb2.Layout.FromString(config)
    shown = {chart.title for category in page.category for chart in category.chart}
    written = {name.split("/")[1] for name in _scalars(folder) if name.startswith("memory/")}
    assert shown == {"loss", *(TITLES[name] for name in written)}
    # TensorBoard has a colour for each run
    runs = {path.name for path in folder.iterdir() if path.is_dir()}
    assert runs == {"layer_0", "layer_1", "shared"}
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("memory/")]
    # this run chooses no rows
    assert TITLES["gate_mean"] in shown and TITLES["trained_rows"] not in shown


@pytest.mark.gloo
def test_the_log_says_it_in_one_line(alone) -> None:
    log, folder = alone
    lines = [line.strip() for line in log.stdout.splitlines() if line.startswith(" memory: ")]
    assert len(lines) == 5
    assert lines[-1] == console_line({name: v[-1][1] for name, v in _scalars(folder).items()})


@pytest.mark.gloo
@pytest.mark.parametrize(
    "flags",
    [
        ("--tensor-model-parallel-size", 2),
        ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--memory-mode", "column"),
        (),  # two replicas of the table
        ("--memory-group-size", 2, "--recompute-granularity", "full", "--recompute-method")
        + ("uniform", "--recompute-num-layers", 1),
    ],
    ids=["tp2", "tp2-sp-column", "dp2", "dp2-wide-recompute"],
)
def test_two_ranks_write_what_one_does(flags, alone, train) -> None:
    _, folder = train("two", 2, *flags)
    ours, theirs = _scalars(folder), _scalars(alone[1])
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        if name.split("/")[1] not in OF_LAYOUT:
            # a near tie may be decided differently once the weights differ in their last bits
            assert ours[name][0] == pytest.approx(values[0], rel=1e-5), name
            assert [v for _, v in ours[name]] == pytest.approx([v for _, v in values], rel=5e-3)
    load = [value for _, value in ours["memory/shard_load/shared"]]
    assert all(1 <= value < 2 for value in load)
    sent = [value for _, value in ours["memory/sent_megabytes/shared"]]
    replicas = not flags
    assert all((value == 0) == replicas for value in sent)


@pytest.mark.gloo
def test_a_stage_without_memories_takes_part(train) -> None:
    """The last rank writes although it has no memory layer, at Megatron's intervals."""
    pipeline = ("--pipeline-model-parallel-size", 2, "--untie-embeddings-and-output-weights")
    log, folder = train(
        "pp2",
        2,
        *pipeline,
        "--log-interval",
        2,
        "--tensorboard-log-interval",
        4,
        "--train-iters",
        6,
    )
    scalars = _scalars(folder)
    assert all([step for step, _ in values] == [4] for values in scalars.values())
    assert len(scalars) == 2 * len(OF_LAYERS) + len(OF_TABLES)
    assert [e.step for e in _events(folder).Images("memory/usage_map/layer_1")] == [2, 4, 6]
    assert sum(line.startswith(" memory: ") for line in log.stdout.splitlines()) == 3


@pytest.mark.gloo
def test_off_is_off(train) -> None:
    log, folder = train("off", 1, "--memory-metrics", "off")
    assert not _scalars(folder) and " memory: " not in log.stdout


@pytest.mark.parametrize(
    ("setting", "folder", "project", "expected"),
    [
        ("auto", None, None, False),
        ("auto", "here", None, True),
        ("auto", None, "mine", True),
        ("on", None, None, True),
        ("off", "here", "mine", False),
    ],
)
def test_who_is_measured(setting, folder, project, expected) -> None:
    args = argparse.Namespace(tensorboard_dir=folder, wandb_project=project)
    assert is_measured(resolve(MemoryConfig(memory_metrics=setting), 16), args) == expected


class Wandb:
    """Records the calls of a wandb module."""

    def __init__(self) -> None:
        self.told: list[tuple[dict[str, Any], int]] = []

    def log(self, what: dict[str, Any], step: int) -> None:
        self.told.append((what, step))

    def Image(self, figure: Figure) -> SimpleNamespace:
        # wandb uses it without importing it
        assert figure != matplotlib.pyplot
        return SimpleNamespace(pixels=_pixels(figure))

    def Histogram(self, *, np_histogram: tuple[NDArray[Any], NDArray[Any]]) -> SimpleNamespace:
        return SimpleNamespace(counts=np_histogram[0], edges=np_histogram[1])


def test_wandb_gets_numbers_and_pictures(monkeypatch) -> None:
    # as in a run that draws no other pictures
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    monkeypatch.delattr(matplotlib, "pyplot", raising=False)
    wandb = Wandb()
    writers = Writers(None, wandb)
    writers.scalars({"memory/rows_used/layer_4": 12.5}, 7)
    writers.pictures(4, torch.ones(9, 9), 9, 7)
    assert wandb.told[0] == ({"memory/rows_used/layer_4": 12.5}, 7)
    pictures, step = wandb.told[1]
    assert step == 7
    assert set(pictures) == {"memory/usage_map/layer_4", "memory/log2_relative_load/layer_4"}
    assert len(np.unique(pictures["memory/usage_map/layer_4"].pixels.reshape(-1, 3), axis=0)) > 256
    assert pictures["memory/log2_relative_load/layer_4"].counts.tolist() == [81]
    assert pictures["memory/log2_relative_load/layer_4"].edges.tolist() == [-0.25, 0.25]


def test_a_layer_that_read_nothing_has_no_picture(tmp_path: Path) -> None:
    board = SummaryWriter(str(tmp_path))
    Writers(board, None).pictures(1, torch.zeros(9, 9), 9, 1)
    board.close()
    tags = _events(tmp_path).Tags()
    assert not tags["images"] and not tags["histograms"]


def test_pictures_leave_nothing_behind(tmp_path: Path) -> None:
    """It must hold without the collector of cycles, as with --manual-gc; matplotlib makes many."""

    def count() -> int:
        kinds = (Artist, FigureCanvasAgg, RendererAgg)
        return sum(issubclass(type(thing), kinds) for thing in gc.get_objects())

    board = SummaryWriter(str(tmp_path))
    writers = Writers(board, None)
    gc.disable()
    try:
        writers.pictures(1, torch.ones(9, 9), 9, 1)
        before = count()
        for iteration in range(2, 6):
            writers.pictures(1, torch.ones(9, 9), 9, iteration)
        assert count() == before > 0
    finally:
        gc.enable()
        board.close()
    assert len(_events(tmp_path).Images("memory/usage_map/layer_1")) == 5


@pytest.mark.parametrize("kinds", [[*TITLES], ["row_norm", "rows_used"], []])
def test_the_page_names_every_number_of_a_run_once(kinds: list[str]) -> None:
    page = layout(f"memory/{kind}/{layer}" for kind in kinds for layer in ("layer_1", "layer_2"))
    patterns = [chart[1][0] for charts in page.values() for chart in charts.values()]
    assert sorted(patterns) == sorted(["^lm loss$", *(f"memory/{name}/.*" for name in kinds)])


@pytest.mark.parametrize("num_keys", [9, 300])
def test_load_is_one_where_reads_are_even(num_keys: int) -> None:
    side = min(num_keys, 256)
    keys_P = np.bincount(np.arange(num_keys) * side // num_keys, minlength=side)
    assert relative_load(3.0 * np.outer(keys_P, keys_P), num_keys) == pytest.approx(1)


def _pixels(figure: Figure) -> NDArray[np.uint8]:
    """The RGB pixels of a figure, with the first row at the bottom as in its coordinates."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[::-1, :, :3]


# the logarithm of zero would raise a warning
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_keys", [4, 1024])
def test_the_map_shows_each_cell_where_it_is(num_keys: int) -> None:
    """The axes count sub-keys also if a cell stands for several."""
    load = np.full((4, 4), 2.0**-REACH)
    load[1, 2], load[3, 0], load[0, 3] = 0.0, 2.0**REACH, 1.0
    figure = UsageMap(num_keys).draw(load, "a title")
    pixels = _pixels(figure)
    expected = np.full((4, 4), 0)
    expected[3, 0], expected[0, 3] = 255, 128
    for first in range(4):
        for second in range(4):
            middle = [(place + 0.5) * num_keys / 4 - 0.5 for place in (second, first)]
            column, row = figure.axes[0].transData.transform(middle).round().astype(int)
            colour = (0, 0, 0) if (first, second) == (1, 2) else VIRIDIS[expected[first, second]]
            assert tuple(pixels[row, column]) == colour, (first, second)


def test_the_map_says_what_it_shows() -> None:
    figure = UsageMap(4).draw(np.ones((4, 4)), "layer 3, iteration 7")
    axes, bar = figure.axes
    assert axes.get_title() == "layer 3, iteration 7"
    assert axes.get_xlabel() == "sub-key of the second half"
    assert axes.get_ylabel() == "sub-key of the first half"
    labels = [label.get_text() for label in bar.get_yticklabels()]
    assert dict(zip(bar.get_yticks(), labels, strict=True)) == TICKS
    assert (bar.get_ylim(), TICKS[0]) == ((-REACH, REACH), "uniform")
    for level, label in TICKS.items():
        factor = 2.0**level
        assert label in ("uniform", f"{factor:g}x", f"1/{1 / factor:g}")


def test_the_histogram_counts_each_cell_that_was_read_once() -> None:
    load = np.array([[0.0] * 6 + [2.0**-9] * 3 + [0.9] + [1.0] * 12 + [2.0**3.5] * 6])
    levels, edges = load_levels(load)
    counts, _ = np.histogram(levels, edges)
    middles = (edges[1:] + edges[:-1]) / 2
    found = {middle: count for middle, count in zip(middles, counts, strict=True) if count}
    assert found == {-9: 3, 0: 13, 3.5: 6}

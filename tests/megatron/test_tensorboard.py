"""What a run writes for TensorBoard: event files read back, and the pictures' pixels."""

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from megamem.config import MemoryConfig
from megamem.megatron.reports import tensorboard
from megamem.megatron.reports.tensorboard import (
    TITLES,
    UNREAD,
    Writers,
    console_line,
    is_measured,
    layout,
    relative_load,
    usage_histogram,
    usage_map,
)
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
OF_TABLES = tuple(name for name in TITLES if name not in (*OF_LAYERS, *OF_FINETUNING))
# depend on where the table lies, or on the clock
OF_LAYOUT = ("shard_load", "sent_megabytes", "lookup_ms", "exchange_ms")


def _events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return events.Reload()


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = _events(folder)
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.startswith("memory/")
    }


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
    # as Megatron takes the norm, the tables' is a part of the whole
    norms = [value for _, value in scalars["memory/grad_norm/shared"]]
    assert all(0 < n < whole for n, whole in zip(norms, log.grad_norms, strict=True))


@pytest.mark.gloo
def test_pictures_and_one_page_for_all(alone) -> None:
    _, folder = alone
    events = _events(folder)
    pictures = {f"memory/usage_{kind}/layer_{n}" for kind in ("map", "histogram") for n in (0, 1)}
    assert set(events.Tags()["images"]) == pictures
    for name in pictures:
        images = events.Images(name)
        assert [image.step for image in images] == [1, 2, 3, 4, 5]
        pixels = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 2
    config = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    page = layout_pb2.Layout.FromString(config)
    shown = {chart.title for category in page.category for chart in category.chart}
    assert shown == {"loss", *TITLES.values()}


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
            # a near tie may go the other way once the weights differ in their last bits
            assert ours[name][0] == pytest.approx(values[0], rel=1e-5), name
            assert [v for _, v in ours[name]] == pytest.approx([v for _, v in values], rel=5e-3)
    load = [value for _, value in ours["memory/shard_load/shared"]]
    assert all(1 <= value < 2 for value in load)
    sent = [value for _, value in ours["memory/sent_megabytes/shared"]]
    replicas = not flags
    assert all((value == 0) == replicas for value in sent)


@pytest.mark.gloo
def test_a_stage_without_memories_takes_part(train) -> None:
    """The last rank writes, and has no memory layer; intervals are Megatron's."""
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
    assert is_measured(args, MemoryConfig(memory_metrics=setting)) == expected


class Wandb:
    """Keeps what a wandb module is told."""

    def __init__(self) -> None:
        self.told: list[tuple[dict[str, Any], int]] = []

    def log(self, what: dict[str, Any], step: int) -> None:
        self.told.append((what, step))

    def Image(self, pixels: Any) -> SimpleNamespace:
        return SimpleNamespace(pixels=pixels)


def test_wandb_gets_numbers_and_pictures() -> None:
    wandb = Wandb()
    writers = Writers(None, wandb)
    writers.scalars({"memory/rows_used/layer_4": 12.5}, 7)
    writers.pictures(4, torch.ones(9, 9), 9, 7)
    assert wandb.told[0] == ({"memory/rows_used/layer_4": 12.5}, 7)
    pictures, step = wandb.told[1]
    assert step == 7
    assert set(pictures) == {"memory/usage_map/layer_4", "memory/usage_histogram/layer_4"}
    assert pictures["memory/usage_map/layer_4"].pixels.shape[1] >= 256


def test_a_layer_that_read_nothing_has_no_picture(tmp_path: Path) -> None:
    board = SummaryWriter(str(tmp_path))
    Writers(board, None).pictures(1, torch.zeros(9, 9), 9, 1)
    board.close()
    assert not _events(tmp_path).Tags()["images"]


def test_the_page_names_every_number_once() -> None:
    patterns = [chart[1][0] for page in layout().values() for chart in page.values()]
    assert sorted(patterns) == sorted(["^lm loss$", *(f"memory/{name}/.*" for name in TITLES)])


@pytest.mark.parametrize("num_keys", [9, 300])
def test_load_is_one_where_reads_are_even(num_keys: int) -> None:
    side = min(num_keys, 256)
    keys_P = np.bincount(np.arange(num_keys) * side // num_keys, minlength=side)
    assert relative_load(3.0 * np.outer(keys_P, keys_P), num_keys) == pytest.approx(1)


def test_the_map_shows_each_cell_where_it_is() -> None:
    load = np.full((4, 4), 2.0**-6)
    load[1, 2], load[3, 0] = 0.0, 2.0**6
    pixels = usage_map(load)
    cells = pixels[32:256:64, 32:256:64].astype(int)
    assert tuple(cells[1, 2]) == UNREAD
    brightness = cells.sum(-1)
    assert brightness[3, 0] == brightness.max() > 3 * brightness[0, 0] > 0


def test_the_histogram_counts_each_cell_once() -> None:
    load = np.array([[0.0] * 6 + [2.0**-9] * 3 + [1.0] * 12 + [2.0**3] * 6])
    pixels = usage_histogram(load)
    bars = {}
    for colour in (UNREAD, tensorboard.BARS):
        ink = (pixels[20:178] == colour).all(-1).sum(0)
        bars |= {int(at): int(ink[at]) for at in np.flatnonzero(ink)}
    heights = [bars[at] for at in sorted(bars) if at - 1 not in bars]
    # in order: unread, at the low end what is below it, even, eight times
    assert heights == pytest.approx([80, 40, 159, 80], abs=2)

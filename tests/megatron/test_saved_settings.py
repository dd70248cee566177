"""A checkpoint never loads as something else than it was."""

import argparse
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamem.checkpoint import FORMAT, SAVED, SETTINGS, TUCKER_SETTINGS, settings_of
from megamem.config import ConfigurationError, MemoryConfig
from megamem.megatron import patches
from megamem.megatron.startup.saved_model import loaded_checkpoint, local_problems
from megamem.resolution import resolve
from megamem.saved_settings import setting_problems, settings_in, take_settings
from megamem.spec import Layout
from tests.helpers.megatron_runs import ROOT, run_training
from tests.megatron.test_tiny_training import MEMORY

CONFIG = MemoryConfig(memory_layers=[1, 2], memory_num_keys=8, memory_topk=2)
SPEC = resolve(CONFIG, 16)
LONG = ("--train-iters", 4, "--lr-decay-iters", 4)

pytestmark = pytest.mark.gloo


NAMED = "--load X"
FOLDERS = ("saved", "saved/non_persistent", "other", "untracked")


def _flags(config: MemoryConfig, **more: object) -> argparse.Namespace:
    return argparse.Namespace(hidden_size=16, **vars(config), **more)


def test_settings_come_back_as_they_were_saved() -> None:
    args = argparse.Namespace(**{SAVED: settings_of(SPEC)})
    assert settings_in({"args": args}, NAMED) == settings_of(SPEC)
    assert setting_problems(settings_of(SPEC), SPEC, "--load X") == []


def test_flags_of_older_checkpoints_say_the_same() -> None:
    """Also those of runs on many ranks, with flags that this release does not know."""
    config = replace(CONFIG, memory_group_size=8, memory_mode="column")
    args = _flags(config, memory_of_the_future=3)
    assert settings_in({"args": args}, NAMED) == settings_of(SPEC)


def test_without_memory_there_is_nothing_to_compare() -> None:
    dense = _flags(MemoryConfig())
    for common in ({"args": dense}, {"args": argparse.Namespace()}, {}):
        assert settings_in(common, NAMED) is None


def test_a_newer_format_is_refused() -> None:
    newer = settings_of(SPEC) | {"format": FORMAT + 1}
    with pytest.raises(ConfigurationError, match="install a newer megamem"):
        settings_in({SAVED: newer}, NAMED)


CHANGES = {
    "layers": ({"memory_layers": [1, 3]}, "--memory-layers 1 3 differs from 1 2"),
    "variant": ({"memory_variant": "memory"}, "--memory-variant memory differs from memory+"),
    "num_keys": ({"memory_num_keys": 9}, "--memory-num-keys 9 differs from 8"),
    "heads": ({"memory_heads": 2}, "--memory-heads 2 differs from 4"),
    "topk": ({"memory_topk": 3}, "--memory-topk 3 differs from 2 in --load X; use --memory-topk 2"),
    "key_dim": ({"memory_key_dim": 32}, "--memory-key-dim 32 differs from 8"),
    "value_dim": ({"memory_value_dim": 24}, "--memory-value-dim 24 differs from 16"),
    "pool": ({"memory_pool": "layer"}, "--memory-pool layer differs from shared"),
    "qk_norm": ({"memory_qk_norm": True}, "was trained without it; drop --memory-qk-norm"),
    "keep_ffn": ({"memory_keep_ffn": True}, "was trained without it; drop --memory-keep-ffn"),
    "placement_seed": ({"memory_placement_seed": 5}, "--memory-placement-seed 5 differs from 0"),
}


def test_every_setting_has_a_case() -> None:
    assert tuple(CHANGES) == SETTINGS


@pytest.mark.parametrize("setting", CHANGES)
def test_each_difference_is_one_line_with_the_flag_and_both_values(setting: str) -> None:
    change, message = CHANGES[setting]
    other = resolve(replace(CONFIG, **change), 16)
    problems = setting_problems(settings_of(SPEC), other, "--load X")
    assert any(message in problem for problem in problems), problems
    # what follows from a difference is named with it
    assert all("\n" not in problem and problem.endswith(".") for problem in problems)


V2 = replace(CONFIG, memory_variant="ultramem-v2", memory_pool="layer", memory_value_dim=16)
ULTRAMEM_CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "final_topk": ({"memory_final_topk": 3}, "--memory-final-topk 3 differs from 2 in"),
    "tucker_rank": ({"memory_tucker_rank": 3}, "--memory-tucker-rank 3 differs from 2"),
    "cores": ({"memory_cores": 1}, "--memory-cores 1 differs from 2"),
    "expansion": ({"memory_expansion": 4}, "--memory-expansion 4 differs from 1"),
    "expansion_proj": ({"memory_expansion_proj": "block"}, "block differs from single"),
    "rank_queries": ({"memory_rank_queries": "off"}, "--memory-rank-queries off differs from on"),
    "pre_value_dim": ({"memory_pre_value_dim": 16}, "--memory-pre-value-dim 16 differs from 8"),
    "skip": ({}, "--memory-skip 0 differs from 1"),
    "query_conv": ({"memory_query_conv": 3}, "--memory-query-conv 3 differs from 0"),
    "share_layers": ({"memory_share_layers": 2}, "--memory-share-layers 2 differs from 1"),
    "placement": ({"memory_placement": "stored"}, "--memory-placement stored differs from seed"),
}


def test_every_setting_of_ultramem_has_a_case() -> None:
    assert tuple(ULTRAMEM_CHANGES) == TUCKER_SETTINGS


@pytest.mark.parametrize("setting", ULTRAMEM_CHANGES)
def test_each_difference_of_ultramem_is_named_and_taken_over(setting: str) -> None:
    change, message = ULTRAMEM_CHANGES[setting]
    saved = settings_of(resolve(V2, 16)) | ({"skip": 1} if setting == "skip" else {})
    problems = setting_problems(saved, resolve(replace(V2, **change), 16), NAMED)
    assert len(problems) == 1 and message in problems[0], problems
    other = settings_of(resolve(replace(V2, **change), 16))
    args = _flags(V2)
    said = take_settings(args, {SAVED: other}, NAMED)
    if change:
        assert any(f"--memory-{setting.replace('_', '-')} " in each for each in said), said
    del args.hidden_size
    assert settings_of(resolve(MemoryConfig(**vars(args)), 16)) == other


def test_a_flag_that_was_dropped_is_to_be_added() -> None:
    kept = resolve(replace(CONFIG, memory_keep_ffn=True), 16)
    [problem] = setting_problems(settings_of(kept), SPEC, "--load X")
    assert problem.endswith("was trained with it; add --memory-keep-ffn.")


@pytest.mark.parametrize(
    ("saved", "spec", "flags", "message"),
    [
        (CONFIG, SPEC, {}, None),
        (CONFIG, resolve(replace(CONFIG, memory_topk=3), 16), {}, "--memory-topk 3 differs from 2"),
        (CONFIG, replace(SPEC, optimizer="sgd"), {}, "--memory-optimizer sgd differs from adamw"),
        (CONFIG, replace(SPEC, optimizer="sgd"), {"no_load_optim": True}, None),
        (CONFIG, replace(SPEC, optimizer="sgd"), {"finetune": True}, None),
        (CONFIG, None, {}, "holds memory layers, but --memory-layers is not given"),
        (MemoryConfig(), SPEC, {}, "start without --non-persistent-local-ckpt-dir"),
        (MemoryConfig(), None, {}, None),
    ],
)
def test_a_local_checkpoint_is_compared_by_its_settings(saved, spec, flags, message) -> None:
    args = argparse.Namespace(
        **{"non_persistent_local_ckpt_dir": "X", "finetune": False, "no_load_optim": False} | flags
    )
    found = local_problems({"args": _flags(saved)}, spec, args)
    if message is None:
        assert found == []
    else:
        [problem] = found
        assert message in problem and "--non-persistent-local-ckpt-dir" in problem


def test_another_hidden_size_comes_first() -> None:
    [problem] = setting_problems(settings_of(SPEC), resolve(CONFIG, 32), "--load X")
    assert problem == "--hidden-size 32 differs from 16 in --load X; use --hidden-size 16."


def test_what_may_differ_may() -> None:
    other = replace(
        SPEC, layout=Layout("column", 8, 8), wire="alltoall", optimizer="sgd", lr=0.5, seed=7
    )
    assert setting_problems(settings_of(SPEC), other, "--load X") == []


def test_settings_are_taken_from_a_checkpoint() -> None:
    saved = _flags(replace(CONFIG, memory_keep_ffn=True, memory_lr=0.5))
    args = _flags(MemoryConfig(memory_topk=32, memory_lr=0.1))
    taken = take_settings(args, {"args": saved}, NAMED)
    assert "--memory-layers 1 2" in taken and "--memory-keep-ffn True" in taken
    assert args.memory_layers == [1, 2] and args.memory_topk == 2 and args.memory_keep_ffn
    # a learning rate is not part of the model
    assert args.memory_lr == 0.1


@pytest.mark.parametrize("width", [None, 24])
@pytest.mark.parametrize("args", [None, _flags(MemoryConfig())], ids=["no flags", "dense flags"])
def test_settings_are_taken_from_a_converted_checkpoint(width: int | None, args: Any) -> None:
    """The dense model that memory layers were added to may have left its flags."""
    spec = resolve(replace(CONFIG, memory_value_dim=width), 16)
    common = {SAVED: settings_of(spec)} | ({"args": args} if args else {})
    taken = _flags(MemoryConfig())
    assert "--memory-layers 1 2" in take_settings(taken, common, NAMED)
    assert resolve(MemoryConfig.from_args(taken), 16) == spec
    # other hidden sizes are refused as such
    assert taken.memory_value_dim == width


def test_a_dense_checkpoint_does_not_drop_memory_layers() -> None:
    args = _flags(CONFIG)
    assert take_settings(args, {"args": _flags(MemoryConfig())}, NAMED) == []
    assert args.memory_layers == [1, 2]


def test_checkpoint_args_of_another_format_are_megatrons_alone(tmp_path: Path) -> None:
    _folder(tmp_path, 1)
    args = _flags(MemoryConfig(), load=str(tmp_path))
    take = patches._take_settings(lambda args, load_arg: (args, "as Megatron returned it"))
    assert take(args) == (args, "as Megatron returned it") and args.memory_layers == []


def _folder(path: Path, iteration: int) -> Path:
    """A folder of checkpoints, and in it an iteration without files."""
    (path / f"iter_{iteration:07}").mkdir(parents=True)
    (path / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return path


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ({"load": "saved"}, ("--load", "saved/iter_0000004")),
        ({"load": "saved", "ckpt_step": 2}, ("--load", "saved/iter_0000002")),
        # Megatron does not look for the file that names the latest
        ({"load": "untracked", "ckpt_step": 2}, ("--load", "untracked/iter_0000002")),
        ({"load": "untracked"}, None),
        (
            {"load": "untracked", "pretrained_checkpoint": "saved"},
            ("--pretrained-checkpoint", "saved/iter_0000004"),
        ),
        (
            {"load": "other", "pretrained_checkpoint": "saved"},
            ("--load", "other/iter_0000009"),
        ),
        (
            {"load": "saved", "non_persistent_ckpt_type": "global"},
            ("--load", "saved/non_persistent/iter_0000006"),
        ),
        (
            {
                "load": "other",
                "non_persistent_ckpt_type": "global",
                "elsewhere": "saved/non_persistent",
            },
            ("--load", "other/iter_0000009"),
        ),
        (
            {"load": "untracked", "non_persistent_ckpt_type": "global", "elsewhere": "saved"},
            ("--non-persistent-global-ckpt-dir", "saved/iter_0000004"),
        ),
        (
            {"non_persistent_ckpt_type": "global", "elsewhere": "saved"},
            ("--non-persistent-global-ckpt-dir", "saved/iter_0000004"),
        ),
    ],
)
def test_the_checkpoint_that_megatron_loads(
    tmp_path: Path, flags: dict, found: tuple[str, str] | None
) -> None:
    """It is named by the flag that the user gave for it."""
    for folder, iteration in (("saved", 4), ("saved/non_persistent", 6), ("other", 9)):
        _folder(tmp_path / folder, iteration)
    (tmp_path / "untracked/iter_0000002").mkdir(parents=True)
    words = {
        name: str(tmp_path / value) if value in FOLDERS else value for name, value in flags.items()
    }
    args = argparse.Namespace(**words, non_persistent_global_ckpt_dir=words.get("elsewhere"))
    given = loaded_checkpoint(args)
    assert (given and str(given)) == (f"{found[0]} {tmp_path / found[1]}" if found else None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    saving = ("--save", folder, "--save-interval", 2, "--exit-interval", 2)
    run_training("save", 1, *MEMORY, *LONG, *saving)
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--memory-topk", 2), "--memory-topk 2 differs from 4"),
        (("--memory-variant", "memory", "--memory-key-dim", 32), "--memory-variant memory differs"),
        (("--memory-qk-norm",), "--memory-qk-norm is given, but"),
        (("--memory-keep-ffn",), "--memory-keep-ffn is given, but"),
        (("--memory-layers", 1), "--memory-layers 1 differs from 0 1"),
        (("--hidden-size", 32), "--hidden-size 32 differs from 64"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value[0]),
)
def test_a_run_refuses_a_checkpoint_of_another_model(saved, flags, message) -> None:
    log = run_training("other", 1, *MEMORY, *LONG, "--load", saved, *flags, check=False)
    assert log.returncode != 0 and not log.iterations
    assert log.stdout.count("megamem: error: ") == 1 and message in log.stdout
    assert "Traceback" not in log.stdout


def test_feed_forwards_are_not_dropped(tmp_path: Path) -> None:
    saving = ("--save", tmp_path, "--save-interval", 2, "--exit-interval", 2)
    run_training("save", 1, *MEMORY, *LONG, *saving, "--memory-keep-ffn")
    log = run_training("dropped", 1, *MEMORY, *LONG, "--load", tmp_path, check=False)
    assert log.returncode != 0 and "add --memory-keep-ffn" in log.stdout


def test_checkpoint_args_bring_the_memory(saved: Path) -> None:
    """Only what is not the model's is given again."""
    same = run_training("flags", 1, *MEMORY, *LONG, "--load", saved)
    taken = run_training(
        "args", 1, *LONG, "--load", saved, "--use-checkpoint-args", "--memory-lr", 3e-3
    )
    assert taken.losses == same.losses and taken.iterations == [3, 4]


@pytest.mark.parametrize(
    ("option", "flags", "message"),
    [
        (
            "--pretrained-checkpoint",
            (*MEMORY, "--memory-topk", 2),
            "--memory-topk 2 differs from 4 in --pretrained-checkpoint",
        ),
        ("--load", (), "holds memory layers, but --memory-layers is not given"),
        ("--load", MEMORY, ""),
    ],
    ids=["other memory", "no memory", "the same"],
)
def test_a_script_that_loads_by_megatrons_functions_is_refused_too(
    saved, option, flags, message
) -> None:
    script = ROOT / "tests/helpers/loads_checkpoint.py"
    log = run_training("loads", 1, *flags, option, saved, script=script, check=False)
    if message:
        assert log.returncode != 0 and message in log.stdout
    assert (f"loaded {saved}" in log.stdout) == (not message), log.tail()


def _copy(saved: Path, folder: Path) -> Path:
    shutil.copytree(saved, folder)
    return folder / "iter_0000002"


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_file_is_named(saved: Path, tmp_path: Path, how: str) -> None:
    file, *_ = sorted(_copy(saved, tmp_path / "copy").glob("*.distcp"))
    if how == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        file.unlink()
    log = run_training("damaged", 1, *MEMORY, *LONG, "--load", tmp_path / "copy", check=False)
    what = f"{file.name} has 1,000 of" if how == "cut" else f"{file.name} is missing"
    [line] = re.findall(r"megamem: error: (.*)", log.stdout)
    assert what in line and "--ckpt-step" in line and "Traceback" not in log.stdout


def test_an_iteration_of_another_format_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = _copy(saved, tmp_path / "copy")
    # as --ckpt-format torch saves it
    shutil.rmtree(folder)
    (folder / "mp_rank_00").mkdir(parents=True)
    torch.save({}, folder / "mp_rank_00/model_optim_rng.pt")
    flags = (*MEMORY, *LONG, "--load", tmp_path / "copy", "--auto-detect-ckpt-format")
    log = run_training("legacy", 1, *flags, check=False)
    [line] = re.findall(r"megamem: error: (.*)", log.stdout)
    assert "no checkpoint of format torch_dist" in line and "upcycle" in line
    assert "Traceback" not in log.stdout


def test_a_conversion_to_another_format_is_refused(saved: Path, tmp_path: Path) -> None:
    to = ("--ckpt-convert-format", "torch", "--ckpt-convert-save", tmp_path / "torch")
    flags = ("--load", saved, "--save", tmp_path, "--save-interval", 2, *to)
    log = run_training("convert", 1, *MEMORY, *LONG, *flags, check=False)
    assert log.returncode != 0 and "with --ckpt-convert-format torch:" in log.stdout

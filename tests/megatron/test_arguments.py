import argparse
import dataclasses
import re

from megamem.config import MemoryConfig, flag
from megamem.megatron.arguments import add_memory_flags, idle_flags
from tests.helpers.megatron_runs import SCRIPT, launch


def _parser() -> argparse.ArgumentParser:
    return add_memory_flags(argparse.ArgumentParser(allow_abbrev=False))


def test_every_field_is_a_flag_and_comes_back() -> None:
    assert MemoryConfig.from_args(_parser().parse_args([])) == MemoryConfig()
    other = MemoryConfig(
        memory_layers=[2, 6],
        memory_variant="memory",
        memory_num_keys=64,
        memory_heads=2,
        memory_topk=8,
        memory_key_dim=32,
        memory_value_dim=48,
        memory_pool="layer",
        memory_qk_norm=True,
        memory_keep_ffn=True,
        memory_value_init_std=0.5,
        memory_lr=2e-3,
        memory_lr_schedule="constant",
        memory_weight_decay=0.0,
        memory_clip_grad=0.5,
        memory_optimizer="sgd",
        memory_stochastic_rounding=True,
        memory_finetune_rows=500,
        memory_background="elsewhere",
        memory_mode="2d",
        memory_group_size=4,
        memory_column_ranks=2,
        memory_placement_seed=7,
        memory_check_row_ids=True,
        memory_wire="alltoall",
        memory_reduce_rows="touched",
        memory_metrics="on",
        memory_tuning="elsewhere.json",
    )
    words = []
    for field in dataclasses.fields(MemoryConfig):
        value = getattr(other, field.name)
        assert value != getattr(MemoryConfig(), field.name), f"{field.name}: choose another value"
        words.append(flag(field.name))
        if value is not True:
            words += [str(v) for v in (value if isinstance(value, list) else [value])]
    assert MemoryConfig.from_args(_parser().parse_args(words)) == other


def test_help_shows_every_flag_with_its_sentence() -> None:
    text = " ".join(_parser().format_help().split())
    for field in dataclasses.fields(MemoryConfig):
        described = re.search(rf"{flag(field.name)}\b(?: \S+)*? (.{{20,}}?)(?= --|$)", text)
        assert described, f"{flag(field.name)} has no help"


def test_flags_without_layers_are_named_as_idle() -> None:
    assert idle_flags(MemoryConfig(memory_heads=2)) == ["--memory-heads"]
    assert idle_flags(MemoryConfig(memory_heads=2, memory_layers=[1])) == []


def test_the_script_lists_our_flags_among_megatrons() -> None:
    shown = launch("help", 1, "--cpu", SCRIPT, "--help").stdout
    assert "--memory-layers" in shown and "--tensor-model-parallel-size" in shown

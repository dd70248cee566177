import argparse
import dataclasses
import re
import sys

import pytest
import torch

from megamem.config import ConfigurationError, MemoryConfig, flag
from megamem.megatron import patches
from megamem.megatron.arguments import add_memory_flags, idle_flags, spec_from_args
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
        memory_pieces=2,
        memory_lookup_weights="bf16",
        memory_reduce_rows="touched",
        memory_metrics="on",
        memory_tuning="elsewhere.json",
    )
    # a grid stands in place of a mode
    grid = MemoryConfig(memory_grid="1x2x2x1")
    # UltraMem has settings that others do not have
    tucker = MemoryConfig(
        memory_variant="ultramem-v2",
        memory_final_topk=20,
        memory_pre_value_dim=16,
        memory_tucker_rank=3,
        memory_cores=1,
        memory_expansion=4,
        memory_expansion_proj="block",
        memory_rank_queries="on",
        memory_query_conv=3,
        memory_skip=1,
        memory_share_layers=2,
        memory_init="released",
        memory_placement="stored",
        memory_dropout=0.1,
        memory_core_aux_weight=0.5,
        memory_core_aux_margin=0.2,
        memory_balance_weight=0.01,
        memory_lr_times=4.0,
        memory_lr_times_until=0.5,
    )
    words = [_words(config) for config in (other, grid, tucker)]
    assert {word for own in words for word in own if word.startswith("--")} == {
        flag(field.name) for field in dataclasses.fields(MemoryConfig)
    }
    for config, own in zip((other, grid, tucker), words, strict=True):
        assert MemoryConfig.from_args(_parser().parse_args(own)) == config


def _words(config: MemoryConfig) -> list[str]:
    """The command line of all settings that differ from the default."""
    words = []
    for field in dataclasses.fields(MemoryConfig):
        value = getattr(config, field.name)
        if value == getattr(MemoryConfig(), field.name):
            continue
        words.append(flag(field.name))
        if value is not True:
            words += [str(v) for v in (value if isinstance(value, list) else [value])]
    return words


@pytest.mark.parametrize(
    ("batch", "length", "tensor", "context", "wire"),
    [
        (1, 8192, 1, 1, "allgather"),
        (4, 8192, 1, 1, "alltoall"),
        (1, 32768, 1, 1, "alltoall"),
        # each rank makes the lookups of a quarter of the tokens
        (4, 8192, 4, 1, "allgather"),
        (1, 32768, 2, 2, "allgather"),
    ],
)
def test_the_wire_depends_on_the_tokens_of_a_microbatch(
    batch: int, length: int, tensor: int, context: int, wire: str
) -> None:
    """8 row ranks of a node: 8192 tokens a rank are few, 32768 are many."""
    args = argparse.Namespace(
        hidden_size=2048,
        num_layers=2,
        ffn_hidden_size=8192,
        seq_length=length,
        micro_batch_size=batch,
        global_batch_size=64,
        tensor_model_parallel_size=tensor,
        context_parallel_size=context,
        pipeline_model_parallel_size=1,
        world_size=8,
        params_dtype=torch.bfloat16,
        seed=1,
        distributed_timeout_minutes=10,
        memory_layers=[1],
        memory_group_size=8,
    )
    spec = spec_from_args(args)
    assert spec is not None and spec.wire == wire


def test_help_shows_every_flag_with_its_sentence() -> None:
    text = " ".join(_parser().format_help().split())
    for field in dataclasses.fields(MemoryConfig):
        described = re.search(rf"{flag(field.name)}\b(?: \S+)*? (.{{20,}}?)(?= --|$)", text)
        assert described, f"{flag(field.name)} has no help"


def test_flags_without_layers_are_named_as_idle() -> None:
    assert idle_flags(MemoryConfig(memory_heads=2)) == ["--memory-heads"]
    assert idle_flags(MemoryConfig(memory_heads=2, memory_layers=[1])) == []


def test_a_file_of_settings_does_not_turn_memory_layers_off_silently(monkeypatch) -> None:
    """Megatron takes everything from the file, and knows nothing of memory layers."""

    def read(words: str, **settings) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words.split()])
        load_yaml = patches._refuse_yaml(lambda path: argparse.Namespace(**settings))
        return load_yaml("settings.yaml")

    assert read("--memory-heads 2", num_layers=4) == argparse.Namespace(num_layers=4)
    model = argparse.Namespace(memory_layers=[1])
    for words, settings in (
        ("--memory-layers 1", {}),
        ("--memory-layers=1", {}),
        ("", {"memory_layers": [1]}),
        ("", {"language_model": model}),
    ):
        with pytest.raises(ConfigurationError, match="--yaml-cfg settings.yaml: .* as flags"):
            read(words, **settings)
    with pytest.raises(ConfigurationError, match="--yaml-cfg settings.yaml"):
        spec_from_args(argparse.Namespace(yaml_cfg="settings.yaml"))


def test_a_run_with_a_file_of_settings_ends_in_one_line(tmp_path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("num_layers: 4")
    words = ("--yaml-cfg", settings, "--memory-layers", 1)
    log = launch("yaml", 1, SCRIPT, *words, check=False)
    assert log.returncode == 2 and "Traceback" not in log.stdout
    assert f"megamem: error: --memory-layers does not work with --yaml-cfg {settings}" in log.stdout


def test_the_script_lists_our_flags_among_megatrons() -> None:
    shown = launch("help", 1, "--cpu", SCRIPT, "--help").stdout
    assert "--memory-layers" in shown and "--tensor-model-parallel-size" in shown

"""A recipe of Megatron-Bridge with memory layers, trained in Megatron-Bridge's own loop.

    torchrun --nproc-per-node 2 examples/bridge_recipe.py --memory-layers 1 2 \\
        --memory-num-keys 32 --memory-group-size 2 train.train_iters=20 checkpoint.save=runs/bridge

It needs Megatron-Bridge 0.6; `bash tests/bridge.sh --no-tests` makes .venv/bridge with it. The
memory layers are given by the flags of megamem, everything else by the overrides of
Megatron-Bridge. The model is tiny, and the data are those that Megatron-Bridge makes for a test.
Without a GPU it trains on the CPU over gloo.
"""

import argparse

import torch

if not torch.cuda.is_available():
    from megamem.cpu import bridge, runtime

    runtime.install()  # before Megatron is imported
    bridge.install()  # before Megatron-Bridge is imported

from megatron.bridge.recipes.gpt import vanilla_gpt_pretrain_config
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

from megamem import MemoryConfig, add_memory_flags, add_memory_layers
from megamem.megatron.dataset_helpers import prepare_dataset_helpers
from megamem.megatron.launcher import set_rendezvous_defaults

TINY = [
    *("model.num_layers=4", "model.hidden_size=64", "model.num_attention_heads=4"),
    *("model.seq_length=32", "dataset.seq_length=32", "tokenizer.vocab_size=1000"),
    *("train.train_iters=20", "train.micro_batch_size=4", "train.global_batch_size=8"),
    *("optimizer.lr=1e-2", "optimizer.min_lr=1e-3", "scheduler.lr_warmup_iters=1"),
    *("validation.eval_iters=0", "logger.log_interval=1", "logger.tensorboard_dir=null"),
    "checkpoint.save=null",
]


def main() -> None:
    given, overrides = add_memory_flags(argparse.ArgumentParser()).parse_known_args()
    set_rendezvous_defaults()  # a world of one rank, without torchrun
    prepare_dataset_helpers()  # those of a wheel are compiled, those of a checkout are not
    config = vanilla_gpt_pretrain_config()
    process_config_with_overrides(config, cli_overrides=[*TINY, *overrides])
    # what a recipe needs: memory layers, and the callback that reports how they are used
    memories = add_memory_layers(config, MemoryConfig.from_args(given))
    pretrain(config, forward_step, callbacks=[memories])


if __name__ == "__main__":
    main()

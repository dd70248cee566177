"""A script that loads a checkpoint by Megatron's own functions, as its generation tools do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import megatron_releases
from megatron.training import get_args, training
from megatron.training.checkpointing import load_checkpoint
from pretrain_gpt import model_provider

if __name__ == "__main__":
    megatron_releases.initialize()
    model = training.get_model(model_provider, wrap_with_ddp=False)
    load_checkpoint(model, None, None)
    sys.stdout.write(f"loaded {get_args().load}\n")

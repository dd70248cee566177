"""What generate.py, checkpoint_reader.py and facts/probe.py share: they load a model to ask it."""

import argparse
from functools import partial

from megatron.training.checkpointing import checkpoint_exists
from megatron.training.training import get_model
from megatron_releases import build_gpt, build_hybrid
from pretrain_gpt import model_provider
from torch.nn import Module


def missing_checkpoint(named: str, folder: str | None) -> list[str]:
    """A sentence if a folder has no checkpoints, in which case Megatron would ask random weights.

    Args:
        named: the setting that names the folder, as "--load".
        folder: its value.
    """
    advice = "give the folder that the training run had as --save"
    if folder is None:
        return [f"{named} is missing; {advice}"]
    if checkpoint_exists(folder):
        return []
    tracker = "no latest_checkpointed_iteration.txt"
    return [f"{named} {folder}: no checkpoint there ({tracker}); {advice}"]


def described_model(args: argparse.Namespace) -> list[Module]:
    """This rank's parts of the model that the flags describe, a GPT or a hybrid one, not wrapped.

    A checkpoint is loaded into them without its optimizer and its state of random numbers.
    """
    args.no_load_optim = args.no_load_rng = True
    build = build_hybrid if getattr(args, "hybrid_layer_pattern", None) else build_gpt
    found: list[Module] = get_model(partial(model_provider, build=build), wrap_with_ddp=False)
    return found

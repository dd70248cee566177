"""Count the FLOPs of a model of any flags with torch's counter, in a real forward and backward.

    python -m megamem.run --cpu tests/examples/count_flops.py <the flags of a training run>

prints one line of JSON: FLOPs of a token as torch counts them and as the run would report them, and
the parameters. Torch sees every matrix product that is done; the report counts causal attention as
half of the products that an unfused attention does, so the two differ by the same
6 * layers * hidden * sequence in models of one shape. On a CPU alone: it does not see kernels.
"""

import json
import sys
from pathlib import Path

import torch
from megatron.training import training
from torch.utils.flop_counter import FlopCounterMode

# ahead of a Megatron checkout's script of the same name
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from megatron_releases import initialize  # noqa: E402
from pretrain_gpt import model_provider  # noqa: E402


def main() -> None:
    """Build the model, count, print."""
    args = initialize()
    (model,) = training.get_model(model_provider, wrap_with_ddp=False)
    length = args.seq_length
    tokens_BS = torch.randint(args.padded_vocab_size, (args.micro_batch_size, length)).cuda()
    position_ids_BS = torch.arange(length, device=tokens_BS.device).expand_as(tokens_BS)
    # True hides
    mask_11SS = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens_BS.device).triu(1)
    with FlopCounterMode(display=False) as counter:
        model(tokens_BS, position_ids_BS, mask_11SS, labels=tokens_BS).sum().backward()
    reported = training.num_floating_point_operations(args, args.micro_batch_size)
    told = {
        "counted": counter.get_total_flops() / tokens_BS.numel(),
        "reported": reported / tokens_BS.numel(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()

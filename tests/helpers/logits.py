"""What a model of Megatron says, written to a file: logits, and what it writes token by token.

    python -m megamem.run --cpu tests/helpers/logits.py <flags> --logits-file FILE

Without --load the weights are random, also those that start at zero or one, and --save saves them.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from megatron.training import get_args
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from megatron_releases import initialize
from saved_models import described_model
from torch import Tensor
from torch.nn import Module

SENTENCES, WRITTEN = 3, 8


def _disturb(model: Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if x.is_floating_point():
            # biases of routers decide between experts whose scores are between 0 and 1
            scale = 0.3 if x.dim() == 1 and "expert_bias" not in name else 0.1
            x.data += scale * torch.randn(x.shape, generator=generator).to(x)


def _logits(model: Module, tokens_BS: Tensor) -> Tensor:
    length = tokens_BS.shape[1]
    places_BS = torch.arange(length).expand_as(tokens_BS)
    hidden_11SS = torch.ones(1, 1, length, length).triu(1) > 0
    return model(tokens_BS, places_BS, hidden_11SS)


def main() -> None:
    def flags(parser):
        parser.add_argument("--logits-file", type=Path, required=True)
        return parser

    args = initialize(flags)
    (model,) = chunks = described_model(args)
    model.eval()
    if args.load:
        load_checkpoint(chunks, None, None)
    else:
        _disturb(model)
    if args.save:
        args.no_save_optim = args.no_save_rng = True
        save_checkpoint(1, chunks, None, None, 0)
    generator = torch.Generator().manual_seed(3)
    pieces = get_args().padded_vocab_size
    length = args.seq_length - WRITTEN
    tokens_BS = torch.randint(0, pieces, (SENTENCES, length), generator=generator)
    with torch.no_grad():
        logits_BSv = _logits(model, tokens_BS)
        written_BS = tokens_BS
        for _ in range(WRITTEN):
            next_B1 = _logits(model, written_BS)[:, -1:].argmax(-1)
            written_BS = torch.cat((written_BS, next_B1), 1)
    found = {"tokens": tokens_BS, "logits": logits_BSv, "written": written_BS}
    torch.save(found, args.logits_file)


if __name__ == "__main__":
    main()

"""A random model of Megatron, saved, and what it writes by complete forwards without a cache.

    python -m megamem.run --cpu tests/helpers/greedy.py <flags> --save DIR --greedy-file FILE \\
        --prompts "3 1 4" "1 5" --longest 8

The file is JSON: for each prompt the tokens that it writes, up to an end-of-document token.
"""

import json
from pathlib import Path

import torch
from logits import _disturb, _logits
from megatron.training import get_tokenizer
from megatron.training.checkpointing import save_checkpoint
from megatron_releases import initialize
from saved_models import described_model
from torch.nn import Module


def _written(model: Module, prompt: list[int], longest: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + longest:
        logits_1SV = _logits(model, torch.tensor([tokens]))
        following = int(logits_1SV[0, -1].argmax())
        if following == get_tokenizer().eod:
            break
        tokens.append(following)
    return tokens[len(prompt) :]


def _end_early(model: Module, texts: list[list[int]]) -> None:
    """Let texts end where they had a token that is first found at as many places as possible."""
    places = {
        token: {text.index(token) for text in texts if token in text}
        for text in texts
        for token in text
    }
    last, end = max(places, key=lambda token: len(places[token])), get_tokenizer().eod
    weight = model.output_layer.weight
    weight[[last, end]] = weight[[end, last]]


def main() -> None:
    def flags(parser):
        parser.add_argument("--greedy-file", type=Path, required=True)
        parser.add_argument("--prompts", nargs="+", required=True)
        parser.add_argument("--longest", type=int, required=True)
        return parser

    args = initialize(flags)
    (model,) = described_model(args)
    model.eval()
    _disturb(model)
    prompts = [get_tokenizer().tokenize(prompt) for prompt in args.prompts]
    with torch.no_grad():
        _end_early(model, [_written(model, prompt, args.longest) for prompt in prompts])
        written = [_written(model, prompt, args.longest) for prompt in prompts]
    args.no_save_optim = args.no_save_rng = True
    save_checkpoint(1, [model], None, None, 0)
    args.greedy_file.write_text(json.dumps(written))


if __name__ == "__main__":
    main()

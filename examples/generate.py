"""Let a checkpoint continue prompts, with the key-value cache of Megatron's inference engine.

    torchrun --nproc-per-node 2 -m megamem.run examples/generate.py \\
        <the flags of the training run> --load CHECKPOINTS --prompt "The capital of Kenya is"

Megatron parses the flags, builds the model and loads the checkpoint, on any number of ranks that
can load it. Its static engine then generates, --inference-max-requests prompts at a time: greedily,
or by sampling where --temperature, --top-k or --top-p is given. A text ends before the tokenizer's
end-of-document token, or after --num-tokens-to-generate tokens.

Data-parallel replicas of the model share the prompts. Where they also share a table, a replica that
has finished takes part in the others' lookups. Sequence parallelism, which the engine does not
know, is switched off; context, expert and virtual pipeline parallelism are refused, because
checkpoints load without them. Prints each prompt and its text; --output writes them as JSON, one
line a prompt.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import mpu
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.inference_request import InferenceRequest
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from megatron.training import get_tokenizer
from megatron.training.checkpointing import load_checkpoint
from megatron_releases import initialize
from saved_models import described_model, missing_checkpoint
from torch.nn import Module

from megamem.config import ConfigurationError, MemoryConfig

UNSUPPORTED = {
    "context_parallel_size": "--context-parallel-size",
    "expert_model_parallel_size": "--expert-model-parallel-size",
    "virtual_pipeline_model_parallel_size": "--num-layers-per-virtual-pipeline-stage",
}
"""Arguments that must be 1 or None -> their flags."""


@dataclass(frozen=True)
class Written:
    """What the model wrote after a prompt."""

    prompt: str
    text: str
    tokens: list[int]
    """Those of the text."""
    ended: bool
    """Whether the model ended the text, before --num-tokens-to-generate."""


def add_generation_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The script's own flags, beside all of Megatron's."""
    add = parser.add_argument_group("generation").add_argument
    add("--prompt", nargs="+", metavar="TEXT", default=[], help="texts to continue")
    add("--prompts-file", type=Path, help="a file with a prompt in each line")
    longest = "longest continuation of a prompt, in tokens (default: %(default)s)"
    add("--num-tokens-to-generate", type=int, default=30, help=longest)
    add("--temperature", type=float, help="sample, with logits divided by this")
    add("--top-k", type=int, help="sample among this number of likeliest tokens")
    add("--top-p", type=float, help="sample among the likeliest tokens of this probability in sum")
    add("--output", type=Path, help="a file for prompts and texts, one JSON object a line")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuse what cannot generate, or would ask an untrained model.

    Raises:
        ConfigurationError: the message names the flags and the fixes.
    """
    problems = [
        f"{flag} {value} does not work with generation; leave it out, the checkpoint loads without"
        for name, flag in UNSUPPORTED.items()
        if (value := getattr(args, name)) not in (None, 1)
    ]
    problems += missing_checkpoint("--load", args.load)
    if args.num_tokens_to_generate < 1:
        given = args.num_tokens_to_generate
        problems.append(f"--num-tokens-to-generate {given}: choose at least 1")
    if args.inference_max_requests < 1:
        given = args.inference_max_requests
        problems.append(f"--inference-max-requests {given}: choose at least 1")
    if args.output and not args.output.absolute().parent.is_dir():
        problems.append(f"--output {args.output}: there is no such folder; make it first")
    ConfigurationError.collect(problems + sampling_problems(args))


def sampling_problems(args: argparse.Namespace) -> list[str]:
    """A sentence for each flag of sampling that has no meaning."""
    problems = []
    if args.temperature is not None and args.temperature <= 0:
        problems.append(
            f"--temperature {args.temperature}: choose more than 0, or drop it; without flags of "
            "sampling the likeliest token is taken"
        )
    if args.top_k is not None and not 1 <= args.top_k <= args.padded_vocab_size:
        problems.append(f"--top-k {args.top_k}: choose 1 to {args.padded_vocab_size}, or drop it")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        problems.append(f"--top-p {args.top_p}: choose more than 0 and at most 1, or drop it")
    if args.top_k is not None and args.top_p is not None:
        problems.append("--top-k and --top-p do not work together; drop one of them")
    return problems


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of the file.

    Raises:
        ConfigurationError: there are none.
    """
    prompts = list(args.prompt)
    file = args.prompts_file
    if file is not None:
        if not file.is_file():
            raise ConfigurationError(f"--prompts-file {file}: there is no such file")
        lines = [line for line in file.read_text().splitlines() if line.strip()]
        if not lines:
            raise ConfigurationError(f"--prompts-file {file} is empty; write a prompt in each line")
        prompts += lines
    if not prompts:
        raise ConfigurationError("there is no prompt; give --prompt TEXT or --prompts-file FILE")
    return prompts


def encode(prompts: Sequence[str], args: argparse.Namespace) -> list[list[int]]:
    """The tokens of each prompt.

    Raises:
        ConfigurationError: a prompt has no tokens, or the model too few positions for it.
    """
    found, problems = [], []
    room = args.max_position_embeddings - args.num_tokens_to_generate
    for number, prompt in enumerate(prompts, 1):
        try:
            tokens = get_tokenizer().tokenize(prompt)
        except ValueError as error:
            problems.append(f"prompt {number} ({_short(prompt)}) is not one of this model: {error}")
            continue
        found.append(tokens)
        if not tokens:
            problems.append(f"prompt {number} is empty; drop it")
        elif len(tokens) > room:
            problems.append(
                f"prompt {number} ({_short(prompt)}) has {len(tokens)} tokens; with "
                f"--max-position-embeddings {args.max_position_embeddings} and "
                f"--num-tokens-to-generate {args.num_tokens_to_generate} it may have "
                f"{max(room, 0)}; shorten it, or generate less"
            )
    ConfigurationError.collect(problems)
    return found


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else prompt[:37] + "...")


def load_model(args: argparse.Namespace) -> Module:
    """This rank's part of the model in the checkpoint, as Megatron's engine can run it."""
    # the weights are the same; the engine knows it for experts alone
    args.sequence_parallel = args.tp_comm_overlap = False
    model = described_model(args)
    load_checkpoint(model, None, None)
    (chunk,) = model
    return chunk.eval()


def build_engine(model: Module, args: argparse.Namespace, longest: int) -> StaticInferenceEngine:
    """Megatron's static engine, with a key-value cache for `longest` tokens of each prompt."""
    context = StaticInferenceContext(args.inference_max_requests, longest)
    wrapped = GPTInferenceWrapper(model, context)
    controller = TextGenerationController(wrapped, get_tokenizer())
    # tensor-parallel ranks must draw the same tokens
    controller.sampling_rng.manual_seed(args.seed + mpu.get_data_parallel_rank())
    with warnings.catch_warnings():
        # that it will be removed in favor of the dynamic engine, which needs flash attention
        warnings.simplefilter("ignore")
        return StaticInferenceEngine(controller, random_seed=args.seed, legacy=True)


def sampling(args: argparse.Namespace) -> SamplingParams:
    """How a token is chosen; the likeliest one, without flags of sampling."""
    given = (args.temperature, args.top_k, args.top_p)
    greedy = all(value is None for value in given)
    return SamplingParams(
        temperature=1.0 if args.temperature is None else args.temperature,
        top_k=1 if greedy else args.top_k or 0,
        top_p=args.top_p or 0.0,
        num_tokens_to_generate=args.num_tokens_to_generate,
    )


def generate(
    model: Module, prompts: Sequence[str], tokens: Sequence[list[int]], args: argparse.Namespace
) -> list[Written]:
    """What the model writes after each prompt; all ranks get all of it."""
    # prompts of one batch should be of similar length: the engine reads the rest of a longer one
    # token by token
    order = sorted(range(len(prompts)), key=lambda number: len(tokens[number]))
    mine = order[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
    longest = max(map(len, tokens)) + args.num_tokens_to_generate
    engine = build_engine(model, args, longest)
    asked = [
        InferenceRequest(
            request_id=engine.get_new_request_id(),
            prompt=prompts[number],
            prompt_tokens=tokens[number],
            sampling_params=sampling(args),
        )
        for number in mine
    ]
    # also without prompts, as other replicas may need this rank's part of a table
    requests = engine.generate(inference_requests=asked)
    written = {
        number: _written(prompts[number], tokens[number], request.generated_tokens.tolist(), args)
        for number, request in zip(mine, requests, strict=True)
    }
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, written)
    everything = {number: one for part in found for number, one in part.items()}
    return [everything[number] for number in range(len(prompts))]


def _written(
    prompt: str, prompt_tokens: list[int], tokens: list[int], args: argparse.Namespace
) -> Written:
    decode = get_tokenizer().detokenize
    # a tokenizer may drop the blank before a text that is decoded alone
    text = decode(prompt_tokens + tokens).removeprefix(decode(prompt_tokens))
    return Written(prompt, text, tokens, ended=len(tokens) < args.num_tokens_to_generate)


def announce(args: argparse.Namespace, asked: int, sequence_parallel: bool) -> None:
    """Say what generates, on the first rank."""
    replicas = mpu.get_data_parallel_world_size()
    said = f"generate: {asked} prompts, {args.inference_max_requests} at a time"
    if replicas > 1:
        said += f" on each of {replicas} data-parallel replicas, which share the prompts"
        ranks = MemoryConfig.from_args(args).asked_group_size or 1
        if ranks > args.tensor_model_parallel_size:
            said += f"; a table is spread over {ranks} ranks, so replicas wait for"
            said += " each other in every layer with a memory, and one that has finished joins in"
    if sequence_parallel:
        said += "; --sequence-parallel is off, which changes no weight"
    if dist.get_rank() == 0:
        sys.stderr.write(said + "\n")


def report(written: Sequence[Written], output: Path | None) -> None:
    """Print the prompts and their texts, and write them to a file; on the first rank."""
    for one in written:
        sys.stdout.write(f"\n{one.prompt}\n    ->{one.text}\n")
    if output is not None:
        lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in written]
        unfinished = output.with_name(output.name + ".unfinished")
        unfinished.write_text("".join(lines))
        os.replace(unfinished, output)
        sys.stdout.write(f"\nwritten to {output}\n")
    sys.stdout.flush()


def main() -> None:
    """Read the prompts, load, generate, print."""
    args = initialize(add_generation_flags)
    sequence_parallel = args.sequence_parallel
    check_args(args)
    prompts = read_prompts(args)
    tokens = encode(prompts, args)
    announce(args, len(prompts), sequence_parallel)
    written = generate(load_model(args), prompts, tokens, args)
    if dist.get_rank() == 0:
        report(written, args.output)


if __name__ == "__main__":
    main()

"""A checkpoint of Megatron that scores and continues texts, for programs that are no training run.

    reader = CheckpointReader("CHECKPOINTS", {"tensor_model_parallel_size": 2}, batch_size=8)
    reader.score([[5, 17, 4], [5, 9]])
    reader.continue_texts([Prompt([5, 17], longest=8)])

The model, its memory layers, its precision and its tokenizer are those of the arguments that
Megatron saved with the checkpoint; further flags say what they leave open, such as how the model is
laid out over ranks. All ranks are given the same texts, read all of them, and return the same,
whatever their parallel layout; so ranks that share a table always look up together.

eval_harness.py is such a program. Run it with the launcher, as every script of Megatron.

Shapes: B texts, S positions, v this rank's part of the vocabulary, t tensor-parallel ranks.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.training import get_tokenizer
from megatron.training.checkpointing import load_checkpoint
from megatron_releases import initialize
from saved_models import described_model, missing_checkpoint
from torch import Tensor
from torch.nn import Module

from megamem.config import ConfigurationError
from megamem.megatron.startup.saved_model import loaded_checkpoint, saved_common

# what a model computes beside the settings of its config class
OF_THE_MODEL = (
    *("norm_epsilon", "bf16", "fp16", "bias_gelu_fusion", "bias_swiglu_fusion", "openai_gelu"),
    *("onnx_safe", "quick_geglu", "use_rope_scaling", "rope_scaling_factor", "num_experts"),
    "rotary_seq_len_interpolation_factor",
)
OF_THE_TOKENIZER = re.compile(
    r".*token(izer|s$).*|vocab_(size|file|extra_ids)|merge_file|metadata_path|"
    "make_vocab_size_divisible_by|trust_remote_code"
)
# how and where a model is computed, how it is trained, and what Megatron takes itself, as it
# depends on other settings
OF_THE_RUN = re.compile(
    r".*(recompute|cuda_graph|offload|inference|ep_|stash|dispatcher|overlap|fus|grouped|kitchen)"
    r".*|.*(pipeline|num_layers|mtp_|init_|dropout|loss|backend|transformer_impl|spec).*|fp[48].*"
)


def settings_to_take(saved: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The arguments of a run that decide what its model computes, where they are not the defaults.

    --use-checkpoint-args takes the sizes of the model, but neither these nor its tokenizer.
    """
    ours = {one.name for one in fields(MLATransformerConfig)}
    ours -= {one.name for one in fields(ModelParallelConfig)}
    ours = {name for name in ours if not OF_THE_RUN.fullmatch(name)} | {*OF_THE_MODEL}
    known = {action.dest: action.default for action in parser._actions}
    taken = {
        name: value
        for name, value in vars(saved).items()
        if (name in ours or OF_THE_TOKENIZER.fullmatch(name))
        and name != "padded_vocab_size"
        and value is not None
        and name in known
        and known[name] != value
    }
    if getattr(saved, "transformer_impl", None) == "local":
        taken["transformer_impl"] = "local"
    return taken


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command line: {"bf16": True, "tokenizer_model": "x"} and so on."""
    words: list[str] = []
    for name, value in settings.items():
        if value is False:
            raise ConfigurationError(
                f"{name}=False is no flag of Megatron; leave it out, or give the flag that "
                f"switches it off, such as no_{name}=True"
            )
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, list | tuple):
            words += map(str, value)
        elif value is not True:
            words += shlex.split(str(value))
    return words


@dataclass(frozen=True)
class Prompt:
    """A text that is to be continued."""

    tokens: Sequence[int]
    longest: int
    """Tokens of the continuation, at most."""
    stop: Sequence[str] = ()
    """The continuation ends where one of these is in it, if the model does not end it before."""


class Scores(NamedTuple):
    """What a model says of each token of a text but the first, having read those before it."""

    log_probabilities: list[float]
    likeliest: list[int]
    """The token that it finds likeliest there."""


class CheckpointReader:
    """The model and the tokenizer of a checkpoint."""

    def __init__(self, load: str, settings: Mapping[str, Any], batch_size: int = 1) -> None:
        """Read the arguments of the checkpoint, make the process groups, and load it.

        Args:
            load: the folder of checkpoints, as a training run has it as --save.
            settings: Megatron's flags beside those in the checkpoint, by their names in args; True
                for those without a value.
            batch_size: texts in a forward.

        Raises:
            ConfigurationError: there is no checkpoint, or the settings do not fit it.
        """
        ConfigurationError.collect(missing_checkpoint("load", load))
        if batch_size < 1:
            raise ConfigurationError(f"batch size {batch_size}: choose at least 1")
        # the model makes its own batches; Megatron asks for a size all the same
        usual = {"use_checkpoint_args": True, "micro_batch_size": 1}
        usual["no_use_tokenizer_model_from_checkpoint_args"] = True
        words = ["--load", load, *as_flags(usual | settings)]
        where = argparse.Namespace(load=load, ckpt_step=settings.get("ckpt_step"))
        given = loaded_checkpoint(where)
        if given is None:
            raise ConfigurationError(
                f"load={load} has no checkpoint of ckpt_step={where.ckpt_step}"
            )
        saved = saved_common(given.folder).get("args")

        def take(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            if saved is not None:
                parser.set_defaults(**settings_to_take(saved, parser))
            return parser

        with patch.object(sys, "argv", [sys.argv[0], *words]):
            self.args = args = initialize(take)
        if args.virtual_pipeline_model_parallel_size is not None:
            flag = "num_layers_per_virtual_pipeline_stage"
            raise ConfigurationError(f"{flag}: leave it out, the checkpoint loads without it")
        self.model = described_model(args)
        load_checkpoint(self.model, None, None)
        for chunk in self.model:
            chunk.eval()
        self.batch_size, self.tokenizer = batch_size, get_tokenizer()
        self.max_length: int = args.max_position_embeddings
        self.end_token: int = self.tokenizer.eod

    def score(self, texts: Sequence[Sequence[int]]) -> list[Scores]:
        """What the model says of each text, of one token more than it has positions at most."""
        found: list[Scores] = []
        for start in range(0, len(texts), self.batch_size):
            batch = texts[start : start + self.batch_size]
            log_BS, best_BS = self._read(
                [text[:-1] for text in batch], [text[1:] for text in batch]
            )
            for text, log_S, best_S in zip(batch, log_BS, best_BS, strict=True):
                count = len(text) - 1
                found.append(Scores(log_S[:count].tolist(), best_S[:count].tolist()))
        return found

    def continue_texts(self, prompts: Sequence[Prompt]) -> list[str]:
        """The likeliest continuation of each prompt, token by token, without what stops it.

        Every token reads the whole text again, as there is no key-value cache.
        """
        found: list[str] = []
        for start in range(0, len(prompts), self.batch_size):
            found += self._continue_batch(prompts[start : start + self.batch_size])
        return found

    def _continue_batch(self, prompts: Sequence[Prompt]) -> list[str]:
        written: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        unfinished = [number for number, prompt in enumerate(prompts) if prompt.longest > 0]
        while unfinished:
            batch = [[*prompts[number].tokens, *written[number]] for number in unfinished]
            _, best_BS = self._read(batch, batch)
            going_on = []
            for number, tokens, best in zip(unfinished, batch, best_BS, strict=True):
                token = int(best[len(tokens) - 1])
                if token == self.end_token:
                    continue
                written[number].append(token)
                text = self.tokenizer.detokenize(written[number])
                stops = [place for stop in prompts[number].stop if (place := text.find(stop)) >= 0]
                texts[number] = text[: min(stops, default=None)]
                if not stops and len(written[number]) < prompts[number].longest:
                    going_on.append(number)
            unfinished = going_on
        return texts

    @torch.no_grad()
    def _read(
        self, texts: Sequence[Sequence[int]], asked: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """At each position, the log-probability of the token asked for, and the likeliest token."""
        # sequence parallelism cuts the sequence into equal parts
        parts = mpu.get_tensor_model_parallel_world_size()
        length = -(-max(map(len, texts)) // parts) * parts
        tokens_BS, asked_BS = (self._padded(rows, length).cuda() for rows in (texts, asked))
        # only padding can be behind the last position that the model knows
        places_S = torch.arange(length, device=tokens_BS.device).clamp(max=self.max_length - 1)
        # True hides; the local attention of Megatron applies it, the fused ones know it already
        hidden_11SS = torch.ones(1, 1, length, length, device=tokens_BS.device).triu(1) > 0

        def forward_step(_: object, model: Module) -> tuple[Tensor, Callable[..., Tensor]]:
            logits_BSv = model(tokens_BS, places_S.expand_as(tokens_BS), hidden_11SS)
            return logits_BSv, partial(_judge, asked_BS=asked_BS)

        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=self.model,
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=len(texts),
            forward_only=True,
            collect_non_loss_data=True,
        )
        shape, device = (2, *tokens_BS.shape), tokens_BS.device
        judged_2BS = torch.empty(shape, dtype=torch.float64, device=device)
        if mpu.is_pipeline_last_stage():
            judged_2BS.copy_(outputs[0])
        # ranks that disagreed in the last bit would stop at different tokens, and then wait for
        # each other; the last rank is one of the last stage
        dist.broadcast(judged_2BS, dist.get_world_size() - 1)
        log_BS, best_BS = judged_2BS.cpu()
        return log_BS, best_BS.long()

    def _padded(self, rows: Sequence[Sequence[int]], length: int) -> Tensor:
        tokens_BS = torch.full((len(rows), length), self.end_token)
        for row_S, row in zip(tokens_BS, rows, strict=True):
            row_S[: len(row)] = torch.tensor(row, dtype=torch.long)
        return tokens_BS


def _judge(logits_BSv: Tensor, non_loss_data: bool, asked_BS: Tensor) -> Tensor:
    """The log-probabilities of the tokens asked for, and the likeliest tokens, in float64."""
    logits_BSv = logits_BSv.float()
    highest_BS, best_BS = logits_BSv.max(dim=-1)
    best_BS = best_BS + mpu.get_tensor_model_parallel_rank() * logits_BSv.shape[-1]
    highest_BSt, best_BSt = (
        gather_from_tensor_model_parallel_region(x.double().unsqueeze(-1))
        for x in (highest_BS, best_BS)
    )
    best_BS1 = best_BSt.gather(-1, highest_BSt.argmax(-1, keepdim=True))
    # it overwrites the logits
    loss_BS = vocab_parallel_cross_entropy(logits_BSv, asked_BS)
    return torch.stack((-loss_BS.double(), best_BS1.squeeze(-1)))

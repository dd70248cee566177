"""Evaluate a checkpoint with lm-eval, EleutherAI's harness, which knows it as the model `megamem`.

    torchrun --nproc-per-node 2 -m megamem.eval_harness --model megamem \\
        --model_args load=CHECKPOINTS,tensor_model_parallel_size=2 --batch_size 32 --tasks nq_open

These are lm-eval's own flags, and those behind --model_args, except load, Megatron's, with
underscores: what they do not say is in the checkpoint (see checkpoint_reader.py). They may name any
parallel layout that can load the checkpoint; every rank reads every text.

lm-eval finds models in its registry, where this script puts one more, as lm-eval 0.4 looks for no
entry points. Its tasks get greedy continuations, log-likelihoods and rolling log-likelihoods.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from checkpoint_reader import CheckpointReader, Prompt
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megamem.config import ConfigurationError


@register_model("megamem")
class Checkpoint(TemplateLM):
    """A checkpoint as a model of lm-eval."""

    # what models of transformers have there
    max_gen_toks = 256

    def __init__(
        self,
        load: str = "",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        """Load it.

        Args:
            load: the folder of checkpoints.
            batch_size: texts in a forward.
            max_batch_size: has no effect.
            device: has no effect, as the launcher's --cpu decides.
            settings: Megatron's flags, by their names in args.

        Raises:
            ConfigurationError: as CheckpointReader, or the batch size is no number.
        """
        super().__init__()
        if not str(batch_size).isdecimal():
            raise ConfigurationError(f"--batch_size {batch_size}: give the model megamem a number")
        if not load:
            raise ConfigurationError("--model_args has no load=CHECKPOINTS; add it")
        self.reader = CheckpointReader(load, settings, int(batch_size))
        self.max_length = self.reader.max_length
        self.end_text = self._end_text()

    def _end_text(self) -> str | None:
        try:
            return self.reader.tokenizer.inv_vocab.get(self.reader.end_token)
        except NotImplementedError:
            return None

    @property
    def eot_token_id(self) -> int:
        """The token between documents."""
        return self.reader.end_token

    @property
    def tokenizer_name(self) -> str:
        """What tells cached requests of different tokenizers apart."""
        args = self.reader.args
        return f"{args.tokenizer_type} {args.tokenizer_model}".replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The tokens of a text, which may begin with the text of the token between documents."""
        encode = self.reader.tokenizer.tokenize
        if self.end_text and string.startswith(self.end_text):
            rest = string.removeprefix(self.end_text)
            return [self.reader.end_token, *(encode(rest) if rest else [])]
        return list(encode(string))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        longest = max((len(asked) for _, _, asked in requests), default=0)
        if longest > self.max_length:
            raise ConfigurationError(
                f"a task asks for the likelihood of {longest} tokens at once, but the model has "
                f"{self.max_length} positions; leave that task out"
            )
        # a context that is too long loses its beginning
        texts = [(context + asked)[-self.max_length - 1 :] for _, context, asked in requests]
        # the longest first, as what does not fit into memory should not at once
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        scored = self.reader.score([texts[number] for number in order])
        found: dict[int, tuple[float, bool]] = {}
        for number, (logs, best) in zip(order, scored, strict=True):
            key, _, asked = requests[number]
            first = len(logs) - len(asked)
            found[number] = (sum(logs[first:]), best[first:] == texts[number][first + 1 :])
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, found[number])
        return [found[number] for number in range(len(texts))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each text, in windows that overlap as little as lm-eval says."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(log for log, _ in self._loglikelihood_tokens(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each text, up to what ends it."""
        prompts = [self._prompt(*request.args) for request in requests]
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].tokens))
        texts = self.reader.continue_texts([prompts[number] for number in order])
        found = dict(zip(order, texts, strict=True))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[number])
        return [found[number] for number in range(len(prompts))]

    def _prompt(self, context: str, given: dict[str, Any]) -> Prompt:
        settings = normalize_gen_kwargs(given, self.max_gen_toks)
        if settings["do_sample"]:
            raise ConfigurationError(
                "the model megamem takes the likeliest token, but the task samples; give "
                "--gen_kwargs do_sample=False,temperature=0, or export the checkpoint with "
                "megamem convert export --format hf and use --model hf"
            )
        longest, stop = settings["max_gen_toks"], settings["until"] or []
        if longest >= self.max_length:
            raise ConfigurationError(
                f"a continuation of {longest} tokens leaves no room for a text in the "
                f"{self.max_length} positions of the model; give --gen_kwargs "
                f"max_gen_toks={self.max_length // 2}"
            )
        tokens = self.tok_encode(context)[-(self.max_length - longest) :]
        stop = [stop] if isinstance(stop, str) else stop
        return Prompt(tokens or [self.prefix_token_id], longest, [one for one in stop if one])

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()


if __name__ == "__main__":
    cli_evaluate()

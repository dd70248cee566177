"""Ask a trained checkpoint for the facts it was trained on, closed-book, and count exact answers.

    torchrun --nproc-per-node 2 -m megamem.run --cpu examples/facts/probe.py \\
        <the flags of the training run> --load CHECKPOINT --facts runs/facts/facts.json

Megatron parses the flags, builds the model and loads the checkpoint, under any tensor and pipeline
parallel size the checkpoint can be loaded with. Data-parallel ranks all ask everything: layers that
exchange data between them need every rank in every forward. --phrasing question asks in the words
of the relation's question, unseen in the one phrasing that training never used of the fact.

Prints one row per relation: facts asked, answered exactly, accuracy, and the accuracy of always
giving the commonest answer. Where the model answers the held-out facts, which no training document
states, it guessed. An answer is right when greedy decoding would write exactly it and stop. That is
so if and only if, with the answer fed in, the likeliest next token is the right one at every
position of it, so one forward scores a batch of questions. The JSON has the last checkpoint's first
phrasing at its top, and under `probes` every checkpoint and phrasing, relation by relation.

Shapes: B questions, S positions, v this rank's part of the vocabulary.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from asking import BOTH, Question, answered, build_batch, score
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.training import get_args, get_tokenizer
from megatron.training.checkpointing import load_checkpoint
from rich.console import Console
from rich.progress import track
from show_probe import sheet
from torch import Tensor
from torch.nn import Module

# these lie one folder up; ahead of a Megatron checkout's script of the same name
sys.path.insert(0, str(Path(__file__).parents[1]))
from megatron_releases import initialize  # noqa: E402
from saved_models import described_model, missing_checkpoint  # noqa: E402

from megamem.config import ConfigurationError  # noqa: E402

PHRASINGS = {"question": BOTH[:1], "unseen": BOTH[1:], "both": BOTH, "both-at-last": BOTH}


def add_probe_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The probe's own flags, beside all of Megatron's."""
    add = parser.add_argument_group("probe").add_argument
    add("--facts", type=Path, required=True, help="facts.json of build_corpus.py")
    add("--probe-batch-size", type=int, default=64, help="questions per forward")
    add("--probe-output", type=Path, help="default: probe.json beside the facts")
    add("--phrasing", choices=PHRASINGS, default="question", help="in which words to ask")
    checkpoints = "checkpoints to ask (default: the last)"
    add("--probe-iterations", type=int, nargs="+", metavar="ITERATION", help=checkpoints)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuse what would ask an untrained model, or ask nothing."""
    if not args.facts.is_file():
        build = f"examples/facts/build_corpus.py --output {args.facts.parent}"
        raise ConfigurationError(f"--facts {args.facts}: no such file; write it with {build}")
    ConfigurationError.collect(missing_checkpoint("--load", args.load))
    if args.virtual_pipeline_model_parallel_size is not None:
        flag = "--num-layers-per-virtual-pipeline-stage"
        raise ConfigurationError(f"{flag}: leave it out, the checkpoint loads without it")
    if args.probe_batch_size < 1:
        raise ConfigurationError(f"--probe-batch-size {args.probe_batch_size}: choose at least 1")
    for iteration in args.probe_iterations or ():
        if not (Path(args.load) / f"iter_{iteration:07d}").is_dir():
            what = f"--probe-iterations {iteration}: --load {args.load} has no checkpoint of it"
            raise ConfigurationError(f"{what}; name those that --save-interval wrote")


def read_questions(facts: Sequence[Mapping[str, Any]], phrasing: str) -> list[Question]:
    """The questions of facts.json, tokenized by the run's tokenizer."""
    encode = get_tokenizer().tokenize
    texts = ((fact["relation"], fact[phrasing], fact["answer"]) for fact in facts)
    return [Question(*three, encode(three[1]), encode(three[2])) for three in texts]


class Asker:
    """Puts batches of one fixed shape through the model; every rank is given the predictions."""

    def __init__(self, model: list[Module], questions: Sequence[Question]) -> None:
        args = get_args()
        self.model, self.batch_size = model, args.probe_batch_size
        self.end_token = get_tokenizer().eod
        longest = max(len(q.prompt_ids) + len(q.answer_ids) for q in questions) + 2
        # sequence parallelism cuts the sequence into equal parts
        parts = args.tensor_model_parallel_size
        self.length = -(-longest // parts) * parts
        if self.length > args.seq_length:
            raise ConfigurationError(
                f"--seq-length {args.seq_length}: the longest question with its answer takes "
                f"{self.length} tokens; train with at least that, or with fewer --facts"
            )

    def right_answers(self, questions: Sequence[Question], console: Console) -> list[bool]:
        """For each question whether greedy decoding writes its answer."""
        right: list[bool] = []
        starts = range(0, len(questions), self.batch_size)
        for start in track(starts, "asking", console=console, transient=True):
            asked = questions[start : start + self.batch_size]
            batch, predicted_BS = self._predict(asked, [q.answer_ids for q in asked])
            right += answered(predicted_BS, *batch[1:])[: len(asked)].tolist()
        return right

    def greedy_answers(self, questions: Sequence[Question]) -> list[str]:
        """What the model writes after each prompt, token by token."""
        written: list[list[int]] = [[] for _ in questions]
        room = self.length - 2 - max(len(q.prompt_ids) for q in questions)
        for _ in range(room + 1):
            _, predicted_BS = self._predict(questions, written)
            for question, tokens, row in zip(questions, written, predicted_BS, strict=False):
                if not tokens or tokens[-1] != self.end_token:
                    tokens.append(int(row[len(question.prompt_ids) + len(tokens)]))
        decode = get_tokenizer().detokenize
        return [decode([t for t in tokens if t != self.end_token]) for tokens in written]

    def _predict(
        self, questions: Sequence[Question], answers: Sequence[Sequence[int]]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """The batch, and the likeliest token at each of its places."""
        # pipeline stages exchange one fixed shape, so the last batch is filled up
        fill = [()] * (self.batch_size - len(questions))
        prompts = [*(q.prompt_ids for q in questions), *fill]
        batch = build_batch(prompts, [*answers, *fill], self.end_token, self.length)
        tokens_BS = batch[0].cuda()
        position_ids_BS = torch.arange(self.length, device=tokens_BS.device).expand_as(tokens_BS)
        # True hides; the local attention of Megatron applies it, the fused ones know it already
        mask_11SS = torch.ones(1, 1, self.length, self.length, device=tokens_BS.device).triu(1) > 0

        def forward_step(_: object, model: Module) -> tuple[Tensor, object]:
            return model(tokens_BS, position_ids_BS, mask_11SS), predict

        def predict(logits_BSv: Tensor, non_loss_data: bool) -> Tensor:
            return gather_from_tensor_model_parallel_region(logits_BSv.float()).argmax(dim=-1)

        with torch.no_grad():
            outputs = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=None,
                model=self.model,
                num_microbatches=1,
                seq_length=self.length,
                micro_batch_size=self.batch_size,
                forward_only=True,
                collect_non_loss_data=True,
            )
        predicted_BS = outputs[0] if mpu.is_pipeline_last_stage() else torch.empty_like(tokens_BS)
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            source = mpu.get_pipeline_model_parallel_last_rank()
            group = mpu.get_pipeline_model_parallel_group()
            torch.distributed.broadcast(predicted_BS, source, group=group)
        return batch, predicted_BS.cpu()


def main() -> None:
    """Load, ask, print, write JSON."""
    args = initialize(add_probe_args)
    check_args(args)
    model = described_model(args)
    phrasings = PHRASINGS[args.phrasing]
    # held in first
    facts = sorted(json.loads(args.facts.read_text())["facts"], key=lambda f: not f["held_in"])
    held_in = sum(fact["held_in"] for fact in facts)
    questions = {name: read_questions(facts, name) for name in phrasings}
    asker = Asker(model, [question for asked in questions.values() for question in asked])
    # the last rank of the last stage reports, as it does for Megatron's own losses
    reports = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    console = Console(quiet=not reports)

    probes: list[dict[str, Any]] = []
    checkpoints = args.probe_iterations or [None]
    for place, wanted in enumerate(checkpoints, 1):
        args.ckpt_step = wanted
        # of the checkpoint before, if any
        args.consumed_train_samples = args.consumed_valid_samples = 0
        iteration, _ = load_checkpoint(model, None, None)
        for chunk in model:
            chunk.eval()
        early = args.phrasing == "both-at-last" and place < len(checkpoints)
        for name in phrasings[:1] if early else phrasings:
            asked = questions[name]
            right = asker.right_answers(asked, console)
            probe = score(asked, right, held_in)
            probes.append({"iteration": iteration, "phrasing": name, **probe})
            title = f"{args.load}, iteration {iteration}: closed-book exact match"
            title += "" if name == "question" else ", unseen phrasing"
            # a table would wrap it
            console.print(title, soft_wrap=True)
            console.print(sheet(probe).table())
    chosen = questions[phrasings[0]][: held_in : max(held_in // 5, 1)][:5]
    answers = asker.greedy_answers(chosen)
    if not reports:
        return
    samples = []
    for (_, text, answer, *_), wrote in zip(chosen, answers, strict=True):
        line = f"{text} [{answer}] model: {wrote} ({'right' if wrote == answer else 'wrong'})"
        console.print(line, markup=False, soft_wrap=True)
        samples.append({"question": text, "answer": answer, "model": wrote})
    output = args.probe_output or args.facts.with_name("probe.json")
    last = {"load": str(args.load), **probes[-len(phrasings)]}
    output.write_text(json.dumps({**last, "samples": samples, "probes": probes}, indent=1) + "\n")
    console.print(f"written to {output}")


if __name__ == "__main__":
    main()

"""Ask a trained checkpoint for the facts it was trained on, closed-book, and count exact answers.

    torchrun --nproc-per-node 2 -m megamem.run --cpu examples/facts/probe.py \\
        <the flags of the training run> --load CHECKPOINT --facts runs/facts/facts.json

Megatron parses the flags, builds the model and loads the checkpoint, under any tensor and pipeline
parallel size the checkpoint can be loaded with. Data-parallel ranks all ask everything: layers that
exchange data between them need every rank in every forward.

--phrasing question asks in the words of the relation's question, unseen in the one phrasing that
training never used of the fact, both in either. --probe-iterations 100 200 asks several checkpoints
of one run, one after the other; both-at-last asks the last of them in either.

Prints one row per relation: facts asked, answered exactly, accuracy, and the accuracy of always
giving the relation's commonest answer. Held-out facts, which no training document states, are a row
of their own: what the model gets right there it guessed. An answer is right when greedy decoding
would write exactly it and stop, which one forward with the answer fed in decides (scoring.py).

The JSON has the last checkpoint's first phrasing at its top, and under `probes` every checkpoint
and phrasing, relation by relation, held in and held out.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training import get_args, get_tokenizer
from megatron.training.checkpointing import checkpoint_exists, load_checkpoint
from megatron.training.training import get_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scoring import Batch, answered, build_batch, commonest_answer_share, vocab_parallel_argmax
from torch import Tensor

# the host script lies one folder up; ahead of a Megatron checkout's script of the same name
sys.path.insert(0, str(Path(__file__).parents[1]))
from pretrain_gpt import model_provider  # noqa: E402

from megamem.config import ConfigurationError  # noqa: E402
from megamem.megatron import compat  # noqa: E402

HELD_OUT = "held out (control)"
BOTH = ("question", "unseen")
PHRASINGS = {"question": BOTH[:1], "unseen": BOTH[1:], "both": BOTH, "both-at-last": BOTH}


@dataclass(frozen=True)
class Question:
    """A fact as the probe asks it, in text and in tokens."""

    relation: str
    text: str
    answer: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """One row of the table."""

    relation: str
    asked: int
    right: int
    accuracy: float
    chance: float


def add_probe_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The probe's own flags, beside all of Megatron's."""
    group = parser.add_argument_group("probe")
    group.add_argument("--facts", type=Path, required=True, help="facts.json of build_corpus.py")
    group.add_argument("--probe-batch-size", type=int, default=64, help="questions per forward")
    group.add_argument("--probe-output", type=Path, help="default: probe.json beside the facts")
    group.add_argument(
        "--phrasing", choices=PHRASINGS, default="question", help="in which words to ask"
    )
    group.add_argument(
        "--probe-iterations", type=int, nargs="+", help="checkpoints to ask (default: the last)"
    )
    return parser


def read_questions(path: Path, held_in: bool, phrasing: str = "question") -> list[Question]:
    """The held-in (or held-out) questions of facts.json, tokenized by the run's tokenizer."""
    tokenizer = get_tokenizer()
    return [
        Question(
            relation=fact["relation"],
            text=fact[phrasing],
            answer=fact["answer"],
            prompt_ids=tuple(tokenizer.tokenize(fact[phrasing])),
            answer_ids=tuple(tokenizer.tokenize(fact["answer"])),
        )
        for fact in json.loads(path.read_text())["facts"]
        if fact["held_in"] == held_in
    ]


class Asker:
    """Puts batches of one fixed shape through the model; predictions appear on the last stage."""

    def __init__(self, model: list[torch.nn.Module], questions: Sequence[Question]) -> None:
        args = get_args()
        self.model = model
        self.batch_size = args.probe_batch_size
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

    def right_answers(self, questions: Sequence[Question], progress: Progress) -> list[bool]:
        """For each question whether greedy decoding writes its answer; empty off the last stage."""
        task = progress.add_task("asking", total=len(questions))
        right: list[bool] = []
        for start in range(0, len(questions), self.batch_size):
            batch, asked = self._batch(questions[start : start + self.batch_size])
            predicted_BS = self._predict(batch)
            if predicted_BS is not None:
                right += answered(predicted_BS.cpu(), batch)[:asked].tolist()
            progress.advance(task, asked)
        return right

    def greedy_answers(self, questions: Sequence[Question]) -> list[str]:
        """What the model writes after each prompt, token by token; empty off the last stage."""
        written: list[list[int]] = [[] for _ in questions]
        room = self.length - 2 - max(len(q.prompt_ids) for q in questions)
        for _ in range(room + 1):
            batch, asked = self._batch(questions, written)
            predicted_BS = self._predict(batch)
            # every stage needs the next token: the first to feed it, all to stay in step
            next_tokens = torch.zeros(self.batch_size, dtype=torch.long)
            if predicted_BS is not None:
                last = [len(q.prompt_ids) + len(w) for q, w in zip(questions, written, strict=True)]
                next_tokens[:asked] = predicted_BS[range(asked), last].cpu()
            next_tokens = _from_last_stage(next_tokens)
            for row, tokens in enumerate(written):
                if not tokens or tokens[-1] != self.end_token:
                    tokens.append(int(next_tokens[row]))
        tokenizer = get_tokenizer()
        return [tokenizer.detokenize([t for t in w if t != self.end_token]) for w in written]

    def _batch(
        self, questions: Sequence[Question], answers: Sequence[Sequence[int]] | None = None
    ) -> tuple[Batch, int]:
        asked = len(questions)
        # pipeline stages exchange one fixed shape, so the last batch is filled up
        fill = self.batch_size - asked
        prompts = [q.prompt_ids for q in questions] + [()] * fill
        given = [q.answer_ids for q in questions] if answers is None else answers
        rows = [*given, *[()] * fill]
        return build_batch(prompts, rows, self.end_token, self.length), asked

    def _predict(self, batch: Batch) -> Tensor | None:
        tokens_BS = batch.tokens_BS.cuda()
        position_ids_BS = torch.arange(self.length, device=tokens_BS.device).expand_as(tokens_BS)
        # True hides; the local attention of Megatron applies it, the fused ones know it already
        mask_11SS = torch.ones(
            1, 1, self.length, self.length, dtype=torch.bool, device=tokens_BS.device
        ).triu(1)

        def forward_step(_: object, model: torch.nn.Module) -> tuple[Tensor, object]:
            return model(tokens_BS, position_ids_BS, mask_11SS), predict

        def predict(logits_BSv: Tensor, non_loss_data: bool) -> Tensor:
            return vocab_parallel_argmax(logits_BSv, mpu.get_tensor_model_parallel_group())

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
        return outputs[0] if mpu.is_pipeline_last_stage() else None


def _from_last_stage(tensor: Tensor) -> Tensor:
    """`tensor` as the last pipeline stage has it, on every stage."""
    if mpu.get_pipeline_model_parallel_world_size() == 1:
        return tensor
    on_device = tensor.cuda()
    torch.distributed.broadcast(
        on_device,
        mpu.get_pipeline_model_parallel_last_rank(),
        group=mpu.get_pipeline_model_parallel_group(),
    )
    return on_device.cpu()


def score_by_relation(questions: Sequence[Question], right: Sequence[bool]) -> list[Score]:
    """One score per relation, in order of their names."""
    scores = []
    for relation in sorted({question.relation for question in questions}):
        chosen = [i for i, question in enumerate(questions) if question.relation == relation]
        answers = [questions[i].answer for i in chosen]
        hits = sum(right[i] for i in chosen)
        chance = commonest_answer_share(answers)
        scores.append(Score(relation, len(chosen), hits, hits / len(chosen), chance))
    return scores


def total(name: str, scores: Sequence[Score]) -> Score:
    """All relations as one; chance is what the relations' commonest answers get together."""
    asked = sum(score.asked for score in scores)
    right = sum(score.right for score in scores)
    by_chance = sum(score.chance * score.asked for score in scores)
    return Score(name, asked, right, right / asked, by_chance / asked)


def render(scores: Sequence[Score], totals: Sequence[Score], title: str) -> Table:
    """Scores as a table for people."""
    table = Table(title=title, title_justify="left")
    for heading in ("relation", "asked", "right", "accuracy", "commonest answer"):
        table.add_column(heading, justify="left" if heading == "relation" else "right")
    for rows in (scores, totals):
        for row in rows:
            table.add_row(
                row.relation,
                f"{row.asked:,}",
                f"{row.right:,}",
                f"{row.accuracy:.1%}",
                f"{row.chance:.1%}",
            )
        table.add_section()
    return table


def check_args() -> None:
    """Refuse what would ask an untrained model, or ask nothing."""
    args = get_args()
    if not args.facts.is_file():
        raise ConfigurationError(
            f"--facts {args.facts}: no such file; "
            f"write it with examples/facts/build_corpus.py --output {args.facts.parent}"
        )
    if not checkpoint_exists(args.load):
        raise ConfigurationError(
            f"--load {args.load}: no checkpoint there (no latest_checkpointed_iteration.txt); "
            "give the folder that the training run had as --save"
        )
    if args.virtual_pipeline_model_parallel_size is not None:
        raise ConfigurationError(
            "--num-layers-per-virtual-pipeline-stage "
            f"{args.num_layers_per_virtual_pipeline_stage}: the probe asks one batch at a time; "
            "leave the flag out, the checkpoint loads without it"
        )
    if args.probe_batch_size < 1:
        raise ConfigurationError(f"--probe-batch-size {args.probe_batch_size}: choose at least 1")
    for iteration in args.probe_iterations or ():
        if not (Path(args.load) / f"iter_{iteration:07d}").is_dir():
            raise ConfigurationError(
                f"--probe-iterations {iteration}: --load {args.load} has no checkpoint of it; "
                "name those that --save-interval wrote"
            )


def load_iteration(model: list[torch.nn.Module], iteration: int | None) -> int:
    """Fill the model from the checkpoint of an iteration, by default the last; return which."""
    args = get_args()
    args.ckpt_step = iteration
    # of the checkpoint before, if any
    args.consumed_train_samples = args.consumed_valid_samples = 0
    loaded, _ = load_checkpoint(model, None, None)
    for chunk in model:
        chunk.eval()
    return loaded


@dataclass(frozen=True)
class Probe:
    """What one checkpoint answered in one phrasing, relation by relation."""

    iteration: int
    phrasing: str
    scores: list[Score]
    control: list[Score]

    @property
    def totals(self) -> list[Score]:
        """Held in, and held out where facts were."""
        rows = (("all held in", self.scores), (HELD_OUT, self.control))
        return [total(name, scores) for name, scores in rows if scores]

    def to_json(self) -> dict[str, object]:
        """Plain numbers, totals included."""
        return {**asdict(self), "totals": [asdict(score) for score in self.totals]}


def main() -> None:
    """Load, ask, print, write JSON."""
    args = compat.initialize(add_probe_args)
    check_args()
    args.no_load_optim = args.no_load_rng = True
    model = get_model(model_provider, wrap_with_ddp=False)
    phrasings = PHRASINGS[args.phrasing]
    held_in = {name: read_questions(args.facts, True, name) for name in phrasings}
    held_out = {name: read_questions(args.facts, False, name) for name in phrasings}
    asked = [question for name in phrasings for question in held_in[name] + held_out[name]]
    asker = Asker(model, asked)
    # the last rank of the last stage reports, as it does for Megatron's own losses
    reports = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    console = Console(quiet=not reports)

    probes: list[Probe] = []
    checkpoints = args.probe_iterations or [None]
    for place, wanted in enumerate(checkpoints, 1):
        iteration = load_iteration(model, wanted)
        early = args.phrasing == "both-at-last" and place < len(checkpoints)
        for name in phrasings[:1] if early else phrasings:
            known, unknown = held_in[name], held_out[name]
            with Progress(console=console, transient=True) as progress:
                right = asker.right_answers([*known, *unknown], progress)
            if not reports:
                continue
            scores = score_by_relation(known, right[: len(known)])
            control = score_by_relation(unknown, right[len(known) :])
            probes.append(Probe(iteration, name, scores, control))
            title = f"{args.load}, iteration {iteration}: closed-book exact match"
            title += "" if name == "question" else ", unseen phrasing"
            console.print(render(scores, probes[-1].totals, title))
    first = held_in[phrasings[0]]
    samples = first[:: max(len(first) // 5, 1)][:5]
    written = asker.greedy_answers(samples)
    if not reports:
        return

    for question, wrote in zip(samples, written, strict=True):
        mark = "right" if wrote == question.answer else "wrong"
        console.print(
            f"{question.text} [{question.answer}] model: {wrote} ({mark})",
            markup=False,
            soft_wrap=True,
        )
    output = args.probe_output or args.facts.with_name("probe.json")
    result = {
        "load": str(args.load),
        **probes[-len(phrasings)].to_json(),
        "samples": [
            {"question": q.text, "answer": q.answer, "model": wrote}
            for q, wrote in zip(samples, written, strict=True)
        ],
        "probes": [probe.to_json() for probe in probes],
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written to {output}")


if __name__ == "__main__":
    main()

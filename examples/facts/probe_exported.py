"""Ask an exported model the questions of probe.py, with transformers alone.

    python -m megamem convert export RUN/checkpoints --to RUN/hf --format hf
    python examples/facts/probe_exported.py RUN/hf --facts RUN/data/facts.json

The questions, the scoring and the output are those of probe.py, so the numbers can be compared; a
model that was exported in fp32 has those of its checkpoint.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from asking import BOTH, Question, answered, build_batch, score
from rich.progress import track
from show_probe import sheet
from tables import make_console
from transformers import AutoModelForCausalLM, AutoTokenizer


class Exported:
    """A model in a folder, with its tokenizer."""

    def __init__(self, folder: Path, device: str, dtype: str = "auto") -> None:
        how = {"trust_remote_code": True}
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **how)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how)
        self.model, self.device = model.to(device).eval(), device

    def read(self, fact: Mapping[str, Any], phrasing: str) -> Question:
        """A fact as a question in tokens."""
        texts = fact[phrasing], fact["answer"]
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return Question(fact["relation"], *texts, *ids)

    @torch.no_grad()
    def right_answers(self, questions: Sequence[Question]) -> list[bool]:
        """For each question of a batch whether greedy decoding writes its answer."""
        end = self.tokenizer.eos_token_id
        length = max(len(q.prompt_ids) + len(q.answer_ids) for q in questions) + 2
        prompts, answers = ([q[place] for q in questions] for place in (3, 4))
        batch = [x.to(self.device) for x in build_batch(prompts, answers, end, length)]
        predicted_BS = self.model(batch[0]).logits.argmax(dim=-1)
        return answered(predicted_BS, *batch[1:]).tolist()

    @torch.no_grad()
    def writes(self, question: Question, longest: int = 24) -> str:
        """What the model writes after a question."""
        end = self.tokenizer.eos_token_id
        tokens = torch.tensor([[end, *question.prompt_ids]], device=self.device)
        written = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )[0, tokens.shape[1] :].tolist()
        return self.tokenizer.decode([one for one in written if one != end])


def main() -> None:
    """Load, ask, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("folder", type=Path, help="what megamem convert export --format hf has written")
    add("--facts", type=Path, required=True, help="facts.json of build_corpus.py")
    add("--phrasing", choices=BOTH, default=BOTH[0], help="in which words to ask")
    add("--batch-size", type=int, default=64, help="questions per forward")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the model")
    add("--probe-output", type=Path, help="a file for the scores, as probe.py writes it")
    args = parser.parse_args()
    for path, wanted in ((args.facts, args.facts.is_file()), (args.folder, args.folder.is_dir())):
        if not wanted:
            sys.exit(f"probe_exported: error: {path} does not exist")
    console, asked_of = make_console(), Exported(args.folder, args.device)
    # held in first
    facts = sorted(json.loads(args.facts.read_text())["facts"], key=lambda f: not f["held_in"])
    held_in = sum(fact["held_in"] for fact in facts)
    questions = [asked_of.read(fact, args.phrasing) for fact in facts]
    right: list[bool] = []
    starts = range(0, len(questions), args.batch_size)
    for start in track(starts, "asking", console=console, transient=True):
        right += asked_of.right_answers(questions[start : start + args.batch_size])
    probe = score(questions, right, held_in)
    console.print(f"{args.folder}: closed-book exact match", markup=False, soft_wrap=True)
    console.print(sheet(probe).table())
    samples = []
    for question in questions[: held_in : max(held_in // 5, 1)][:5]:
        wrote = asked_of.writes(question)
        verdict = "right" if wrote == question.answer else "wrong"
        line = f"{question.text} [{question.answer}] model: {wrote} ({verdict})"
        console.print(line, markup=False, soft_wrap=True)
        samples.append({"question": question.text, "answer": question.answer, "model": wrote})
    if args.probe_output:
        found = {"load": str(args.folder), **probe, "samples": samples}
        args.probe_output.write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"written to {args.probe_output}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()

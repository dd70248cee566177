"""Trains a GPT and asks it for facts on the way, in one process that saves no checkpoint.

    python -m megamem.run examples/facts/train_and_probe.py <flags of the training run> \\
        --facts FOLDER/facts.json --told told.json --points 100 200

It trains as examples/pretrain_gpt.py does, on one rank, and asks as probe.py does: in the words of
the question at every point, and in unseen words at the last. It needs no tokenizer, as the facts
have their tokens with them, and none of the packages that the other scripts of this folder need
beside torch and Megatron. At each point it writes anew what there is to tell: whoever ends it has
that. `complete` says whether it came to the end.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Any

import torch
from asking import BOTH, Question, answered, build_batch, score
from megatron.training import get_args
from torch import Tensor
from torch.nn import Module

# the training script lies one folder up; ahead of a Megatron checkout's script of the same name
sys.path.insert(0, str(Path(__file__).parents[1]))
import megatron_releases  # noqa: E402
import pretrain_gpt  # noqa: E402

# questions in a forward
BATCH = 256


class Learner:
    """What Megatron's training loop is given: it also times, asks and tells.

    Attributes:
        model: what Megatron trains, without its wrappers, from when it is built.
        told: what it writes.

    Args:
        facts: the contents of facts.json.
        points: the iterations after which it asks, ascending; the last one ends the training.
        told: the file that it writes.
    """

    def __init__(self, facts: dict[str, Any], points: Sequence[int], told: Path) -> None:
        # held in first
        self.facts = sorted(facts["facts"], key=lambda fact: not fact["held_in"])
        self.end_token, self.points, self.path = facts["end_token"], points, told
        self.told: dict[str, Any] = {"complete": False, "seconds_of_asking": 0.0}
        self.told |= {name: [] for name in ("seconds", "losses", "probes")}
        # sums of losses and numbers of tokens, on the device until they are asked for
        self.trained, self.validated = list[Tensor](), list[Tensor]()
        # of training alone, up to the last mark
        self.seconds, self.mark = 0.0, 0.0

    def build(self, args: Any, config: Any = None) -> Callable[..., Module]:
        """What builds the model, which is kept to be asked without its wrappers."""
        make = megatron_releases.build_gpt(args, config)

        def build_model(*stage: Any) -> Module:
            self.model = make(*stage)
            return self.model

        return build_model

    def forward_step(
        self, data_iterator: Iterator[dict] | None, model: Module
    ) -> tuple[Tensor, partial]:
        """As that of pretrain_gpt.py; before the step after a point it asks."""
        asked = len(self.told["seconds"])
        # how often it has been trained; validation comes after the last step
        step = get_args().curr_iteration + (0 if model.training else 1)
        if asked < len(self.points) and step == self.points[asked]:
            self.ask(step)
        elif not self.mark:
            self.mark = time.monotonic()
        losses = self.trained if model.training else self.validated
        output, loss_func = pretrain_gpt.forward_step(data_iterator, model)
        return output, partial(self._loss, loss_func, losses)

    def _loss(self, loss_func: Callable[..., Any], losses: list[Tensor], output: Tensor) -> Any:
        found = loss_func(output)
        losses.append(found[2]["lm loss"].clone())
        return found

    def ask(self, step: int) -> None:
        """Ask everything, and write what is known so far."""
        # reading the losses waits for the device, so the time is that of all work until here
        sums = torch.stack(self.trained).view(-1, get_args().log_interval, 2).sum(dim=1)
        self.told["losses"] += (sums[:, 0] / sums[:, 1]).tolist()
        self.told["loss"] = (self.trained[-1][0] / self.trained[-1][1]).item()
        self.trained.clear()
        began = time.monotonic()
        self.seconds += began - self.mark
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for phrasing in BOTH if step == self.points[-1] else BOTH[:1]:
                self.told["probes"].append({"iteration": step, **self.probe(phrasing)})
        self.model.train(was_training)
        self.told["seconds"].append(round(self.seconds, 4))
        self.told["seconds_of_asking"] += time.monotonic() - began
        self.write()
        self.mark = time.monotonic()

    def probe(self, phrasing: str) -> dict[str, Any]:
        """Scores in one phrasing, in the form of probe.py."""
        questions = [
            Question(fact["relation"], fact[phrasing], fact["answer"], ids[phrasing], ids["answer"])
            for fact in self.facts
            for ids in (fact["ids"],)
        ]
        right = [is_right for batch in batched(questions, BATCH) for is_right in self._right(batch)]
        held_in = sum(fact["held_in"] for fact in self.facts)
        return {"phrasing": phrasing, **score(questions, right, held_in)}

    def _right(self, questions: Sequence[Question]) -> list[bool]:
        prompts, answers = ([q[place] for q in questions] for place in (3, 4))
        length = 2 + max(len(q.prompt_ids) + len(q.answer_ids) for q in questions)
        tokens_BS, *labels = build_batch(prompts, answers, self.end_token, length)
        tokens_BS = tokens_BS.cuda()
        position_ids_BS = torch.arange(length, device=tokens_BS.device).expand_as(tokens_BS)
        # True hides
        mask_11SS = torch.ones(1, 1, length, length, device=tokens_BS.device).triu(1) > 0
        logits_BSv = self.model(tokens_BS, position_ids_BS, mask_11SS)
        return answered(logits_BSv.float().argmax(dim=-1).cpu(), *labels).tolist()

    def finish(self) -> None:
        """Write everything, once training and validation are over."""
        args = get_args()
        # Megatron validates once more, on other data, when the training is over
        last = args.eval_iters * args.global_batch_size // args.micro_batch_size
        loss, tokens = torch.stack(self.validated[-last:]).sum(dim=0).tolist()
        self.told |= {"validation_loss": loss / tokens, "complete": True}
        self.write()

    def write(self) -> None:
        """Write what there is, in the place of what was written before."""
        peak, device = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, ""
        if next(self.model.parameters()).is_cuda:
            peak, device = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.told |= {"peak_bytes": peak, "device": device, "parameters": parameters}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.told) + "\n")
        os.replace(part, self.path)


def main() -> None:
    """Take the own flags off the command line, train, ask."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--told", type=Path, required=True)
    parser.add_argument("--points", type=int, nargs="+", required=True)
    own, sys.argv[1:] = parser.parse_known_args()
    learner = Learner(json.loads(own.facts.read_text()), own.points, own.told)
    megatron_releases.train(
        pretrain_gpt.datasets_provider,
        partial(pretrain_gpt.model_provider, build=learner.build),
        learner.forward_step,
        {},
    )
    learner.finish()


if __name__ == "__main__":
    main()

"""Questions for a model: their batches, the right answers, and scores by relation.

An answer is right when greedy decoding would write exactly it and stop. That is so if and only if,
with the answer fed in, the likeliest next token is the right one at every position of it, so one
forward scores a batch of questions.

Shapes: B questions, S positions.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BOTH = ("question", "unseen")


class Question(NamedTuple):
    """A fact as the probe asks it, in text and in tokens."""

    relation: str
    text: str
    answer: str
    prompt_ids: list[int]
    answer_ids: list[int]


def build_batch(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], end_token: int, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Questions between end tokens with their answers behind them, padded to `length`.

    Returns:
        tokens_BS; labels_BS, which position s is to predict; and is_answer_BS, which marks the
        predictions that decide: the answer's and the end token
    """
    tokens_BS = torch.full((len(prompts), length), end_token)
    labels_BS = torch.full((len(prompts), length), end_token)
    is_answer_BS = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        # every training document but the first follows an end token
        line = torch.tensor([end_token, *prompt, *answer, end_token])
        tokens_BS[row, : len(line)] = line
        labels_BS[row, : len(line) - 1] = line[1:]
        is_answer_BS[row, len(prompt) : len(line) - 1] = True
    return tokens_BS, labels_BS, is_answer_BS


def answered(predicted_BS: Tensor, labels_BS: Tensor, is_answer_BS: Tensor) -> Tensor:
    """For each question, whether every answer token and the end token are predicted."""
    return ((predicted_BS == labels_BS) | ~is_answer_BS).all(dim=1)


def score(questions: Sequence[Question], right: Sequence[bool], held_in: int) -> dict[str, Any]:
    """`scores` of the facts that training states, which come first, of the `control`, `totals`."""
    scores = score_by_relation(questions[:held_in], right[:held_in], "all held in")
    control = score_by_relation(questions[held_in:], right[held_in:], "held out (control)")
    return {"scores": scores[:-1], "control": control[:-1], "totals": scores[-1:] + control[-1:]}


def score_by_relation(
    questions: Sequence[Question], right: Sequence[bool], all_of_them: str
) -> list[dict[str, Any]]:
    """A row for each relation, by their names, then one for all of them where there are any.

    Chance is the accuracy of giving every question its relation's commonest answer.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    hits: Counter[str] = Counter()
    for question, is_right in zip(questions, right, strict=True):
        answers[question.relation][question.answer] += 1
        hits[question.relation] += is_right
    counted = [
        (name, times.total(), hits[name], max(times.values()))
        for name, times in sorted(answers.items())
    ]
    if counted:
        _, *columns = zip(*counted, strict=True)
        counted.append((all_of_them, *map(sum, columns)))
    keys = ("relation", "asked", "right", "accuracy", "chance")
    return [
        dict(zip(keys, (name, asked, n, n / asked, commonest / asked), strict=True))
        for name, asked, n, commonest in counted
    ]

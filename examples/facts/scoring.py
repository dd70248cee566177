"""When an answer counts as right: greedy decoding would have written exactly it, then stopped.

Greedy decoding writes the answer if and only if, with the answer fed in, the likeliest next token
is the right one at every position of it. So one forward scores a whole batch of questions.

Shapes: B questions, S positions, v this rank's part of the vocabulary, W tensor-parallel ranks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Questions with their answers behind them, and which predictions decide."""

    tokens_BS: Tensor
    labels_BS: Tensor
    is_answer_BS: Tensor


def build_batch(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    end_token: int,
    length: int,
) -> Batch:
    """Pad to `length`; position s predicts labels[:, s], and is_answer marks answer and end token.

    Every prompt follows an end token, as every training document but the first does.
    """
    tokens_BS = torch.full((len(prompts), length), end_token)
    labels_BS = torch.full((len(prompts), length), end_token)
    is_answer_BS = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        line = torch.tensor([end_token, *prompt, *answer, end_token])
        tokens_BS[row, : len(line)] = line
        labels_BS[row, : len(line) - 1] = line[1:]
        is_answer_BS[row, len(prompt) : len(line) - 1] = True
    return Batch(tokens_BS, labels_BS, is_answer_BS)


def answered(predicted_BS: Tensor, batch: Batch) -> Tensor:
    """For each question, whether every answer token and the end token are predicted."""
    return ((predicted_BS == batch.labels_BS) | ~batch.is_answer_BS).all(dim=1)


def vocab_parallel_argmax(logits_BSv: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Likeliest token of the whole vocabulary, the same on every rank of `group`.

    Only each rank's best score and its token travel, never the logits.
    """
    scores_BS, tokens_BS = logits_BSv.float().max(dim=-1)
    tokens_BS = tokens_BS + dist.get_rank(group) * logits_BSv.shape[-1]
    ranks = dist.get_world_size(group)
    scores_WBS = [torch.empty_like(scores_BS) for _ in range(ranks)]
    tokens_WBS = [torch.empty_like(tokens_BS) for _ in range(ranks)]
    dist.all_gather(scores_WBS, scores_BS, group=group)
    dist.all_gather(tokens_WBS, tokens_BS, group=group)
    return best_of_shards(torch.stack(scores_WBS), torch.stack(tokens_WBS))


def best_of_shards(scores_WBS: Tensor, tokens_WBS: Tensor) -> Tensor:
    """The token of the rank with the highest score; of equal scores, the lowest rank's."""
    return tokens_WBS.gather(0, scores_WBS.argmax(dim=0, keepdim=True)).squeeze(0)


def commonest_answer_share(answers: Sequence[str]) -> float:
    """Accuracy of giving every question the answer that is right most often."""
    return max(Counter(answers).values()) / len(answers) if answers else 0.0

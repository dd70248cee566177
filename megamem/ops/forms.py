"""The forms of each op: implementations of the same result, of which one is the default on GPUs.

A new form becomes the default only after it ran on a GPU, was correct there, and was faster than
the form that it replaces. Until then the old form stays the default, and the new one is selected
with an environment variable on every rank:

    MEGAMEM_FORMS=product_topk=torch,...

An op without any form that ran on a GPU uses torch's own ops there.

`megamem tune` may select a form that is not the default in the file that it writes: there, it has
run on the GPU of the user, gave the known answers, and was faster.

Triton's interpreter and a compilation without a GPU are not enough: three kernels that had passed
both computed wrong results on the first GPU. tests/ops/test_forms.py compares this table with the
records under tests/bench/results.
"""

import os
from dataclasses import dataclass
from functools import lru_cache

from megamem.kernels import choices

ENVIRONMENT = "MEGAMEM_FORMS"


@dataclass(frozen=True)
class Form:
    """One implementation of an op."""

    record: str | None
    """The file under tests/bench/results with its run on a GPU; None before the first run."""
    changed: str = ""
    """What was changed since that run; empty if nothing was."""
    kernels_of: str = ""
    """The op of whose kernels it consists, where it has not run itself."""


# op -> name -> form; the first form of an op is the default
FORMS: dict[str, dict[str, Form]] = {
    "product_topk": {
        "two_looks": Form(
            "h100-a4677c2-stages.json",
            "NaN ranks highest; bisection where more than 2 KP scores reach the threshold",
        ),
        "torch": Form("h100-a4677c2-stages.json"),
        "fused": Form(None),
    },
    "product_topk_backward": {
        "bags": Form("h100-a4677c2.jsonl"),
        "dense": Form(None),
    },
    "tucker_topk": {"torch": Form(None), "triton": Form(None)},
    "tucker_topk_backward": {"torch": Form(None), "triton": Form(None)},
    "embedding_bag": {"triton": Form("h100-a4677c2.jsonl")},
    # several weights a lookup
    "embedding_bag_cores": {
        "pieces": Form(None, kernels_of="embedding_bag"),
        "triton": Form(None),
    },
    "row_gradient": {
        "add": Form("h100-a4677c2.jsonl"),
        # the H100 took 3.46 ms where rows were overwritten and 5.44 where they were added to
        "first_touch": Form(None),
        "merged": Form(None),
    },
    # 0.28 ms for a million lookups on the H100, where their bytes need 0.05
    "sort_lookups": {"torch": Form("h100-a4677c2-stages.json"), "radix": Form(None)},
    # how steps on touched rows alone get these rows
    "row_adam": {
        "list": Form("h100-a4677c2.jsonl", "barriers before stores; IEEE division and root"),
        "flags": Form(None),
    },
    # torch casts to fp64 first: 17.4 ms where a kernel of this kind, tried on the H100, took 2.7
    "squared_norm": {"torch": Form("h100-a4677c2-stages.json"), "triton": Form(None)},
}


def pick(op: str, otherwise: str | None = None) -> str:
    """Return the name of the form that an op uses.

    It is the form that the environment selects, else that of the tuning file of the run, else
    `otherwise`, else the default.

    Args:
        op: name of the op.
        otherwise: replaces the default for arguments with which the default never ran on a GPU.

    Raises:
        ValueError: MEGAMEM_FORMS names an op or a form that does not exist.
    """
    tuned = choices.current().forms.get(op)
    return selected().get(op) or tuned or otherwise or next(iter(FORMS[op]))


def selected() -> dict[str, str]:
    """Return op -> form for the forms that the environment selects.

    Raises:
        ValueError: MEGAMEM_FORMS names an op or a form that does not exist.
    """
    return parse(os.environ.get(ENVIRONMENT, ""))


@lru_cache
def parse(text: str) -> dict[str, str]:
    """Return op -> form from a text of the form "op=form,op=form".

    Raises:
        ValueError: the text names an op or a form that does not exist.
    """
    chosen = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        op, _, form = entry.partition("=")
        if op not in FORMS:
            raise ValueError(
                f"{ENVIRONMENT}={text}: there is no op {op!r}; write op=form, where op is one of "
                f"{', '.join(FORMS)}."
            )
        if form not in FORMS[op]:
            raise ValueError(
                f"{ENVIRONMENT}={text}: {op} has no form {form!r}; it has {', '.join(FORMS[op])}."
            )
        chosen[op] = form
    return chosen

"""Which form of an op runs on a GPU, and what is known of it there.

Forms of an op compute the same thing in different ways. The rule: a new form becomes the default on
GPUs only after it has run on one, was found right there, and faster than the form it replaces.
Until then the form that has run stays, and the new one can be selected:

    MEGAMEM_FORMS=product_topk=torch,...    in the environment of every rank

The interpreter and a compiler without a GPU do not count: three kernels that had passed both were
wrong on the first GPU they met. tests/ops/test_forms.py holds this table to the records under
tests/bench/results.
"""

import os
from dataclasses import dataclass
from functools import lru_cache

ENVIRONMENT = "MEGAMEM_FORMS"


@dataclass(frozen=True)
class Form:
    """One way to carry out an op."""

    record: str | None
    """The file under tests/bench/results that tells of its run on a GPU; None before the first."""
    changed: str = ""
    """What differs from the form that ran, where something does."""


# of each op the default first
FORMS: dict[str, dict[str, Form]] = {
    "product_topk": {
        "two_looks": Form(
            "h100-a4677c2-stages.json",
            "NaN ranks highest; bisection where more than 2 KP scores reach the threshold",
        ),
        "torch": Form("h100-a4677c2-stages.json"),
    },
    "embedding_bag": {"triton": Form("h100-a4677c2.jsonl")},
    "row_gradient": {"triton": Form("h100-a4677c2.jsonl")},
    "row_adam": {
        "triton": Form("h100-a4677c2.jsonl", "barriers before stores; IEEE division and root")
    },
}


def pick(op: str, otherwise: str | None = None) -> str:
    """The form of an op that was selected; or else `otherwise`, or the default.

    Args:
        otherwise: what stands in for the default where that has not been tried.

    Raises:
        ValueError: MEGAMEM_FORMS names an op or a form that does not exist.
    """
    return selected().get(op) or otherwise or next(iter(FORMS[op]))


def selected() -> dict[str, str]:
    """Op -> form, of what the environment selects.

    Raises:
        ValueError: MEGAMEM_FORMS names an op or a form that does not exist.
    """
    return parse(os.environ.get(ENVIRONMENT, ""))


@lru_cache
def parse(text: str) -> dict[str, str]:
    """Op -> form, of "op=form,op=form".

    Raises:
        ValueError: an op or a form that does not exist.
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

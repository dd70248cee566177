"""The rule of forms: a default on GPUs has run on one, and was right and faster there."""

import json
import re
from pathlib import Path

import pytest
import torch

from megamem.kernels import product_topk as kernels
from megamem.ops import forms, product_topk
from megamem.ops.forms import FORMS, Form

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests/bench/results"
BENCH_OPS = {
    "embedding_bag": "embedding_bag",
    "product_topk_backward": "product_topk forward + backward",
    "row_gradient": "backward",
    "row_adam": "adamw_",
}


def runs(op: str, form: str, record: str) -> list[dict]:
    """What a file of records says of one form of an op: device, shape, ms, and if it was right."""
    path = RESULTS / record
    if path.suffix == ".jsonl":
        # the benchmark's own records, which a wrong result never reaches; one form an op
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [{**run, "right": True} for run in found if BENCH_OPS[op] in run["op"]]
    content = json.loads(path.read_text())
    found = [run for run in content["forms"] if (run["op"], run["form"]) == (op, form)]
    return [{**run, "device": content["device"]} for run in found]


def problems(table: dict[str, dict[str, Form]]) -> list[str]:
    """What in a table of forms breaks the rule."""
    found = []
    for op, choices in table.items():
        default, *others = choices
        record = choices[default].record
        if record is None and choices[default].kernels_of:
            # it is as good as the default of the op whose kernels it launches
            op = choices[default].kernels_of
            default = next(iter(table[op]))
            record = table[op][default].record
        # torch's own ops need no run to be the default of an op without any
        if default == "torch" and not any(form.record for form in choices.values()):
            continue
        if record is None:
            found.append(f"{op}: {default} is the default on GPUs and has never run on one")
            continue
        times = {str(run.get("shape")): run for run in runs(op, default, record)}
        if not times or not all("H100" in run["device"] for run in times.values()):
            found.append(f"{op}: {record} has no run of {default} on a GPU")
        if not all(run["right"] for run in times.values()):
            found.append(f"{op}: {default} was wrong, says {record}")
        for other in others:
            for run in runs(op, other, choices[other].record) if choices[other].record else ():
                ours = times.get(str(run["shape"]))
                if ours and run["right"] and ours["ms"] >= run["ms"]:
                    found.append(f"{op}: {default} is no faster than {other} at {run['shape']}")
    return found


def test_every_default_has_run_on_a_gpu_and_was_right_and_faster():
    assert problems(FORMS) == []
    # at least one of them was compared with another
    assert len(runs("product_topk", "torch", FORMS["product_topk"]["torch"].record)) >= 3


def test_the_rule_is_found_broken():
    topk = FORMS["product_topk"]
    slow_first = {"product_topk": {"torch": topk["torch"], "two_looks": topk["two_looks"]}}
    assert "torch is no faster than two_looks" in problems(slow_first)[0]
    assert "never run" in problems({"product_topk": {"fused": Form(None), **topk}})[0]
    new = {"torch": Form(None), "triton": Form(None)}
    assert problems({"tucker_topk": new}) == []
    assert "never run" in problems({"tucker_topk": {"triton": Form(None), **new}})[0]
    record = topk["torch"].record
    assert "no run of fused" in problems({"product_topk": {"fused": Form(record)}})[0]
    borrowed = {"product_topk": {"fused": Form(None)}, "x": {"y": Form(None, "", "product_topk")}}
    assert len(problems(borrowed)) == 2


def test_every_kernel_belongs_to_an_op_of_the_table():
    """A kernel added to kernels/ is a form of something, and the rule holds for it."""
    kernel_files = {path.stem for path in (ROOT / "megamem/kernels").glob("[a-z]*.py")}
    # of an op in its own right, as far as kernels go: the same files have its kernels
    ops = {op for op in FORMS if not any(form.kernels_of for form in FORMS[op].values())}
    # the file of one form of an op has its name behind the op's
    kernel_files -= {f"{op}_{form}" for op, choices in FORMS.items() for form in choices}
    # place_rows moves no data of a table; it is exact in integers. choices.py holds numbers
    assert kernel_files - {"placement", "choices"} == ops


def test_a_form_can_be_selected(monkeypatch, device):
    query, sub_keys = torch.ones(2, 1, 4, device=device), torch.ones(2, 1, 9, 2, device=device)
    launched = []
    monkeypatch.setattr(
        kernels,
        "product_topk",
        lambda *a, real=kernels.product_topk: (launched.append(1), real(*a))[1],
    )
    counts = {}
    for selected in ("product_topk=torch", "product_topk=two_looks", ""):
        monkeypatch.setenv(forms.ENVIRONMENT, selected)
        launched.clear()
        product_topk(query, sub_keys, 2)
        counts[selected] = len(launched)
    # fp32 was not tried on a GPU
    assert counts == {
        "product_topk=torch": 0,
        "product_topk=two_looks": 1,
        "": 0 if device == "cuda" else 1,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("product_topk=fast", "product_topk has no form 'fast'; it has two_looks, torch, fused."),
        ("topk=torch", "there is no op 'topk'; write op=form, where op is one of product_topk,"),
        ("torch", "there is no op 'torch'"),
    ],
)
def test_errors_for_people(text, message, monkeypatch):
    monkeypatch.setenv(forms.ENVIRONMENT, text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        forms.pick("product_topk")
    assert f"MEGAMEM_FORMS={text}" in str(caught.value)


def test_what_is_selected_of_several():
    assert forms.parse(" row_adam=list , product_topk=torch,") == {
        "row_adam": "list",
        "product_topk": "torch",
    }
    assert forms.parse("") == {}


def test_the_page_of_kernels_lists_every_form():
    page = (ROOT / "megamem/kernels/README.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| `(\w+)` \| ([^|]+) \|", page, re.MULTILINE)
    found = {op: [default, *re.findall(r"\w+", others)] for op, default, others in listed}
    several = {op: set(forms) for op, forms in FORMS.items() if len(forms) > 1}
    assert {op: set(forms) for op, forms in found.items()} == several
    assert all(found[op][0] == next(iter(FORMS[op])) for op in several)

"""lm-eval on what was trained to know facts: the exported folder, and the checkpoint itself.

    bash tests/lm_eval.sh           makes the environment that this needs, and runs it

Nothing is loaded from a network: lm-eval and its data sets are told to be offline.
"""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.warm_ranks import environment_of_runs

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv" / "lm_eval" / "bin" / "python"
FACTS = ROOT / "examples" / "facts"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
TASKS = {
    "megamem_facts": ("question", True),
    "megamem_facts_unseen": ("unseen", True),
    "megamem_facts_held_out": ("question", False),
}
MODEL = (
    *("--num-layers", 2, "--hidden-size", 64, "--num-attention-heads", 4),
    *("--ffn-hidden-size", 128, "--seq-length", 64, "--max-position-embeddings", 64),
    *("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu"),
    *("--norm-epsilon", 1e-4, "--disable-bias-linear", "--attention-dropout", 0),
    *("--hidden-dropout", 0, "--memory-layers", 1, "--memory-num-keys", 32, "--memory-topk", 4),
    *("--memory-heads", 2, "--memory-lr", 2e-2, "--memory-qk-norm"),
    *("--memory-value-init-std", 0.02),
)
TRAINING = (
    *("--micro-batch-size", 32, "--global-batch-size", 32, "--train-iters", 250, "--lr", 8e-3),
    *("--lr-warmup-iters", 20, "--lr-decay-style", "cosine", "--eval-interval", 1000),
    *("--eval-iters", 1, "--log-interval", 50, "--num-workers", 0, "--clip-grad", 1.0),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gloo,
    # a broken environment is an error, and bash tests/lm_eval.sh makes one if there is none
    pytest.mark.skipif(
        not PYTHON.exists(), reason="there is no .venv/lm_eval; bash tests/lm_eval.sh makes it"
    ),
]


def _run(*words: object, check: bool = True, where: Path = ROOT) -> str:
    """What a command of the environment prints."""
    done = subprocess.run(
        [str(word) for word in (PYTHON, *words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
        cwd=where,
        env=environment_of_runs(OFFLINE),
    )
    assert not check or done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@dataclass(frozen=True)
class Trained:
    """A model that knows some facts."""

    checkpoints: Path
    exported: Path
    facts: Path
    probes: dict[str, dict[str, Any]]
    """What probe.py counted, by phrasing."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("lm_eval")
    data, checkpoints, exported = (folder / name for name in ("data", "checkpoints", "exported"))
    small = ("--facts", 200, "--held-out", 40, "--vocab-size", 700)
    _run(FACTS / "build_corpus.py", "--output", data, *small)
    flags = (
        *(*MODEL, *TRAINING, "--save", checkpoints, "--save-interval", 1000),
        *("--tokenizer-type", "SentencePieceTokenizer"),
        *("--tokenizer-model", data / "tokenizer.model", "--data-cache-path", data / "cache"),
        *("--train-data-path", data / "facts_train", "--valid-data-path", data / "facts_valid"),
    )
    launcher = ("-m", "megamem.run", "--cpu")
    _run(*launcher, ROOT / "examples/pretrain_gpt.py", *flags)
    asking = ("--load", checkpoints, "--facts", data / "facts.json", "--phrasing", "both")
    output = folder / "probe.json"
    _run(*launcher, FACTS / "probe.py", *flags, *asking, "--probe-output", output)
    probes = {one["phrasing"]: one for one in json.loads(output.read_text())["probes"]}
    exporting = ("convert", "export", checkpoints, "--to", exported, "--format", "hf")
    _run("-m", "megamem", *exporting)
    return Trained(checkpoints, exported, data / "facts.json", probes)


def _evaluate(trained: Trained, output: Path, *words: object) -> dict[str, Any]:
    """The results of lm-eval, and its samples, by task."""
    asked = ("--include_path", FACTS / "lm_eval", "--metadata", f"facts={trained.facts}")
    output.mkdir()
    # elsewhere, as paths of the tasks must not be those of the checkout
    _run(
        *(*words, "--tasks", *TASKS, *asked, "--batch_size", 32),
        *("--output_path", output, "--log_samples"),
        where=output,
    )
    (file,) = output.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    samples = {
        task: [
            json.loads(line)
            for path in output.rglob(f"samples_{task}_2*.jsonl")
            for line in path.read_text().splitlines()
        ]
        for task in TASKS
    }
    return {"results": results, "samples": samples}


def _check(trained: Trained, found: dict[str, Any]) -> None:
    """It counted what the probe counted."""
    for task, (phrasing, stated) in TASKS.items():
        probe = trained.probes[phrasing]
        kind = "scores" if stated else "control"
        asked, right = (sum(row[what] for row in probe[kind]) for what in ("asked", "right"))
        result = found["results"][task]["exact_match,none"]
        assert len(found["samples"][task]) == asked
        assert result == pytest.approx(right / asked, abs=1e-12), task
    known = found["results"]["megamem_facts"]["exact_match,none"]
    assert 0.2 < known < 1.0, "the comparison needs answers that are right, and some that are not"


def _answers(found: dict[str, Any]) -> dict[str, list[str]]:
    return {
        task: [row["filtered_resps"][0] for row in sorted(rows, key=lambda row: row["doc_id"])]
        for task, rows in found["samples"].items()
    }


def test_a_checkpoint_and_its_export_score_what_the_probe_counts(
    trained: Trained, tmp_path: Path
) -> None:
    ours = ("-m", "megamem.eval_harness", "--cpu", "--model", "megamem", "--model_args")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
    torchrun = (*torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    load = f"load={trained.checkpoints}"
    exported = f"pretrained={trained.exported},trust_remote_code=True,dtype=float32"
    found = {
        "checkpoint": _evaluate(trained, tmp_path / "one", *ours, load),
        "on two ranks": _evaluate(
            trained, tmp_path / "two", *torchrun, *ours, load, "tensor_model_parallel_size=2"
        ),
        "exported": _evaluate(
            *(trained, tmp_path / "hf", "-m", "lm_eval", "--model", "hf"),
            *("--model_args", exported, "--device", "cpu"),
        ),
    }
    for one in found.values():
        _check(trained, one)
        assert _answers(one) == _answers(found["exported"])


LOGLIKELIHOODS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from eval_harness import Checkpoint

checkpoint, exported = sys.argv[2:4]
texts = ["</s>The capital of France is Paris", "a b c d e f g", "The coin of Japan: " + "yen " * 30]
pairs = [(text[: 3 + len(text) // 2], text[3 + len(text) // 2 :]) for text in texts]
pairs += [("", "Paris"), ("word " * 80, "word")]
facts = [fact for fact in json.load(open(sys.argv[4]))["facts"] if fact["held_in"]][:5]
pairs += [("</s>" + fact["question"], " " + fact["answer"]) for fact in facts]
ours = Checkpoint(load=checkpoint, batch_size="2")
settings = {"trust_remote_code": True, "dtype": "float32", "device": "cpu", "batch_size": 2}
theirs = HFLM(pretrained=exported, **settings)
texts.append("A text of several windows: " + "yen and dollars, " * 60)
for kind, asked in (("loglikelihood", pairs), ("loglikelihood_rolling", [(t,) for t in texts])):
    requests = [Instance(kind, {}, args, n) for n, args in enumerate(asked)]
    found, wanted = (getattr(model, kind)(requests) for model in (ours, theirs))
    assert len(found) == len(wanted) == len(asked)
    for one, other in zip(found, wanted):
        log, other_log = (x[0] if kind == "loglikelihood" else x for x in (one, other))
        assert abs(log - other_log) < 1e-3 * max(1, abs(other_log)), (kind, found, wanted)
        assert kind != "loglikelihood" or one[1] == other[1], (found, wanted)
    assert any(kind != "loglikelihood" or one[1] for one in found)
stops = [{"until": ["\\n"], "max_gen_toks": 8}, {"until": ["a", "e"], "max_gen_toks": 20}]
requests = [Instance("generate_until", {}, (a, s), 0) for a, _ in pairs[1:] if a for s in stops]
found, wanted = ours.generate_until(requests), theirs.generate_until(requests)
assert found == wanted and any(found), (found, wanted)
print("the same")
"""


def test_all_that_a_model_is_asked_is_what_the_export_says(
    trained: Trained, tmp_path: Path
) -> None:
    script = tmp_path / "loglikelihoods.py"
    script.write_text(LOGLIKELIHOODS)
    paths = (ROOT / "examples", trained.checkpoints, trained.exported, trained.facts)
    assert "the same" in _run("-m", "megamem.run", "--cpu", script, *paths)


def test_bad_input_is_told_in_a_line(trained: Trained, tmp_path: Path) -> None:
    def said(*words: object, task: str = "megamem_facts", facts: object = trained.facts) -> str:
        asked = ("--include_path", FACTS / "lm_eval", "--metadata", f"facts={facts}")
        ours = ("-m", "megamem.eval_harness", "--cpu", "--model", "megamem", "--tasks", task)
        text = _run(*ours, *asked, *words, check=False)
        (line,) = re.findall(r"^mega\w+: error: .*(?:\n(?=  ).*)*", text, re.MULTILINE)
        assert "Traceback" not in text, text
        return line

    load = f"load={trained.checkpoints}"
    assert "no load=CHECKPOINTS" in said("--model_args", "bf16=True")
    assert "no checkpoint there" in said("--model_args", f"load={tmp_path}")
    assert "--batch_size auto" in said("--model_args", load, "--batch_size", "auto")
    assert "the task samples" in said("--model_args", load, "--gen_kwargs", "do_sample=True")
    long = ("--gen_kwargs", "max_gen_toks=64")
    assert "max_gen_toks=32" in said("--model_args", load, *long)
    assert "no such file" in said("--model_args", load, facts=tmp_path / "gone.json")

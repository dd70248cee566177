"""Checkpoints read with the settings that are saved in them, on several ranks, against Megatron."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.megatron_runs import ROOT, command_line, launch_warm

LOGITS, READER = (ROOT / "tests/helpers" / name for name in ("logits.py", "reads_checkpoint.py"))
# what --use-checkpoint-args leaves out is among these
MODEL = (
    *("--memory-layers", 1, 2, "--memory-num-keys", 16, "--memory-heads", 2, "--memory-topk", 4),
    *("--normalization", "RMSNorm", "--norm-epsilon", 1e-2, "--qk-layernorm", "--squared-relu"),
    *("--rotary-seq-len-interpolation-factor", 4, "--rotary-base", 500),
    *("--group-query-attention", "--num-query-groups", 2, "--memory-qk-norm"),
)
EXPERTS = (
    *("--memory-layers", 1, 3, "--memory-num-keys", 16, "--memory-topk", 4, "--num-experts", 4),
    *("--moe-ffn-hidden-size", 48, "--moe-layer-freq", "[0,1,1,0]", "--moe-router-topk", 2),
    *("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
    *("--moe-shared-expert-intermediate-size", 40, "--moe-shared-expert-gate", "--swiglu"),
    *("--use-rope-scaling", "--rope-scaling-factor", 8, "--memory-keep-ffn"),
)
HYBRID = (
    *("--hybrid-layer-pattern", "*-*-", "--memory-layers", 1, 3, "--memory-num-keys", 16),
    *("--memory-topk", 4, "--normalization", "RMSNorm"),
    *("--spec", "megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"),
)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tensor parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pipeline parallel": (2, {"pipeline_model_parallel_size": 2}),
    "a table on two replicas": (2, {"memory_group_size": 2}),
}


def _save(folder: Path, *model: object) -> Path:
    saving = ("--save", folder, "--save-interval", 5, "--logits-file", folder / "logits.pt")
    folder.mkdir(exist_ok=True)
    launch_warm("saved", 1, *command_line(*model, *saving, script=LOGITS))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("saved"), *MODEL)


def _check(saved: Path, output: Path, ranks: int, settings: dict[str, Any]) -> None:
    words = (saved, saved / "logits.pt", output, json.dumps(settings))
    launch_warm("reader", ranks, "--cpu", READER, *words)
    found, known = json.loads(output.read_text()), torch.load(saved / "logits.pt")
    tokens, length = known["written"], known["tokens"].shape[1]
    wanted = known["logits"].double().log_softmax(-1)
    for place, (logs, likeliest) in enumerate(found["scores"]):
        assert len(logs) == len(likeliest) == tokens.shape[1] - 5 * place - 1
        asked = tokens[place, 1:length, None]
        theirs = wanted[place, : length - 1].gather(-1, asked)[:, 0]
        count = min(len(logs), length - 1)
        torch.testing.assert_close(
            torch.tensor(logs[:count], dtype=torch.float64), theirs[:count], rtol=1e-5, atol=1e-5
        )
        assert likeliest[:count] == wanted[place, :count].argmax(-1).tolist()
        # what it wrote is what it finds likeliest
        assert likeliest[length - 1 :] == tokens[place, length : len(logs) + 1].tolist()
    texts = [" ".join(map(str, row)) for row in tokens[:, length:].tolist()]
    # the third token of the last text stops it
    *whole, cut = texts
    assert found["texts"][:-1] == whole
    stop = cut.split()[2]
    assert found["texts"][-1] == cut[: cut.index(stop)]


@pytest.mark.gloo
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_says_how_it_is_read(saved: Path, layout: str, tmp_path: Path) -> None:
    _check(saved, tmp_path / "found.json", *LAYOUTS[layout])


@pytest.mark.gloo
def test_a_hybrid_model(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core.models.hybrid", reason="hybrid models came in 0.18")
    _check(_save(tmp_path / "saved", *HYBRID), tmp_path / "found.json", 1, {})


@pytest.mark.gloo
def test_a_mixture_of_experts(tmp_path: Path) -> None:
    _check(_save(tmp_path / "saved", *EXPERTS), tmp_path / "found.json", 1, {})

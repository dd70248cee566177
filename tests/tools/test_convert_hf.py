"""Models exported for transformers against Megatron: logits, what they write, and back again."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megamem.__main__ import main
from megamem.tools.convert import torch_dist
from tests.helpers.megatron_runs import command_line, launch_warm

SCRIPT = Path(__file__).parents[1] / "helpers" / "logits.py"
MEMORY = (
    *("--memory-layers", 1, 2, "--memory-num-keys", 16),
    *("--memory-heads", 2, "--memory-topk", 4),
)
LLAMA = ("--normalization", "RMSNorm", "--swiglu", "--untie-embeddings-and-output-weights")
EXPERTS = ("--num-experts", 4, "--moe-ffn-hidden-size", 48, "--moe-layer-freq", "[0,1,1,0]")
# what is exported is every form of a model that is supported, several in each of these
FORMS = {
    "llama": LLAMA,
    "gpt-2": (
        *("--position-embedding-type", "learned_absolute", "--memory-variant", "memory"),
        *("--memory-pool", "layer", "--memory-key-dim", 16),
    ),
    "exact gelu": ("--no-bias-gelu-fusion",),
    "nemotron": (
        *("--squared-relu", "--group-query-attention", "--num-query-groups", 2),
        *("--rotary-percent", 0.5, "--rotary-base", 500, "--kv-channels", 24),
        *("--qk-layernorm", "--norm-epsilon", 1e-3, "--memory-qk-norm"),
    ),
    "qwen": (
        *LLAMA,
        *("--add-qkv-bias", "--qk-layernorm", "--rotary-seq-len-interpolation-factor", 4),
        *("--memory-keep-ffn", "--memory-variant", "peer", "--memory-key-dim", 16),
    ),
    "mixtral": (
        *LLAMA,
        *EXPERTS,
        *("--moe-router-topk", 2, "--use-rope-scaling", "--rope-scaling-factor", 8),
        *("--memory-layers", 1, 3),
    ),
    "deepseek": (
        *LLAMA,
        *EXPERTS,
        *("--moe-router-topk", 2, "--moe-router-score-function", "sigmoid"),
        *("--moe-router-enable-expert-bias", "--moe-router-topk-scaling-factor", 2.5),
        *("--moe-shared-expert-intermediate-size", 40, "--memory-keep-ffn"),
        *("--memory-layers", 1, 3, "--memory-variant", "peer", "--memory-key-dim", 16),
        *("--memory-pool", "layer", "--position-embedding-type", "none"),
    ),
    "qwen-moe": (
        *LLAMA,
        *EXPERTS,
        *("--moe-router-topk", 2, "--moe-router-pre-softmax"),
        *("--moe-shared-expert-intermediate-size", 40, "--moe-shared-expert-gate"),
        *("--memory-layers", 1, 3),
    ),
}
WITH_BIASES = ("gpt-2", "exact gelu")


@dataclass(frozen=True)
class Saved:
    """A random model of Megatron and what it says."""

    checkpoint: Path
    tokens: torch.Tensor
    logits: torch.Tensor
    written: torch.Tensor


def _saved(folder: Path, form: str, *flags: object, ranks: int = 1) -> Saved:
    checkpoint, file = folder / "checkpoint", folder / "logits.pt"
    saving = ("--save", checkpoint, "--save-interval", 5, "--logits-file", file)
    words = command_line(*MEMORY, *FORMS[form], *flags, *saving, script=SCRIPT)
    if form in WITH_BIASES:
        words = tuple(word for word in words if word != "--disable-bias-linear")
    launch_warm(form, ranks, *words)
    return Saved(checkpoint, **torch.load(file))


def _export(saved: Saved, *words: str) -> Path:
    folder = saved.checkpoint.with_name("exported")
    given = ["convert", "export", str(saved.checkpoint), "--to", str(folder), "--format", "hf"]
    assert main([*given, *words]) == 0
    return folder


def _loaded(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    return model.eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return _saved(tmp_path_factory.mktemp("llama"), "llama")


def _check(saved: Saved, model: PreTrainedModel) -> None:
    with torch.no_grad():
        logits = model(saved.tokens).logits
    assert logits.shape == saved.logits.shape
    assert (logits - saved.logits).abs().max() <= 1e-5 * max(1, saved.logits.abs().max())
    written = model.generate(
        saved.tokens,
        attention_mask=torch.ones_like(saved.tokens),
        max_length=saved.written.shape[1],
        do_sample=False,
        eos_token_id=None,
    )
    assert written.equal(saved.written)


@pytest.mark.gloo
@pytest.mark.parametrize("form", FORMS)
def test_it_says_what_megatron_says_and_comes_back_bit_for_bit(form: str, tmp_path: Path) -> None:
    saved = _saved(tmp_path, form)
    folder = _export(saved)
    _check(saved, _loaded(folder))
    back = tmp_path / "back"
    assert main(["convert", "import", str(folder), "--to", str(back)]) == 0
    was, found = (torch_dist.TorchDist(path).tensors for path in (saved.checkpoint, back))
    assert was.keys() == found.keys()
    for key, tensor in was.items():
        assert tensor.whole().equal(found[key].whole()), key

"""Models exported for transformers against Megatron: logits, what they write, and back again."""

import argparse
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megamem.__main__ import main
from megamem.config import ConfigurationError
from megamem.reference.placement import place_rows
from megamem.tools.convert import torch_dist
from megamem.tools.convert.hf import folder as hf_folder
from megamem.tools.convert.hf.code import configuration_megamem
from megamem.tools.convert.hf.code.configuration_megamem import MegamemConfig
from megamem.tools.convert.hf.code.modeling_megamem import MegamemForCausalLM, MegamemModel
from megamem.tools.convert.hf.settings import FORMAT, OBSTACLES, PLAIN_FORMAT, obstacles
from megamem.tools.convert.hf.tokenizer import write_tokenizer
from megamem.tools.convert.safetensors import INDEX, read_folder
from tests.helpers.megatron_runs import command_line, launch_warm, run_training

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
    "ultramem": (
        *(*LLAMA, "--memory-variant", "ultramem", "--memory-layers", 0, 2, "--memory-skip", 1),
        *("--memory-final-topk", 6, "--memory-placement", "stored"),
    ),
    "ultramem-v2": (
        *(*LLAMA, "--memory-variant", "ultramem-v2", "--memory-layers", 0, 1, 2, 3),
        *("--memory-share-layers", 2, "--memory-expansion", 4, "--memory-placement-seed", 5),
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


def _export(saved: Saved, where: Path, *words: str) -> Path:
    folder = where / "exported"
    given = ["convert", "export", str(saved.checkpoint), "--to", str(folder), "--format", "hf"]
    assert main([*given, *words]) == 0
    return folder


def _loaded(folder: Path, **fields: Any) -> PreTrainedModel:
    how = {"trust_remote_code": True, "dtype": "auto"}
    model = AutoModelForCausalLM.from_pretrained(folder, **how, **fields)
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
    folder = _export(saved, tmp_path)
    _check(saved, _loaded(folder))
    back = tmp_path / "back"
    assert main(["convert", "import", str(folder), "--to", str(back)]) == 0
    was, found = (torch_dist.TorchDist(path).tensors for path in (saved.checkpoint, back))
    assert was.keys() == found.keys()
    for key, tensor in was.items():
        assert tensor.whole().equal(found[key].whole()), key


ALONE = """
import sys
sys.modules.update(dict.fromkeys(("megatron", "megamem", "triton"), None))
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto")
saved = torch.load(sys.argv[2])
with torch.no_grad():
    assert (model(saved["tokens"]).logits - saved["logits"]).abs().max() < 1e-5
"""


@pytest.mark.gloo
def test_it_needs_neither_megatron_nor_megamem(llama: Saved, tmp_path: Path) -> None:
    folder = _export(llama, tmp_path)
    words = [sys.executable, "-c", ALONE, str(folder), str(llama.checkpoint.parent / "logits.pt")]
    ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.gloo
def test_what_is_in_the_folder(llama: Saved, tmp_path: Path) -> None:
    folder = _export(llama, tmp_path, "--shard-size", "1e-4", "--dtype", "bf16")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2 and (folder / INDEX).is_file()
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["megamem_format"] == PLAIN_FORMAT
    assert config["memory_layers"] == [1, 2] and config["memory_topk"] == 4
    assert (folder / "generation_config.json").is_file()
    card = (folder / "README.md").read_text()
    assert "1 of 16^2 = 256 rows of 64 numbers: 16,384 parameters" in card
    assert "| --global-batch-size | 4 |" in card
    model = _loaded(folder)
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        errors = (model(llama.tokens).logits.float() - llama.logits).abs()
    # single tokens may read other rows
    assert errors.median() < 0.03 * llama.logits.std() and errors.max() > 1e-4
    assert not [*folder.parent.glob(".*")]


@pytest.mark.gloo
def test_training_and_what_transformers_asks_of_a_model(llama: Saved, tmp_path: Path) -> None:
    model = _loaded(_export(llama, tmp_path)).train()
    found = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        out = model(llama.tokens, labels=llama.tokens, output_hidden_states=True)
        out.loss.backward()
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        found.append([x.grad.clone() for x in model.parameters()])
        labels = llama.tokens[:, 1:]
        wanted = torch.nn.functional.cross_entropy(llama.logits[:, :-1].mT, labels)
        assert out.loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    for plain, again in zip(*found, strict=True):
        assert plain.abs().sum() > 0 and plain.allclose(again, rtol=1e-5, atol=1e-7)
    # padding on the left changes nothing for a sentence
    model.eval()
    padded = torch.nn.functional.pad(llama.tokens[:1], (5, 0), value=3)
    seen = (torch.arange(padded.shape[1]) >= 5).long()[None]
    places = (seen.cumsum(1) - 1).clamp(min=0)
    for kind in ("eager", "sdpa"):
        model.set_attn_implementation(kind)
        with torch.no_grad():
            out = model(padded, attention_mask=seen, position_ids=places, output_attentions=True)
        assert (out.logits[:, 5:] - llama.logits[:1]).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert (_loaded(tmp_path / "again")(llama.tokens).logits - llama.logits).abs().max() < 1e-5


def test_a_model_without_weights_starts_as_the_published_layer(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 32}
    memory = {"memory_layers": [1], "memory_num_keys": 16, "memory_topk": 4, "memory_qk_norm": True}
    memory |= {"memory_value_dim": 64, "memory_key_dim": 32}
    config = MegamemConfig(**sizes, **memory, num_attention_heads=4)
    model = MegamemForCausalLM(config)
    table = model.model.tables["shared"]["v"].weight
    assert table.std().item() == pytest.approx(64**-0.5, rel=0.05)
    memory = model.model.layers[1].memory
    assert memory.sub_keys.abs().max().item() == pytest.approx(32**-0.5, rel=0.05)
    assert memory.key_norm.weight.unique().tolist() == pytest.approx([16**-0.5])
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_what_vllm_asks_of_a_model_for_its_transformers_backend() -> None:
    """As its documentation lists under "Writing custom models"; vLLM itself was not run."""
    assert MegamemModel._supports_attention_backend and MegamemModel.is_backend_compatible()
    source = inspect.getsource(sys.modules[MegamemModel.__module__])
    assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in source
    config = MegamemConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=16,
        memory_layers=[0],
        memory_num_keys=4,
        memory_topk=2,
        memory_key_dim=8,
        memory_value_dim=32,
        expert_layers=[1],
        num_experts=4,
        moe_intermediate_size=8,
    )
    model = MegamemModel(config)
    reached: list[Any] = []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **how: Any) -> Any:
        reached.append((module.layer_idx, mask, how["attention_instances"]))
        return query.transpose(1, 2), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", attend)
        model.config._attn_implementation = "vllm"
        out = model(
            input_ids=torch.tensor([[1, 2, 3]]),
            position_ids=torch.tensor([[0, 1, 2]]),
            use_cache=False,
            return_dict=False,
            attention_instances="theirs",
        )
    assert reached == [(0, None, "theirs"), (1, None, "theirs")] and out[0].shape == (1, 3, 32)
    # experts: all of their weights in three dimensions, and arguments of these names
    block = model.layers[1].mlp
    assert all(x.dim() == 3 for x in block.experts.parameters())
    names = [*inspect.signature(block.experts.forward).parameters]
    assert names == ["hidden_states", "top_k_index", "top_k_weights"]
    lists = [one for one in model.children() if isinstance(one, torch.nn.ModuleList)]
    assert lists == [model.layers]
    modules = dict(model.named_modules())
    for pattern in MegamemConfig.base_model_tp_plan:
        assert any(re.fullmatch(pattern.replace("*", r"\d+"), name) for name in modules) or (
            ".mlp." in pattern
        )
    for name in MegamemConfig.base_model_pp_plan:
        assert name in modules


VALUES = {
    "position_embedding_type": "yarn",
    "softmax_type": "learnable",
    "moe_router_load_balancing_type": ["aux_loss", "sinkhorn"],
    "window_size": (128, 0),
    "mtp_num_layers": 2,
}


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda obstacle: obstacle.name)
def test_what_would_not_be_the_same_model_is_refused(obstacle: Any) -> None:
    value = VALUES.get(obstacle.name, True)
    (problem,) = obstacles(argparse.Namespace(**{obstacle.name: value}))
    assert obstacle.flag in problem and "--format hf" in problem
    if value is not True:
        shown = value if isinstance(value, list | tuple) else [value]
        assert " ".join(map(str, shown)) in problem


@pytest.mark.gloo
def test_bad_input_is_told_in_a_line(
    llama: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    folder = _export(llama, tmp_path)
    capsys.readouterr()

    def said(*words: object) -> str:
        assert main(["convert", *map(str, words)]) == 2
        text = capsys.readouterr().err
        assert text.startswith("megamem: error: ") and text.count("\n") == 1, text
        return text

    exporting = ("export", llama.checkpoint, "--format", "hf", "--to")
    assert "exists and is not empty" in said(*exporting, folder)

    def back(name: str, change: Any) -> str:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        change(copy)
        text = said("import", copy, "--to", tmp_path / f"{name} back")
        assert not (tmp_path / f"{name} back").exists()
        return text

    def with_config(**changed: Any) -> Any:
        def change(copy: Path) -> None:
            config = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps(config | changed))

        return change

    assert "has format 99" in back("newer", with_config(megamem_format=99))
    assert "of type llama" in back("other", with_config(model_type="llama"))
    assert "no weight model.layers.4" in back("more", with_config(num_hidden_layers=5))
    assert "has the weight" in back("fewer", with_config(num_hidden_layers=3))
    assert "is not the config" in back("cut", lambda copy: (copy / "config.json").write_text("{"))
    weights = "model.safetensors"
    assert "safetensors" in back("gone", lambda copy: (copy / weights).unlink())
    assert "safetensors" in back("short", lambda copy: os.truncate(copy / weights, 1000))

    # a release holds no arguments of Megatron
    assert main(["convert", "import", str(folder), "--to", str(tmp_path / "release")]) == 0
    capsys.readouterr()
    out = tmp_path / "out"
    text = said("export", tmp_path / "release", "--format", "hf", "--to", out)
    assert f"{tmp_path / 'release'} has none, because it was converted; train it" in text

    # nothing is left where a write fails half-way
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hf_folder, "write_folder", full)
        text = said(*exporting, out)
    assert "No space left" in text and not out.exists() and not [*tmp_path.glob(".*")]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=10))
        assert "are free" in said(*exporting, out)


TEXTS = (
    "The capital of France is Paris.",
    "  two  spaces, and   more ",
    "tabs\tand\nlines\n\n",
    "naïve café, Zürich, 東京, Ελλάδα, 🙂",
    "1234567890 +-*/ <s> </s> <unk>",
    "",
    " ",
    "▁ a piece",
)


@pytest.mark.parametrize("normalization", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_tokenizer_of_sentencepiece(kind: str, normalization: str, tmp_path: Path) -> None:
    lines = Path(__file__).read_text().splitlines() + [*TEXTS[:4]] * 5
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=kind,
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name=normalization,
        pad_id=3,
        minloglevel=2,
    )
    file = tmp_path / "tokenizer.model"
    file.write_bytes(model.getvalue())
    args = argparse.Namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(file))
    folder = tmp_path / "out"
    folder.mkdir()
    ids, lacks = write_tokenizer(args, folder)
    assert ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3} and lacks is None
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    # SentencePiece has no special tokens in a text
    ours = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    assert (ours.eos_token, ours.pad_token) == ("</s>", "<pad>")
    for text in (*TEXTS, *lines):
        wanted = theirs.encode(text)
        found = ours(text)["input_ids"]
        assert found == wanted, text
        assert ours.decode(found) == theirs.decode(wanted), text


def test_a_tokenizer_of_hugging_face_is_copied_and_others_are_named(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "out"
    source.mkdir(), folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (source / name).write_text("{}")
    (source / "config.json").write_text('{"eos_token_id": 7}')
    args = argparse.Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(source))
    assert write_tokenizer(args, folder) == ({"eos_token_id": 7}, None)
    assert {path.name for path in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    args.tokenizer_model = "org/name"
    ids, lacks = write_tokenizer(args, folder)
    assert not ids and lacks and "org/name" in lacks and "save_pretrained" in lacks
    args = argparse.Namespace(tokenizer_type="GPT2BPETokenizer", tokenizer_model=None)
    ids, lacks = write_tokenizer(args, folder)
    assert not ids and lacks and "--tokenizer-type GPT2BPETokenizer" in lacks
    args = argparse.Namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model="gone.model")
    with pytest.raises(ConfigurationError, match=r"gone\.model .* --tokenizer-model"):
        write_tokenizer(args, folder)
    (tmp_path / "gone.model").write_text("no model")
    args.tokenizer_model = str(tmp_path / "gone.model")
    with pytest.raises(ConfigurationError, match="is not a SentencePiece model"):
        write_tokenizer(args, folder)


def test_the_code_and_the_converter_agree_on_the_format() -> None:
    assert FORMAT == configuration_megamem.FORMAT
    with pytest.raises(ValueError, match="megamem_format 99"):
        MegamemConfig(megamem_format=99)


@pytest.mark.gloo
def test_smaller_tables_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run of one step, which reads some of the rows."""
    saved, tokens = tmp_path / "saved", torch.arange(60).view(2, 30)
    saving = ("--save", saved, "--save-interval", 1, "--train-iters", 1)
    run_training("save", 1, *MEMORY, *LLAMA, "--memory-num-keys", 64, *saving)
    trained = Saved(saved, tokens, tokens, tokens)
    plain = _loaded(_export(trained, tmp_path / "plain"))
    pruned = _export(trained, tmp_path / "pruned", "--drop-unread")
    said = capsys.readouterr().out
    checkpoint = torch_dist.TorchDist(saved).tensors
    counts = checkpoint["optimizer.memory_values.shared.hits"].whole()
    seed = int(checkpoint["memory_values.shared.placement"].whole())
    read = (counts > 0)[place_rows(torch.arange(4096), 64, seed)]
    rows = int(read.sum())
    assert 0 < rows < 4096 and f"{rows:,} of 4,096 rows were read and are kept" in said
    found = read_folder(pruned)[0]
    assert found["model.tables.shared.v.weight"].shape == (rows, 64)
    assert (found["model.tables.shared.v.row_of"] >= 0).equal(read)
    before, now = sum(x.nbytes for x in plain.parameters()), sum(x.nbytes for x in found.values())
    assert f"{before:,} bytes before, {now:,} bytes now" in said
    with torch.no_grad():
        plain.model.tables["shared"]["v"].weight[~read] = 0
        wanted = plain(tokens).logits
        for model in (_loaded(pruned), _loaded(pruned, memory_table_device="disk")):
            assert (model(tokens).logits - wanted).abs().max() < 1e-6
        small = _export(trained, tmp_path / "small", "--drop-unread", "--table-dtype", "int8")
        # a token that reads another row, as the scores were close, differs more
        assert 0 < (_loaded(small)(tokens).logits - wanted).abs().median() < 1e-2
    assert "| tables in | int8, with a scale" in (small / "README.md").read_text()
    for folder in (pruned, small):
        capsys.readouterr()
        assert main(["convert", "import", str(folder), "--to", str(tmp_path / "back")]) == 2
        said = capsys.readouterr().err
        assert "without --table-dtype and --drop-unread" in said and said.count("\n") == 1
    words = ["convert", "export", str(saved), "--to", str(tmp_path / "megatron")]
    assert main([*words, "--drop-unread"]) == 2
    assert "--drop-unread needs --format hf" in capsys.readouterr().err
    back = tmp_path / "converted"
    assert main(["convert", "import", str(tmp_path / "plain/exported"), "--to", str(back)]) == 0
    words = ["convert", "export", str(back), "--to", str(tmp_path / "out"), "--format", "hf"]
    capsys.readouterr()
    assert main([*words, "--drop-unread"]) == 2
    assert "holds no read counts" in capsys.readouterr().err
    # counts are those of pretraining, which sparse finetuning leaves unchanged
    uncounted = ("--save", back, "--save-interval", 1, "--train-iters", 1)
    loaded = ("--load", back, "--memory-finetune-rows", 8, "--memory-optimizer", "sgd")
    run_training("start", 1, *MEMORY, *LLAMA, "--memory-num-keys", 64, *loaded, *uncounted)
    assert main([*words, "--drop-unread"]) == 2
    said = capsys.readouterr().err
    assert "has counted no training batch" in said and said.count("\n") == 1

"""Memory layers among the real classes of Transformer Engine, on a machine without a GPU.

    bash tests/transformer_engine.sh            makes the environment that this needs, and runs it

Models are built of command lines as in a run, behind the same checks. What their layers would
compute is computed by torch, with their parameters (see engine_models.py), and compared with the
same model of Megatron's own layers. Nothing here says that a kernel of Transformer Engine is right
or fast: that takes a GPU, and `bash tests/gpu.sh te`.
"""

import json
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest

from megamem.checkpoint import SHARED, table_key
from megamem.tools import doctor
from tests.helpers.megatron_runs import MOCK_DATA, MODEL, ROOT, SWITCHES, TRAINING, run_training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("transformer_engine") is None,
        reason="Transformer Engine is not installed; bash tests/transformer_engine.sh gets it",
    ),
]

HAS_HYBRID = find_spec("megatron") and find_spec("megatron.core.models.hybrid")
hybrid_only = pytest.mark.skipif(not HAS_HYBRID, reason="hybrid models came in 0.18")

MEMORY = ("--memory-layers", 1, 3, "--memory-num-keys", 9, "--memory-heads", 2, "--memory-topk", 4)
TP2 = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
LLAMA = ("--normalization", "RMSNorm", "--swiglu")
PATTERN = "*-*-*-"
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")
FULL = (*FULL, "--recompute-num-layers", 1)
SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules")
HYBRID = (
    *("--hybrid-layer-pattern", PATTERN, "--num-layers", len(PATTERN)),
    *("--spec", "megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"),
)
FP8 = ("--bf16", "--fp8-format", "hybrid", "--fp8-recipe")


def command_line(*flags: object) -> list[str]:
    """The arguments of a run with Transformer Engine, which is Megatron's default."""
    usual = [word for pair in (MODEL | TRAINING).items() for word in pair]
    # fusions that need Apex or compute something else than the local layers
    plain = ("--no-gradient-accumulation-fusion", "--no-rope-fusion", "--no-masked-softmax-fusion")
    return [str(word) for word in (*usual, *SWITCHES, *MOCK_DATA, *plain, *flags)]


@cache
def builder() -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.megatron.engine_models"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, text=True, cwd=ROOT, **pipes)


def build(*flags: object, check: bool = True, **job: Any) -> dict[str, Any]:
    """What engine_models finds in the model of a command line."""
    __tracebackhide__ = True
    process = builder()
    process.stdin.write(json.dumps({"flags": command_line(*flags), **job}) + "\n")
    process.stdin.flush()
    found = json.loads(process.stdout.readline() or '{"error": "the builder ended"}')
    if check and "error" in found:
        pytest.fail(f"{' '.join(map(str, flags))}: {found['error']}", pytrace=False)
    return found


def of_engine(model: dict, name: str) -> bool:
    """Whether the class of a module, or one of its base classes, is of Transformer Engine."""
    return model["homes"][name].startswith(
        ("transformer_engine.", "megatron.core.extensions.transformer_engine")
    )


def inside(model: dict, prefix: str) -> dict[str, str]:
    """Name without the prefix -> class, for the modules with this prefix."""
    return {
        name.removeprefix(f"{prefix}."): kind
        for name, kind in model["modules"].items()
        if name.startswith(f"{prefix}.")
    }


@pytest.mark.parametrize(
    ("flags", "norm"),
    [pytest.param((), "LayerNorm", id="LayerNorm"), pytest.param(LLAMA, "RMSNorm", id="RMSNorm")],
)
def test_a_memory_has_a_norm_of_its_own_and_a_dense_layer_keeps_the_fused_one(flags, norm):
    model = build(*MEMORY, *flags)["model"]
    for layer in range(4):
        here = f"decoder.layers.{layer}"
        modules = inside(model, here)
        # the norm before attention is inside the first linear, in every layer
        assert modules["input_layernorm"] == "IdentityOp"
        assert modules["self_attention.linear_qkv"] == "TELayerNormColumnParallelLinear"
        if layer in (1, 3):
            assert modules["pre_mlp_layernorm"] == norm
            assert of_engine(model, f"{here}.pre_mlp_layernorm")
            assert modules["mlp"] == "MemoryMLP" and "mlp.linear_fc1" not in modules
            # no module of a memory layer is of Transformer Engine, so none computes in fp8
            assert not any(
                of_engine(model, f"{here}.mlp.{n}") for n in inside(model, f"{here}.mlp")
            )
        else:
            assert modules["pre_mlp_layernorm"] == "IdentityOp"
            assert modules["mlp.linear_fc1"] == "TELayerNormColumnParallelLinear"
            assert modules["mlp.linear_fc2"] == "TERowParallelLinear"


def test_a_feed_forward_that_stays_shares_the_norm():
    model = build(*MEMORY, "--memory-keep-ffn", *LLAMA)["model"]
    modules = inside(model, "decoder.layers.1")
    assert modules["pre_mlp_layernorm"] == "RMSNorm"
    assert modules["mlp.ffn"] == "MLP"
    assert modules["mlp.ffn.linear_fc1"] == "TEColumnParallelLinear"
    assert modules["mlp.ffn.linear_fc2"] == "TERowParallelLinear"
    assert not any("layer_norm" in name for name in model["parameters"] if ".1.mlp." in name)
    # the specs of the other layers are unchanged
    assert model["modules"]["decoder.layers.0.mlp.linear_fc1"] == "TELayerNormColumnParallelLinear"


def test_a_fused_feed_forward_that_stays_becomes_a_plain_one():
    """Megatron's fused MLP requires, in its first forward, a linear layer that applies the norm."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TEFusedMLP
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megamem.megatron import compat

    def kind(mlp: Any) -> type:
        return mlp.module if isinstance(mlp, ModuleSpec) else mlp.func.__self__

    given = get_gpt_layer_with_transformer_engine_spec(use_te_op_fuser=True).submodules.mlp
    assert kind(given) is TEFusedMLP
    kept = compat.without_fused_norm(given)
    assert kind(kept) is MLP
    submodules = kept.submodules if isinstance(kept, ModuleSpec) else kept.keywords["submodules"]
    assert submodules.linear_fc1 is TEColumnParallelLinear
    assert kind(given) is TEFusedMLP


def test_experts_beside_memories_stay_what_they_were():
    experts = ("--num-experts", 2, "--moe-layer-freq", "[1,1,0,0]")
    model = build(*MEMORY, *experts)["model"]
    kinds = [inside(model, f"decoder.layers.{n}")["mlp"] for n in range(4)]
    assert kinds == ["MoELayer", "MemoryMLP", "MLP", "MemoryMLP"]
    # the norm before experts is a separate module already, and the memory keeps it
    norms = [inside(model, f"decoder.layers.{n}")["pre_mlp_layernorm"] for n in range(4)]
    assert norms == ["LayerNorm", "LayerNorm", "IdentityOp", "LayerNorm"]
    assert not any("router" in name for name in model["modules"] if ".1." in name)


SAME_LOSS = {
    "plain": (),
    "RMSNorm and swiglu": LLAMA,
    "biases": ("--memory-layers", 0, 2),
    "feed-forward that stays": ("--memory-keep-ffn",),
    "feed-forward that stays, RMSNorm": ("--memory-keep-ffn", *LLAMA),
    "norms of queries and keys": ("--memory-qk-norm", "--qk-layernorm"),
    "grouped query attention": ("--group-query-attention", "--num-query-groups", 2),
    "plain memory": ("--memory-variant", "memory"),
    "peer": ("--memory-variant", "peer"),
    "a table for each layer": ("--memory-pool", "layer"),
    "recomputed": FULL,
    "feed-forwards recomputed": (*SELECTIVE, "mlp", "core_attn"),
    "norms recomputed": (*SELECTIVE, "layernorm"),
    "norms recomputed, feed-forward that stays": ("--memory-keep-ffn", *SELECTIVE, "layernorm"),
}


@pytest.mark.parametrize("flags", SAME_LOSS.values(), ids=SAME_LOSS.keys())
def test_loss_and_gradients_are_those_of_megatrons_own_layers(flags):
    """With the same weights by checkpoint key, no norm is lost, doubled or in another place."""
    found = build(*MEMORY, *flags, twin=True, train=True)
    assert found["model"]["checkpoint"] == found["twin"]["checkpoint"]
    ours, theirs = found["loss"], found["twin_loss"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for key, norm in ours["gradients"].items():
        assert norm == pytest.approx(theirs["gradients"][key], rel=2e-4, abs=1e-7), key
    assert all(norm > 0 for norm in ours["gradients"].values())


def test_loss_beside_experts_is_that_of_megatrons_own_layers():
    """Megatron's local layers save the norm before experts under another name, so names differ."""
    experts = ("--num-experts", 2, "--moe-layer-freq", "[1,1,0,0]")
    found = build(*MEMORY, *experts, twin=True, train=True)
    assert found["loss"]["loss"] == pytest.approx(found["twin_loss"]["loss"], rel=1e-6)
    ours, theirs = (sorted(found[of]["gradients"].values()) for of in ("loss", "twin_loss"))
    assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-7)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(MEMORY, id="memory"),
        pytest.param((*MEMORY, "--memory-keep-ffn", *LLAMA), id="feed-forward that stays"),
    ],
)
def test_a_checkpoint_goes_over_as_that_of_a_dense_model_does(flags, tmp_path):
    """To Megatron's local layers and back; before 0.19 Megatron cannot load the latter."""
    (tmp_path / "dense").mkdir()
    dense = build(twin=True, folder=str(tmp_path / "dense"))["loaded"]
    loaded = build(*flags, twin=True, folder=str(tmp_path))["loaded"]
    assert loaded["by Megatron's own"] == dense["by Megatron's own"] == []
    assert dense["by Transformer Engine's"] or loaded["by Transformer Engine's"] == []


@pytest.mark.parametrize("flags", [(), ("--qk-layernorm", *LLAMA)], ids=["usual", "all norms"])
def test_a_run_starts_from_a_converted_checkpoint(flags, tmp_path):
    """The dense model computes the same when memory layers are added beside its feed-forwards."""
    saving = ("--save", tmp_path / "dense", "--save-interval", 1, "--train-iters", 1)
    run_training("dense", 1, *saving, *flags)
    memory = ("--memory-keep-ffn", *MEMORY)
    words = ("upcycle", tmp_path / "dense", "--to", tmp_path / "to", *memory)
    command = [sys.executable, "-m", "megamem", "convert", *map(str, words)]
    subprocess.run(command, check=True, cwd=ROOT)
    start = build(*memory, *flags, load=str(tmp_path / "to" / "release"), train=True)
    assert start["loss"]["loss"] != build(*memory, *flags, train=True)["loss"]["loss"]


def test_tensor_parallel_ranks_hold_what_they_would_of_megatrons_own_layers():
    # an even number of rows
    flags = (*MEMORY, "--memory-num-keys", 8, "--memory-keep-ffn")
    whole = build(*flags)["model"]["parameters"]
    for rank in range(2):
        model = build(*flags, *TP2, world=2, rank=rank)["model"]
        parameters = model["parameters"]
        assert parameters.keys() == whole.keys()
        shapes = {name: (at["shape"], whole[name]["shape"]) for name, at in parameters.items()}
        cut = {name for name, (here, all_of_it) in shapes.items() if here != all_of_it}
        for name in cut:
            here, all_of_it = shapes[name]
            assert [2 * here[0], *here[1:]] == all_of_it or [here[0], 2 * here[1]] == all_of_it
        linears = ("linear_qkv.weight", "linear_proj.weight", "fc1.weight", "fc2.weight")
        tables = ("word_embeddings.weight", table_key(SHARED))
        assert all(name.endswith((*linears, *tables)) for name in cut), cut
        # under sequence parallelism each rank has only its own tokens, so Megatron sums the
        # gradients of parameters that are not sharded; it does so if they have this mark
        marked = {name for name, at in parameters.items() if at["sequence_parallel"]}
        assert marked == {name for name in parameters if name not in cut}
        assert model["norms"] and all(norm["sequence_parallel"] for norm in model["norms"].values())


def test_without_sequence_parallelism_nothing_is_marked():
    model = build(*MEMORY, *TP2[:2], world=2)["model"]
    assert not any(at["sequence_parallel"] for at in model["parameters"].values())
    assert not any(norm["sequence_parallel"] for norm in model["norms"].values())


def test_the_norm_before_a_memory_is_around_zero_where_all_norms_are():
    norms = build(*MEMORY, "--apply-layernorm-1p")["model"]["norms"]
    assert "decoder.layers.1.pre_mlp_layernorm" in norms
    assert all(norm["around_zero"] for norm in norms.values())


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_fp8_reaches_every_linear_but_those_of_a_memory(recipe):
    found = build(*MEMORY, "--memory-keep-ffn", *FP8, recipe, train=True)
    model, seen = found["model"], set(found["in_fp8"])
    linears = {
        name
        for name, kind in model["modules"].items()
        if kind.startswith("TE") and "Linear" in kind
    }
    assert linears and linears <= seen
    memories = {name for name in model["modules"] if ".mlp.memory" in name}
    weights = {name for name in model["parameters"] if ".mlp.memory" in name or "tables." in name}
    assert memories and weights and not any(of_engine(model, name) for name in memories)
    assert {model["parameters"][name]["dtype"] for name in weights} == {"bfloat16"}
    assert found["loss"]["loss"] > 0 and all(n > 0 for n in found["loss"]["gradients"].values())


@pytest.mark.parametrize(
    "flags",
    [FULL, ("--memory-keep-ffn", *FULL), ("--memory-keep-ffn", *SELECTIVE, "mlp")],
    ids=["full", "full, feed-forward that stays", "mlp, feed-forward that stays"],
)
def test_recomputation_in_fp8_changes_no_loss(flags):
    """Recomputation uses the checkpoint function of Transformer Engine."""
    kept = [flag for flag in flags if flag == "--memory-keep-ffn"]
    usual = build(*MEMORY, *FP8, "delayed", *kept, train=True)["loss"]
    again = build(*MEMORY, *FP8, "delayed", *flags, train=True)["loss"]
    assert again["loss"] == usual["loss"]
    assert again["gradients"] == pytest.approx(usual["gradients"], rel=1e-2)


REFUSED = {
    "--recompute-modules layernorm in fp8 or fp4": (*FP8, "tensorwise", *SELECTIVE, "layernorm"),
    "--recompute-modules mlp in fp8 or fp4": (*FP8, "delayed", *SELECTIVE, "mlp"),
    "--cuda-graph-impl": ("--cuda-graph-impl", "transformer_engine", "--te-rng-tracker"),
}


@pytest.mark.parametrize(("option", "flags"), REFUSED.items(), ids=REFUSED.keys())
def test_what_cannot_work_is_refused_with_flag_and_fix(option, flags):
    error = build(*MEMORY, *flags, check=False)["error"]
    said = re.search(r"--memory-layers does not work with (.*?): .*?; (.*)\.", error)
    assert said, error
    assert said[1] == option and "drop" in said[2]


@hybrid_only
def test_hybrid_stack_has_memories_at_the_numbers_of_its_pattern():
    flags = (*HYBRID, "--memory-layers", 1, 5, *MEMORY[3:], *LLAMA)
    for keep in (False, True):
        kept = ("--memory-keep-ffn",) if keep else ()
        model = build(*flags, *kept, hybrid=True)["model"]
        for layer, symbol in enumerate(PATTERN):
            modules = inside(model, f"decoder.layers.{layer}")
            if symbol == "*":
                assert modules["self_attention.linear_qkv"] == "TELayerNormColumnParallelLinear"
            elif layer == 3:
                assert modules["pre_mlp_layernorm"] == "IdentityOp"
                assert modules["mlp.linear_fc1"] == "TELayerNormColumnParallelLinear"
            else:
                assert modules["pre_mlp_layernorm"] == "RMSNorm"
                assert modules["mlp"] == "MemoryMLP"
                kind = "TEColumnParallelLinear" if keep else None
                assert modules.get("mlp.ffn.linear_fc1") == kind


@hybrid_only
def test_hybrid_experts_become_memories():
    pattern = "*E*-"
    flags = (*HYBRID, "--hybrid-layer-pattern", pattern, "--num-layers", len(pattern))
    model = build(*flags, "--memory-layers", 1, *MEMORY[3:], "--num-experts", 2, hybrid=True)[
        "model"
    ]
    modules = inside(model, "decoder.layers.1")
    assert modules["pre_mlp_layernorm"] == "LayerNorm" and modules["mlp"] == "MemoryMLP"


@hybrid_only
@pytest.mark.parametrize("flags", [(), ("--memory-keep-ffn",)], ids=["memory", "stays"])
def test_hybrid_loss_is_that_of_megatrons_own_layers(flags):
    given = (*HYBRID, "--memory-layers", 1, 5, *MEMORY[3:], *flags)
    found = build(*given, hybrid=True, twin=True, train=True)
    assert found["loss"]["loss"] == pytest.approx(found["twin_loss"]["loss"], rel=1e-6)
    # the local layers save norms under other names
    ours, theirs = (sorted(found[of]["gradients"].values()) for of in ("loss", "twin_loss"))
    assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-7)


@pytest.mark.gloo
def test_the_cpu_runtime_trains_where_transformer_engine_is_installed():
    log = run_training("cpu", 1, *MEMORY)
    assert log.losses[-1] < log.losses[0]


def test_doctor_names_its_release():
    finding = doctor.transformer_engine()
    assert finding.status == "ok" and re.match(r"\d+\.\d+", finding.found), finding


@hybrid_only
def test_every_command_line_of_the_gpu_part_builds_its_model(tmp_path):
    """Runs `bash tests/gpu.sh te` without a GPU."""
    command = [sys.executable, "-m", "tests.gpu.transformer_engine", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found = json.loads((tmp_path / "te.json").read_text())
    wrong = {row["name"]: row["verdict"] for row in found["rows"] if row["verdict"] != "passed"}
    assert not wrong and found["ok"] and done.returncode == 0, done.stderr[-3000:]
    assert len(found["rows"]) > 15


WATCHED = """
import json, sys
from tests.gpu import engine_run
from tests.megatron import engine_models
engine_models.prepare()
engine_run.watch()
engine_models.Model(json.loads(sys.argv[1]), train=True).found()
"""


def test_a_run_of_the_gpu_part_says_in_what_precision_it_computes():
    flags = json.dumps(command_line(*MEMORY, "--bf16"))
    command = [sys.executable, "-c", WATCHED, flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert re.findall("precision of .*", done.stdout) == [
        "precision of linears: torch.bfloat16",
        "precision of memories: torch.bfloat16, table torch.bfloat16, read-out torch.bfloat16",
    ], done.stderr[-2000:]

"""Every `yes` of the support matrix trains in a test: those of other files, or a recipe here."""

import ast
import re
from pathlib import Path

import pytest

from megamem.megatron.startup.features import FEATURES, RECIPES, Feature
from megamem.tools.support import parse
from tests.helpers.commands import parser_of
from tests.helpers.megatron_runs import command_line, run_training
from tests.megatron.test_tiny_training import MEMORY

TESTS = Path(__file__).parents[1]

# flags of scripts that people start, at the sizes of tests; --cpu does without Transformer Engine
TRAINED = {
    "DeepSeek's router and shared experts, expert parallelism": (
        2,
        "--num-experts 4 --expert-model-parallel-size 2 --moe-layer-freq ([0]*1+[1]*3) "
        "--moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 64 --moe-router-topk 2 "
        "--moe-router-num-groups 2 --moe-router-group-topk 1 --moe-router-topk-scaling-factor 2.5 "
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
        "--moe-router-bias-update-rate 1e-3 --moe-router-dtype fp32 --moe-aux-loss-coeff 1e-4 "
        "--moe-router-load-balancing-type seq_aux_loss --moe-token-dispatcher-type alltoall "
        "--swiglu --normalization RMSNorm --qk-layernorm --attention-softmax-in-fp32",
    ),
    "Qwen's attention in fp16": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --fp16 --initial-loss-scale 65536 "
        "--group-query-attention --num-query-groups 2 --kv-channels 24 --qk-layernorm --swiglu "
        "--normalization RMSNorm --norm-epsilon 1e-6 --untie-embeddings-and-output-weights "
        "--rotary-base 1000000 --rotary-percent 1.0 --use-distributed-optimizer "
        "--overlap-grad-reduce --overlap-param-gather",
    ),
    "a short first stage": (
        2,
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1 "
        "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
    ),
    "a layout of stages": (
        2,
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tttL --bf16",
    ),
    "gradients reduced in bf16": (
        2,
        "--bf16 --grad-reduce-in-bf16 --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather --calculate-per-token-loss --cross-entropy-loss-fusion",
    ),
    "GPT-3 by SGD": (
        1,
        "--optimizer sgd --sgd-momentum 0.9 --lr 0.5 --position-embedding-type learned_absolute "
        "--lr-decay-style cosine --init-method-std 0.006 --attention-dropout 0.1 "
        "--hidden-dropout 0.1 --log-params-norm --log-num-zeros-in-grad",
    ),
}
TESTED_HERE = [each for each in FEATURES if each.test == RECIPES]


def _features(name: str) -> list[Feature]:
    """What a recipe uses."""
    ranks, flags = TRAINED[name]
    words = [str(word) for word in command_line(*MEMORY, *flags.split())]
    # --cpu, which stands before the script, is the launcher's
    args, unknown = parse(words[1:], parser_of("doctor"))
    assert not unknown
    args.world_size = ranks
    return [feature for feature in FEATURES if feature.uses(args)]


@pytest.mark.gloo
@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_trains(name: str) -> None:
    ranks, flags = TRAINED[name]
    log = run_training(name, ranks, *MEMORY, *flags.split())
    assert log.iterations[-1] == 5 and not any(log.skipped)
    assert log.losses[-1] < log.losses[0] - 0.05


def test_recipes_use_what_the_matrix_says_they_test() -> None:
    used = {feature.name for name in TRAINED for feature in _features(name)}
    assert {feature.name for feature in TESTED_HERE} <= used


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_uses_nothing_that_is_refused(name: str) -> None:
    # the last depends on the memory group, which is the tensor-parallel one in all of them
    refused = [each for each in _features(name) if each.state == "refused"]
    assert not [each for each in refused if type(each) is Feature]


@pytest.mark.parametrize(
    "feature", [each for each in FEATURES if each.state == "yes"], ids=lambda feature: feature.name
)
def test_every_yes_names_a_test_that_exists(feature: Feature) -> None:
    path, _, function = feature.test.partition("::")
    source = (TESTS / path).read_text()
    tests = [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert tests and (not function or function in tests)
    if feature.test != RECIPES:
        # one of its flags is there to be seen
        flags = re.findall(r"--[a-z0-9-]+", feature.option)
        assert any(f'"{flag}"' in source for flag in flags), flags


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_a_feature_says_what_its_state_asks_for(feature: Feature) -> None:
    assert (feature.state == "yes") == bool(feature.test)
    assert (feature.state == "refused") == bool(feature.fix)
    assert feature.state == "yes" or feature.why

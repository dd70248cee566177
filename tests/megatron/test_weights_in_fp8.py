"""What --fp8-param-gather does to a model with memory layers, with a stand-in for fp8."""

import re

import pytest

from tests.helpers.megatron_runs import ROOT, run_training
from tests.megatron.test_tiny_training import DO, MEMORY


@pytest.mark.gloo
def test_only_linear_layers_are_in_the_buffer_of_fp8() -> None:
    flags = (*MEMORY, "--memory-keep-ffn", "--bf16", *DO)
    log = run_training("fp8", 1, *flags, script=ROOT / "tests/helpers/weights_in_fp8.py")
    assert log.losses[-1] < log.losses[0] - 0.1 and not any(log.skipped)
    # all others are as without it, up to the rounding of the weights in fp8
    usual = run_training("bf16", 1, *flags)
    assert log.losses == pytest.approx(usual.losses, rel=2e-2) and log.losses != usual.losses

    found = dict(re.findall(r"^(\S+) is in (no buffer|the buffer \S+)$", log.stdout, re.MULTILINE))
    places = {place: {name for name in found if found[name] == place} for place in found.values()}
    in_fp8 = places.pop("the buffer torch.uint8")
    assert in_fp8 and all(re.search(r"\.linear_(qkv|proj|fc1|fc2)\.weight$", x) for x in in_fp8)
    # a kept feed-forward is one of Megatron's; a memory has weights of its own
    assert any(".mlp.ffn." in name for name in in_fp8)
    in_bf16 = places.pop("the buffer torch.bfloat16")
    assert any(name.endswith(".mlp.memory.keys.sub_keys") for name in in_bf16)
    assert places == {"no buffer": {"memory_values.shared.v.weight"}}

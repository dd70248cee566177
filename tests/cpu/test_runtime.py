"""Tests of the runtime run in a separate process, because install() cannot be undone."""

import argparse
import re
import sys

import pytest
import torch
import torch.distributed as dist

from megamem.config import ConfigurationError
from megamem.cpu import flags as cpu_flags
from megamem.cpu import runtime as cpu_runtime
from megamem.cpu.optimizer import FusedAdam
from tests.helpers.distributed import run_distributed


def _tensors_stay_on_the_host():
    cpu_runtime.install()
    cpu_runtime.install()

    class MakesTensorsInBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad + torch.ones(3, device=torch.cuda.current_device()).cuda()

    x = torch.zeros(3, device="cuda:0", requires_grad=True)
    MakesTensorsInBackward.apply(x).sum().backward()
    assert x.grad.device.type == "cpu" and x.grad.tolist() == [2.0, 2.0, 2.0]
    assert x.to(torch.device("cuda", 1)).new_zeros(2, device="cuda").device.type == "cpu"
    assert torch.nn.Linear(2, 2, device="cuda").cuda().weight.type() == "torch.cuda.FloatTensor"
    # to(dtype) and to(tensor) work as before
    assert x.to(torch.bfloat16).to(x).dtype == torch.float32
    assert torch.zeros(2, device="meta").device.type == "meta"


def _random_state_is_the_hosts():
    cpu_runtime.install()
    torch.manual_seed(3)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(drawn, torch.rand(4))


def _megatron_finds_what_it_asks_for():
    cpu_runtime.install()
    from megatron.core.optimizer import Adam
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training import training

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, persist_layer_norm=False
    )
    for asked in (False, True):
        config.sequence_parallel = asked
        norm = WrappedTorchNorm(config, 8)
        assert isinstance(norm, torch.nn.LayerNorm) and config.sequence_parallel is asked
        assert [param.sequence_parallel for param in norm.parameters()] == [asked, asked]

    state = torch.get_rng_state()
    training.set_jit_fusion_options(tp_size=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert Adam.__name__ == "FusedAdam"
    # it is hidden even if it is installed, because its kernels need a GPU
    with pytest.raises(ImportError):
        import transformer_engine  # noqa: F401


def _split_sizes_may_be_tensors():
    cpu_runtime.install()
    sent = torch.arange(3)
    received = torch.empty(3, dtype=torch.int64)
    splits = torch.tensor([3])
    dist.all_to_all_single(received, sent, splits, splits, dist.group.WORLD)
    assert torch.equal(sent, received)


def _runtime():
    _tensors_stay_on_the_host()
    _random_state_is_the_hosts()
    _megatron_finds_what_it_asks_for()
    _split_sizes_may_be_tensors()


@pytest.mark.gloo
def test_runtime_in_a_process_of_its_own():
    run_distributed(_runtime, 1)


def test_refused_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigurationError, match="--cpu=force"):
        cpu_runtime.install()


def test_refused_after_megatron(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "megatron.core", object())
    with pytest.raises(RuntimeError, match="before megatron is imported"):
        cpu_runtime.install()


@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_adam_equals_torchs(adam_w_mode):
    torch.manual_seed(42)
    theirs_class = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    start = torch.randn(5, dtype=torch.float64)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    untouched = torch.ones(2, requires_grad=True)
    our_adam = FusedAdam([ours, untouched], adam_w_mode=adam_w_mode, **settings)
    their_adam = theirs_class([theirs], **settings)
    for _ in range(4):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        our_adam.step()
        their_adam.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    assert our_adam.param_groups[0]["step"] == 4
    assert torch.equal(untouched, torch.ones(2)) and untouched not in our_adam.state


@pytest.fixture
def parser():
    from megatron.training.arguments import add_megatron_arguments

    cpu_flags.announce.cache_clear()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    return cpu_flags.adapt_parser(add_megatron_arguments(parser))


def test_needed_flags_are_set_and_named(parser, capsys):
    for _ in range(2):
        args = parser.parse_args(["--no-rope-fusion", "--transformer-impl=local"])
    assert (args.distributed_backend, args.transformer_impl) == ("gloo", "local")
    assert not args.apply_rope_fusion and not args.gradient_accumulation_fusion
    assert args.no_persist_layer_norm and args.use_cpu_initialization
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "--distributed-backend gloo" in said[0]
    assert "--no-rope-fusion" not in said[0] and "--transformer-impl" not in said[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--distributed-backend nccl", "--distributed-backend nccl needs a GPU; .* gloo"),
        ("--transformer-impl=transformer_engine", "drop it or write --transformer-impl local"),
        ("--context-parallel-size 2", "--context-parallel-size 2 needs Transformer Engine"),
        ("--fp8-format hybrid", "--fp8-format hybrid needs Transformer Engine"),
        ("--fp8-format e4m3 --tp-comm-overlap", "drop it; --tp-comm-overlap needs"),
        ("--multi-latent-attention", "--multi-latent-attention needs Transformer Engine"),
        ("--apply-layernorm-1p", "--apply-layernorm-1p needs Transformer Engine"),
        ("--moe-latent-size 16", "--moe-latent-size 16 needs Transformer Engine"),
        ("--use-persistent-ckpt-worker", "--use-persistent-ckpt-worker starts a process that"),
        ("--yaml-cfg x.yaml", "--yaml-cfg x.yaml replaces all flags"),
        ("--recompute-modules core_attn layernorm", "drop layernorm from core_attn layernorm"),
    ],
)
def test_contrary_flags_are_refused(parser, capsys, words, message):
    with pytest.raises(SystemExit):
        parser.parse_args(words.split())
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, last_line)

"""Builds models of Transformer Engine's classes where no GPU is, and says what they are made of.

    python -m tests.megatron.engine_models

reads jobs from standard input and answers each with a line of JSON. Where a job has several ranks,
all but one are stood in for by torch's fake process group. Nothing of Transformer Engine computes
without a GPU; for a loss, torch computes in place of its kernels what their documentation says,
with the parameters of the real modules. So a norm that is lost or applied twice, or a weight that
is read from the wrong place, shows in the loss.
"""

import copy
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
os.environ |= {
    # Megatron compiles small functions, which takes longer than it saves at these sizes
    "TORCHDYNAMO_DISABLE": "1",
    "NVTE_TORCH_COMPILE": "0",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # memory layers use torch, too, because Triton's interpreter is slow
    "TRITON_INTERPRET": "0",
}

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from transformer_engine import pytorch as te  # noqa: E402
from transformer_engine.pytorch.quantization import FP8GlobalStateManager  # noqa: E402

from megamem.cpu import hybrid as cpu_hybrid  # noqa: E402
from megamem.cpu import torch_calls as cpu_torch  # noqa: E402

ALONE_AND_FUSED = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)
"""Keys of norms, and keys of the same norms fused into the linear layer behind them."""

SEEN_IN_FP8: set[str] = set()
"""Names of modules that ran inside an fp8 autocast of Transformer Engine."""


def main() -> None:
    """Read jobs from standard input and answer them until it ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    prepare()
    for line in sys.stdin:
        with tempfile.NamedTemporaryFile("w+") as answer:
            # Megatron keeps the state of a run in globals, so each job runs in its own fork
            child = os.fork()
            if not child:
                try:
                    found = Model(**json.loads(line)).found()
                except BaseException as error:
                    import traceback

                    traceback.print_exc()
                    found = {"error": f"{type(error).__name__}: {error}"}
                answer.write(json.dumps(found))
                answer.flush()
                sys.stderr.flush()
                os._exit(0)
            os.waitpid(child, 0)
            answer.seek(0)
            answers.write(answer.read() + "\n")
            answers.flush()


def prepare() -> None:
    """Prepare this process for building models without a GPU, and import Megatron."""
    cpu_torch.redirect_tensors()
    cpu_torch.stand_in_for_cuda()
    stand_in_for_kernels()
    # the tracker of random states changes the only generator and restores it
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    from megamem.megatron.launcher import attach

    attach()
    from megatron.core.transformer.moe import moe_utils

    # the scores of a router, which torch then computes
    moe_utils.te_general_gemm = None


class Model:
    """One rank's part of the model of a command line, and the same of Megatron's local layers."""

    def __init__(
        self,
        flags: list[str],
        world: int = 1,
        rank: int = 0,
        hybrid: bool = False,
        twin: bool = False,
        train: bool = False,
        folder: str | None = None,
        load: str | None = None,
    ) -> None:
        """Build it.

        Args:
            flags: behind the script's name.
            world: ranks of the run.
            rank: the one that is built.
            hybrid: of a pattern, as pretrain_hybrid.py builds it.
            twin: also build what the same flags with --transformer-impl local build.
            train: compute losses and gradients; of both, with the weights of the twin.
            folder: save both there as checkpoints, and load each from that of the other.
            load: first take the weights of the checkpoint in this folder.
        """
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}
        if world == 1:
            with tempfile.NamedTemporaryFile() as store:
                dist.init_process_group(
                    "gloo", init_method=f"file://{store.name}.store", rank=0, world_size=1
                )
        else:
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        from megatron.core import parallel_state, tensor_parallel

        from examples import megatron_releases

        sys.argv = ["pretrain_gpt.py", *flags]
        self.args = megatron_releases.read_args()
        parallel_state.initialize_model_parallel(
            self.args.tensor_model_parallel_size,
            context_parallel_size=self.args.context_parallel_size,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        self.build = megatron_releases.build_hybrid if hybrid else megatron_releases.build_gpt
        self.model = self._built(self.args)
        self.twin = None
        if twin:
            local = copy.copy(self.args)
            local.transformer_impl = "local"
            local.no_persist_layer_norm = True
            if hybrid:
                # the spec of that name, which only knows Transformer Engine, in local layers
                cpu_hybrid.supply_local_stack()
            self.twin = self._built(local)
        self.train, self.folder, self.load = train, folder, load

    def _built(self, args: Any) -> torch.nn.Module:
        from megatron.core.process_groups_config import ProcessGroupCollection

        from megamem.megatron import compat

        config = compat.CONFIG_MODULE.core_transformer_config_from_args(args)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = self.build(args, config)(groups, True, True, None)
        return model.bfloat16() if args.bf16 else model

    def found(self) -> dict[str, Any]:
        """The answer to the job."""
        answer: dict[str, Any] = {"model": described(self.model)}
        if self.twin is not None:
            answer["twin"] = described(self.twin)
        if self.load:
            from megatron.core import dist_checkpointing

            wanted = {"model": self.model.sharded_state_dict()}
            self.model.load_state_dict(dist_checkpointing.load(wanted, self.load)["model"])
        if self.folder:
            answer["loaded"] = self._through_a_checkpoint(Path(self.folder))
        if self.train:
            if self.twin is not None:
                copy_by_checkpoint_key(self.twin, self.model)
                answer["twin_loss"] = self._trained(self.twin)
            answer["loss"] = self._trained(self.model)
            answer["in_fp8"] = sorted(SEEN_IN_FP8)
        return answer

    def _trained(self, model: torch.nn.Module) -> dict[str, Any]:
        """The loss, and by checkpoint key the norm of the gradient of every parameter."""
        watch(model)
        generator = torch.Generator().manual_seed(5)
        length, vocabulary = self.args.seq_length, self.args.padded_vocab_size
        ids = torch.randint(vocabulary, (2, length + 1), generator=generator)
        positions = torch.arange(length).expand(2, -1)
        mask = torch.ones(1, 1, length, length).triu(1).bool()
        losses = model(ids[:, :-1], positions, mask, labels=ids[:, 1:])
        losses.float().mean().backward()
        keys = {
            entry.data.untyped_storage().data_ptr(): entry.key
            for entry in entries(model)
            if hasattr(entry.data, "untyped_storage")
        }
        gradients = {
            keys[param.untyped_storage().data_ptr()]: param.grad.float().norm().item()
            for param in model.parameters()
            if param.grad is not None
        }
        return {"loss": losses.float().mean().item(), "gradients": gradients}

    def _through_a_checkpoint(self, folder: Path) -> dict[str, Any]:
        """Load each of the two from a checkpoint of the other; returns the differences."""
        from megatron.core import dist_checkpointing
        from torch.distributed.checkpoint.api import CheckpointException

        answer = {}
        for name, source, target in (
            ("by Megatron's own", self.model, self.twin),
            ("by Transformer Engine's", self.twin, self.model),
        ):
            (folder / name).mkdir()
            saved = {key: entry.data.clone() for key, entry in pieces(source).items()}
            dist_checkpointing.save(source.sharded_state_dict(), str(folder / name))
            with torch.no_grad():
                for param in (*target.parameters(), *source.parameters()):
                    param.zero_()
            try:
                # as a resumed run does
                state = dist_checkpointing.load(target.sharded_state_dict(), str(folder / name))
            except CheckpointException as error:
                answer[name] = re.findall("Missing key.*", str(error))
                copy_by_checkpoint_key(target, source)
                continue
            target.load_state_dict(state)
            answer[name] = [
                key
                for key, entry in pieces(target).items()
                if key not in saved or not torch.equal(saved[key], entry.data)
            ]
            copy_by_checkpoint_key(target, source)
        return answer


def described(model: torch.nn.Module) -> dict[str, Any]:
    """Classes, parameters and checkpoint entries of a model."""
    return {
        "modules": {name: type(module).__name__ for name, module in model.named_modules()},
        "homes": {name: type(module).__module__ for name, module in model.named_modules()},
        "parameters": {
            name: {
                "shape": list(param.shape),
                "dtype": str(param.dtype).removeprefix("torch."),
                "sequence_parallel": bool(getattr(param, "sequence_parallel", False)),
                "tensor_parallel": bool(getattr(param, "tensor_model_parallel", False)),
            }
            for name, param in model.named_parameters()
        },
        "checkpoint": {
            key: [list(entry.global_shape), str(entry.dtype).removeprefix("torch.")]
            for key, entry in pieces(model).items()
        },
        "norms": {
            name: {
                "sequence_parallel": bool(module.sequence_parallel),
                "around_zero": module.zero_centered_gamma,
            }
            for name, module in model.named_modules()
            if isinstance(module, te.LayerNorm | te.RMSNorm)
        },
    }


def entries(model: torch.nn.Module) -> list[Any]:
    """The sharded state dict of a model."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    return list(nested_values(model.sharded_state_dict()))


def pieces(model: torch.nn.Module) -> dict[str, Any]:
    """The tensors of a checkpoint of the model, by key; a shard also has its offset."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    found = {}
    for entry in entries(model):
        parts = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            if isinstance(part, ShardedTensor):
                found[
                    f"{part.key}{list(part.global_offset) if any(part.global_offset) else ''}"
                ] = part
    return found


def copy_by_checkpoint_key(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Load the weights of one model into another by their checkpoint keys."""
    given = pieces(source)
    with torch.no_grad():
        for key, entry in pieces(target).items():
            # Megatron's own layers save the norm before experts as if it were fused, and those of
            # a hybrid model do so with none
            names = [key]
            for alone, fused in ALONE_AND_FUSED:
                names += [key.replace(alone, fused), key.replace(fused, alone)]
            name = next(name for name in names if name in given)
            entry.data.copy_(given[name].data)


def watch(model: torch.nn.Module) -> None:
    """Record which modules run inside an fp8 autocast of Transformer Engine."""

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if FP8GlobalStateManager.is_fp8_enabled():
                SEEN_IN_FP8.add(name)

        return hook

    for name, module in model.named_modules():
        module.register_forward_pre_hook(note(name))


def stand_in_for_kernels() -> None:
    """From now on, let torch compute what Transformer Engine's modules compute, on one rank."""
    te.Linear.forward = _linear
    te.LayerNormLinear.forward = _norm_linear
    te.LayerNorm.forward = _layer_norm
    te.RMSNorm.forward = _rms_norm
    te.DotProductAttention.forward = _attention
    # its recomputation reads the random state of the GPU
    torch.cuda.default_generators = (torch.default_generator,)


def _affine(module: Any, x: Tensor) -> Any:
    bias = module.bias if module.use_bias else None
    if module.return_bias:
        return F.linear(x, module.weight), bias
    return F.linear(x, module.weight, bias)


def _linear(self: Any, inp: Tensor, *_: Any, **__: Any) -> Any:
    return _affine(self, inp)


def _gain(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight + 1 if zero_centered else weight


def _norm_linear(self: Any, inp: Tensor, *_: Any, **__: Any) -> Any:
    gain = _gain(self.layer_norm_weight, self.zero_centered_gamma)
    shape = (inp.shape[-1],)
    if self.normalization == "RMSNorm":
        return _affine(self, F.rms_norm(inp, shape, gain, self.eps))
    return _affine(self, F.layer_norm(inp, shape, gain, self.layer_norm_bias, self.eps))


def _layer_norm(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    gain = _gain(self.weight, self.zero_centered_gamma)
    return F.layer_norm(x, tuple(self.weight.shape), gain, self.bias, self.eps)


def _rms_norm(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    gain = _gain(self.weight, self.zero_centered_gamma)
    return F.rms_norm(x, tuple(self.weight.shape), gain, self.eps)


def _attention(self: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **how: Any) -> Tensor:
    assert "causal" in str(how.get("attn_mask_type", "causal")), how
    heads = [part.permute(1, 2, 0, 3) for part in (query, key, value)]  # [B, heads, S, width]
    out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)


if __name__ == "__main__":
    main()

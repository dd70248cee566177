"""Megatron-Bridge's training loop on CPUs, as the CPU runtime does for that of Megatron-LM.

    runtime.install()  # before Megatron is imported
    bridge.install()  # before Megatron-Bridge is imported

Megatron-Bridge imports Transformer Engine unconditionally in one module, for its LoRA layers; that
module gets a stand-in for it (ENGINE), from which nothing can be computed. Everything else finds
that Transformer Engine is absent, as it is.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch.distributed as dist

from megamem.patching import replace, require

LORA_LAYERS = "megatron.bridge.peft.lora_layers"
"""The module that imports `transformer_engine.pytorch as te` without asking whether it exists."""

ENGINE = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.ops")
"""The modules of the stand-in. The last has the only name that LORA_LAYERS reads when it is
imported: Sequential, in annotations."""

FUSIONS = (
    *("gradient_accumulation_fusion", "masked_softmax_fusion", "apply_rope_fusion"),
    *("persist_layer_norm", "cross_entropy_loss_fusion"),
)
"""Fields of a model's configuration that ask for kernels of Transformer Engine or Apex."""


def install() -> None:
    """Let Megatron-Bridge be imported, and start, on a CPU; a second call changes nothing.

    Raises:
        ModuleNotFoundError: Megatron-Bridge is not installed.
    """
    if not any(isinstance(finder, _LoraLayers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _LoraLayers())
    replace(dist, "barrier", _on_all_devices)
    # its warm-up of fused kernels draws random numbers, as that of Megatron-LM
    for name in ("initialize", "setup"):
        module: Any = importlib.import_module(f"megatron.bridge.training.{name}")
        require(module, "set_jit_fusion_options")
        module.set_jit_fusion_options = lambda *args, **kwargs: None
    pretrain = importlib.import_module("megatron.bridge.training.pretrain")
    replace(pretrain, "runtime_config_update", _after_adapting)


class _LoraLayers(MetaPathFinder):
    """Finds LORA_LAYERS, and lets it import the stand-in."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != LORA_LAYERS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                hidden = sys.modules.pop(ENGINE[0], None)
                sys.modules.update(stand_in())
                try:
                    execute(module)
                finally:
                    for each in ENGINE:
                        del sys.modules[each]
                    sys.modules[ENGINE[0]] = hidden  # type: ignore[assignment]

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def stand_in() -> dict[str, ModuleType]:
    """Modules named as in ENGINE, each an attribute of the one before."""
    made = {name: ModuleType(name, "A stand-in of megamem.cpu.bridge.") for name in ENGINE}
    for name, module in made.items():
        package, _, last = name.rpartition(".")
        if package:
            setattr(made[package], last, module)
    made[ENGINE[-1]].Sequential = type("Sequential", (), {})  # type: ignore[attr-defined]
    return made


def _on_all_devices(barrier: Any) -> Any:
    """A barrier() without the GPUs that Megatron-Bridge names, which gloo does not accept."""

    def on_cpu(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return barrier(*args, **kwargs)

    return on_cpu


def _after_adapting(update: Callable[[Any], None]) -> Callable[[Any], None]:
    def runtime_config_update(cfg: Any) -> None:
        adapt(cfg)
        update(cfg)

    return runtime_config_update


def adapt(config: Any) -> None:
    """Set the values that a CPU needs in the configuration of a GPT."""
    from megatron.bridge.models.gpt_provider import local_layer_spec

    config.dist.distributed_backend = "gloo"
    config.model.transformer_layer_spec = local_layer_spec
    transformer = getattr(config.model, "transformer", config.model)
    transformer.transformer_impl = "local"
    for name in FUSIONS:
        setattr(transformer, name, False)

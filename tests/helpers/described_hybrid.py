"""examples/pretrain_hybrid.py, whose model is a MemoryHybridModelConfig's.

Its layer specs have memories before Megatron's HybridModel gets them, as in a script of one's own.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from megatron.training.argument_utils import hybrid_config_from_args  # noqa: E402
from pretrain_gpt import main  # noqa: E402

from megamem import MemoryHybridModelConfig, spec_from_args  # noqa: E402


def build_hybrid(args: Any, config: Any = None) -> Any:
    described = hybrid_config_from_args(args, config, model_config_cls=MemoryHybridModelConfig)
    described.memory = spec_from_args(args)
    return described.get_builder_cls()(described).build_model


if __name__ == "__main__":
    main(build_hybrid)

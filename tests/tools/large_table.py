"""Exports and asks a model whose table is twenty times larger than the memory it may allocate.

    python -m tests.tools.large_table FOLDER disk
    python -m tests.tools.large_table FOLDER copied     must fail, as the table is copied to memory

Linux counts in RLIMIT_DATA what a process allocates and what it maps privately to write to, but no
page that is mapped to be read or shared with a file. While transformers loads a model, safetensors
maps each file privately once, so for that time the limit is higher by the size of the files; what
would hold a second copy of the table still fails.
"""

import argparse
import os
import resource
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megamem.__main__ import main
from megamem.checkpoint import SAVED
from megamem.tools.convert import lazy, torch_dist
from megamem.tools.convert.hf.code.configuration_megamem import MegamemConfig
from megamem.tools.convert.hf.code.modeling_megamem import MegamemForCausalLM
from megamem.tools.convert.hf.names import imported
from megamem.tools.convert.hf.settings import MEMORY
from megamem.tools.convert.lazy import of_rows, of_tensor

N, WIDTH, TABLE = 283, 1024, "model.tables.shared.v.weight"
TABLE_BYTES = N * N * WIDTH * 4
LIMIT = TABLE_BYTES // 20
ARGS = {
    **{"hidden_size": 64, "ffn_hidden_size": 32, "num_layers": 3, "num_attention_heads": 4},
    **{"kv_channels": 16, "attention_dropout": 0.0, "swiglu": True, "add_bias_linear": False},
    **{"normalization": "RMSNorm", "rotary_base": 10000, "rotary_percent": 1.0},
    **{"max_position_embeddings": 64, "init_method_std": 0.02, "norm_epsilon": 1e-5},
    **{"untie_embeddings_and_output_weights": True, "position_embedding_type": "rope"},
}


def allow(more: int) -> None:
    """Let this process allocate so many bytes more than it has."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmData" in x)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(line.split()[1]) + more, hard))


def write_checkpoint(folder: Path) -> None:
    """A checkpoint whose row r is r / N^2 in every column."""
    memory = {"memory_layers": [1], "memory_num_keys": N, "memory_topk": 4, "memory_heads": 2}
    memory |= {"memory_value_dim": WIDTH, "memory_key_dim": 32}
    config = MegamemConfig(
        **{"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 32, "vocab_size": 32},
        **memory,
        num_attention_heads=4,
    )
    with torch.device("meta"):
        model = MegamemForCausalLM(config)
    weights = {
        name: of_tensor(torch.randn(x.shape) * 0.1)
        for name, x in model.named_parameters()
        if name != TABLE
    }

    def rows(ids: torch.Tensor) -> torch.Tensor:
        return (ids / N**2).float()[:, None].expand(-1, WIDTH)

    weights[TABLE] = of_rows((N * N, WIDTH), torch.float32, rows)
    settings = {name: getattr(config, f"memory_{name}") for name in MEMORY}
    tensors = imported(weights, config.to_dict(), {})
    torch_dist.write(folder, tensors, [], lambda _: None, settings)
    common = {"args": argparse.Namespace(**ARGS), SAVED: settings | {"format": 1}}
    torch.save(common, folder / torch_dist.RELEASE / "common.pt")


def run(folder: Path) -> None:
    """Write, export and ask."""
    lazy.REGION_BYTES = 2**20
    allow(LIMIT)
    write_checkpoint(folder / "checkpoint")
    allow(LIMIT)
    words = ["convert", "export", str(folder / "checkpoint"), "--to", str(folder / "hf")]
    if main([*words, "--format", "hf", "--no-tokenizer"]):
        sys.exit("the export failed")
    allow(TABLE_BYTES + LIMIT)
    copied = sys.argv[2] == "copied"
    place = "cpu" if copied else "disk"
    how = {"trust_remote_code": True, "dtype": "auto", "memory_table_device": place}
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", **how)
    allow(LIMIT)
    if copied:
        # transformers maps the table; this is what holding it in memory takes
        model.model.tables["shared"]["v"].weight.data.clone()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        logits = model(tokens).logits
    rows = model.model.tables["shared"]["v"].rows(torch.tensor([[5, N * N - 1]]))
    assert rows[0, :, 7].allclose(torch.tensor([5.0, N * N - 1]) / N**2) and logits.isfinite().all()


if __name__ == "__main__":
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    run(Path(sys.argv[1]))

"""How fast an exported model writes with its table in memory and on disk, and what memory it takes.

    python examples/table_devices.py --num-keys 512 --width 1024 --tokens 32 --output devices.json

A model with random weights is written to a temporary folder, and each row of the result is a
process of its own that loads it and writes tokens: with the table in memory, and on disk after its
file was dropped from the system's cache (cold), then once more in the same process (warm). Speeds
are ratios to memory in one run. The peak of resident memory counts the pages of the file that were
read; that of the process's own memory does not. Both are beside what Python and torch take.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megamem.tools.convert.hf import code
from megamem.tools.convert.hf.code.configuration_megamem import MegamemConfig
from megamem.tools.convert.hf.code.modeling_megamem import MegamemForCausalLM
from megamem.tools.convert.hf.folder import CODE_FILES
from megamem.tools.convert.lazy import of_rows, of_tensor
from megamem.tools.convert.safetensors import write_folder

TABLE = "model.tables.shared.v.weight"


def make(folder: Path, num_keys: int, width: int) -> int:
    """Write a model whose table is drawn some rows at a time; return the bytes of the table."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512}
    memory = {"memory_layers": [1, 2], "memory_topk": 16, "memory_key_dim": 128}
    shape = (num_keys**2, width)
    fields = {**sizes, **memory, "memory_num_keys": num_keys, "memory_value_dim": width}
    config = MegamemConfig(**fields, vocab_size=1000, num_attention_heads=4)
    with torch.device("meta"):
        model = MegamemForCausalLM(config)
    weights = {
        name: of_tensor(torch.randn(x.shape) * 0.05)
        for name, x in model.named_parameters()
        if name != TABLE
    }
    weights[TABLE] = of_rows(shape, torch.float32, lambda ids: torch.randn(len(ids), width))
    folder.mkdir(parents=True)
    write_folder(folder, weights, {"format": "pt"}, 10**9, lambda _: None)
    config.auto_map = {
        "AutoConfig": "configuration_megamem.MegamemConfig",
        "AutoModelForCausalLM": "modeling_megamem.MegamemForCausalLM",
    }
    config.save_pretrained(folder)
    for name in CODE_FILES:
        shutil.copyfile(Path(code.__path__[0]) / name, folder / name)
    return weights[TABLE].num_bytes


def forget(folder: Path) -> None:
    """Drop the files of a folder from the system's cache."""
    os.sync()
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def status(name: str) -> int:
    """A number of bytes that Linux tells of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


def measure(folder: Path, place: str, tokens: int) -> dict[str, Any]:
    """Load a model and let it write twice; in this process."""
    before, resident = status("RssAnon"), status("VmRSS")
    how = {"trust_remote_code": True, "dtype": "auto", "memory_table_device": place}
    model = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    if place == "cuda":
        # transformers maps files, too; here the table is to be in memory
        for weight in model.parameters():
            weight.data = weight.data.clone()
    speeds = []
    for _ in range(2):
        # the same text, so that the second reads the rows of the first
        prompt = torch.arange(32)[None]
        start = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        speeds.append(tokens / (time.perf_counter() - start))
    return {
        "first": speeds[0],
        "again": speeds[1],
        "peak resident after import": status("VmHWM") - resident,
        "own memory after import": status("RssAnon") - before,
    }


def main() -> None:
    """Make a model, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--num-keys", type=int, default=512, help="N; the table has N * N rows")
    add("--width", type=int, default=1024, help="numbers of a row, in fp32")
    add("--tokens", type=int, default=64, help="tokens to write")
    add("--output", type=Path, help="a file for the numbers as JSON")
    add("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1], args.tokens)))
        return
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where, "model")
        held = make(folder, args.num_keys, args.width)
        found: dict[str, Any] = {"table": held, "threads": torch.get_num_threads()}
        for place in ("cuda", "disk"):
            forget(folder)
            words = [sys.executable, __file__, "--tokens", str(args.tokens)]
            ran = subprocess.run(
                [*words, "--measure", str(folder), place], stdout=subprocess.PIPE, check=True
            )
            found["memory" if place == "cuda" else place] = json.loads(ran.stdout)
    memory, disk = found["memory"], found["disk"]
    print(f"table: {held / 1e6:,.0f} MB")
    print("| table | tokens per second, memory = 1 | peak resident memory, MB |")
    print("|---|---|---|")
    base, disk_peak = memory["again"], disk["peak resident after import"] / 1e6
    print(f"| in memory | 1.00 | {memory['peak resident after import'] / 1e6:,.0f} |")
    print(f"| on disk, cold | {disk['first'] / base:.2f} | {disk_peak:,.0f} |")
    print(f"| on disk, warm | {disk['again'] / base:.2f} | {disk_peak:,.0f} |")
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

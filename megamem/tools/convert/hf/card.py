"""The model card of an exported folder."""

import argparse
from typing import Any

from megamem.tools.convert.hf.names import table_width, tables_of

# what a reader may want to know of the run, with the flag that set it
RUN = (
    ("train_iters", "--train-iters"),
    ("train_samples", "--train-samples"),
    ("global_batch_size", "--global-batch-size"),
    ("seq_length", "--seq-length"),
    ("optimizer", "--optimizer"),
    ("lr", "--lr"),
    ("min_lr", "--min-lr"),
    ("lr_decay_style", "--lr-decay-style"),
    ("weight_decay", "--weight-decay"),
    ("memory_optimizer", "--memory-optimizer"),
    ("memory_lr", "--memory-lr"),
    ("memory_weight_decay", "--memory-weight-decay"),
)


def card(config: dict[str, Any], args: argparse.Namespace, *, tokenizer: bool) -> str:
    """The text of README.md: how to load the model, what it is, and how it was trained."""
    num_keys, layers = config["memory_num_keys"], config["memory_layers"]
    read = config.get("memory_final_topk") or config["memory_topk"]
    of_layers = " ".join(map(str, layers))
    tables, shared = tables_of(config), config.get("memory_share_layers", 1)
    rows, widths = shared * num_keys**2, {table_width(name, config): None for name in tables}
    numbers = sum(rows * table_width(name, config) for name in tables)
    of_rows = f"{shared} x {num_keys}^2" if shared > 1 else f"{num_keys}^2"
    facts = {
        "layers": config["num_hidden_layers"],
        "hidden size": config["hidden_size"],
        "memory layers": f"{of_layers} ({config['memory_variant']})",
        "tables": f"{len(tables)} of {of_rows} = {rows:,} rows of "
        f"{' or '.join(f'{width:,}' for width in widths)} numbers: {numbers:,} parameters",
        **_smaller(config),
        "read for a token": f"{config['memory_heads']} heads x {read} rows in each memory layer",
        "trained in": config["dtype"],
    }
    run = {flag: value for name, flag in RUN if (value := getattr(args, name, None)) is not None}
    return f"""---
library_name: transformers
tags: [megamem, memory-layers, product-key-memory]
pipeline_tag: text-generation
---

# A language model with memory layers

A GPT trained with Megatron-LM and [memory layers](https://arxiv.org/abs/2412.09764): tables of
values that are read by product keys. Its code is in this folder, so it needs transformers alone:

```python
{_imports(tokenizer)}

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True, dtype="auto")
{_use(tokenizer)}
```

| | |
| --- | --- |
{_rows(facts)}

Flags of its training:

| flag | value |
| --- | --- |
{_rows(run)}
"""


def _smaller(config: dict[str, Any]) -> dict[str, str]:
    found = {}
    if rows := config.get("memory_table_rows"):
        kept = ", ".join(f"{count:,} ({name})" for name, count in rows.items())
        found["rows kept"] = f"{kept}; those that were never read in training add zero"
    if kind := config.get("memory_table_dtype"):
        found["tables in"] = f"{kind}, with a scale in fp32 for each row"
    return found


def _imports(tokenizer: bool) -> str:
    if not tokenizer:
        return "import torch\nfrom transformers import AutoModelForCausalLM"
    return "from transformers import AutoModelForCausalLM, AutoTokenizer"


def _use(tokenizer: bool) -> str:
    if not tokenizer:
        return "written = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20)"
    return """tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
inputs = tokenizer("The capital of France is", return_tensors="pt")
tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])"""


def _rows(content: dict[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in content.items())

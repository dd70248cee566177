"""A memory layer in a plain torch model.

python examples/plain_torch.py                              one process, on a GPU if there is one
torchrun --nproc-per-node 2 examples/plain_torch.py         the rows of the table on two ranks
"""

import os

import torch
import torch.distributed as dist
from torch import nn

from megamem import MemoryConfig, MemoryGroup, MemoryLayer, MemoryPool, TableOptimizer, resolve

rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
if torch.cuda.is_available():
    torch.cuda.set_device(device)
else:
    device = torch.device("cpu")
group = MemoryGroup()
if ranks > 1:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    group = MemoryGroup.of_rows(dist.group.WORLD)

torch.manual_seed(1)
width, words, config = 64, 1000, MemoryConfig(memory_layers=[0], memory_num_keys=64, memory_topk=8)
spec = resolve(config, hidden_size=width, tensor_ranks=ranks)
pool = MemoryPool(spec, group=group, device=device)  # 64 * 64 rows, divided over the ranks
embed = nn.Embedding(words, width, device=device)
memory = MemoryLayer(spec, pool, device=device)
head = nn.Linear(width, words, device=device)
model = nn.ModuleList([embed, memory, head])  # add pool.tables to save the table, too

tables = TableOptimizer(pool, spec, lr=1e-2)  # owns the tables' gradients from here on
rest = torch.optim.AdamW(model.parameters(), lr=1e-2)
questions = torch.randperm(words).to(device)[rank::ranks]
answers = torch.randint(words, (words,)).to(device)[rank::ranks]
for step in range(31):
    hidden = embed(questions).unsqueeze(1)  # [sequence, batch, width]
    logits = head(hidden + memory(hidden)).squeeze(1)
    loss = nn.functional.cross_entropy(logits, answers)
    loss.backward()
    for weight in model.parameters() if ranks > 1 else ():
        dist.all_reduce(weight.grad)
        weight.grad /= ranks
    tables.step(1 / ranks)  # scales the sum of gradients over all ranks to their mean
    rest.step()
    rest.zero_grad()
    shown = loss.detach() / ranks
    if ranks > 1:
        dist.all_reduce(shown)
    if rank == 0 and step % 5 == 0:
        print(f"step {step}: loss {shown.item():.4f}")
if ranks > 1:
    dist.barrier()  # gloo aborts a rank that leaves while another one still talks to it
    dist.destroy_process_group()

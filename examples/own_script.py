"""A training script that uses Megatron's parts directly, without the launcher and its patches.

    torchrun --nproc-per-node 2 examples/own_script.py --num-layers 4 --hidden-size 64 \\
        --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 4 \\
        --global-batch-size 8 --train-iters 20 --lr 1e-2 --tensor-model-parallel-size 2 \\
        --position-embedding-type rope --memory-layers 1 2 --memory-num-keys 64 --save runs/own

It needs Megatron 0.19, which has descriptions of models. Without a GPU it trains on the CPU over
gloo. The data are random numbers, and the model learns to repeat its input.
"""

import sys
from functools import partial

import torch

if not torch.cuda.is_available():
    from megamem.cpu import runtime

    runtime.install()  # before Megatron is imported

from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from megatron.training import initialize, training
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.checkpointing import load_checkpoint, save_checkpoint

from megamem import MemoryGPTModelConfig, add_memory_flags, check, spec_from_args, with_memory
from megamem.megatron.dataset_helpers import prepare_dataset_helpers
from megamem.megatron.launcher import close_process_group

DEFAULTS = {"tokenizer_type": "NullTokenizer", "vocab_size": 127, "mock_data": True}
DEFAULTS |= {"save_interval": 10**9, "lr_warmup_iters": 1}


def build(args):
    """The model, wrapped for training, and an optimizer of the model and its tables."""
    described = gpt_config_from_args(args, model_config_cls=MemoryGPTModelConfig)
    described.memory = spec_from_args(args)
    if described.memory is not None:
        check(described.memory, args)  # raises an error that names the flag, its value and the fix
    model = described.get_builder_cls()(described).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        DistributedDataParallelConfig(grad_reduce_in_fp32=True),
    )
    config, _ = training.get_megatron_optimizer_config(args)
    optimizer = with_memory(get_megatron_optimizer(config, model), config, model)
    get_model_config(model[0]).finalize_model_grads_func = finalize_model_grads
    return model, optimizer


def forward_step(batches, model):
    """The losses of the next microbatch, in which each token is its own label, and their mean."""
    tokens = next(batches)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    losses = model(tokens, positions, attention_mask=None, labels=tokens)
    return losses, lambda losses: (losses.mean(), {"loss": losses.mean().detach()})


def batches(args, data_rank):
    """Microbatches [micro batch size, sequence length] of random tokens, without end."""
    generator = torch.Generator().manual_seed(args.seed + data_rank)
    shape = (args.micro_batch_size, args.seq_length)
    while True:
        yield torch.randint(args.vocab_size, shape, generator=generator).cuda()


def main():
    args = parse_and_validate_args(extra_args_provider=add_memory_flags, args_defaults=DEFAULTS)
    prepare_dataset_helpers()  # those of a wheel are compiled, those of a checkout are not
    initialize.initialize_megatron()
    model, optimizer = build(args)
    scheduler = training.get_optimizer_param_scheduler(optimizer)
    done = load_checkpoint(model, optimizer, scheduler)[0] if args.load else 0
    data = batches(args, torch.distributed.get_rank() // args.tensor_model_parallel_size)
    step = partial(get_forward_backward_func(), forward_step_func=forward_step, model=model)
    for iteration in range(done, args.train_iters):
        model[0].zero_grad_buffer(), optimizer.zero_grad()
        losses = step(
            data_iterator=data,
            num_microbatches=training.get_num_microbatches(),
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        scheduler.step(increment=args.global_batch_size)
        if torch.distributed.get_rank() == 0:
            loss = sum(each["loss"].item() for each in losses) / len(losses)
            sys.stdout.write(f"iteration {iteration + 1}: loss {loss:.5f}, norm {norm:.3f}\n")
    if args.save:
        save_checkpoint(args.train_iters, model, optimizer, scheduler, 0)
    close_process_group()  # together: gloo aborts a rank that leaves before another is done


if __name__ == "__main__":
    main()

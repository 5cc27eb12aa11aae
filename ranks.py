"""Many GPUs: all that knows of other processes. torchrun starts one, a rank, for each GPU.

    torchrun --nproc_per_node=8 score.py ...     the same flags, the same result, up to rounding

Each rank attempts its share of the problems, and then all gather all episodes, so that baselines,
metrics and decisions are computed alike everywhere. Transcripts are dealt out for scoring. Of each
model that learns or is compared with, a rank holds a share of every weight (FSDP2):

    policy     float32 masters and Adam's state, in shares; a layer is gathered in the precision of
               the run when it computes, and its gradients are summed over ranks in float32
    ref        the frozen base model, in shares
    full copy  one whole model, of policy or ref, that samples: decoding needs no other rank, so
               one may be done long before another

A float32 model of a single process stays as it is: it is policy and full copy at once. A bfloat16
one is "sharded" over one rank. All ranks call each function here alike. Next to read: sft.py.
"""

import contextlib
import errno
import logging
import os
import signal
import sys
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from data import InputError

# Longer than any rank waits for another, such as for one that decodes the longest attempts. When a
# rank is gone, torchrun ends the others; this ends a run whose rank hangs.
TIMEOUT = timedelta(minutes=30)

# --- 1. Who is there ---------------------------------------------------------------------------


@contextlib.contextmanager
def process_group():
    """Join the other processes of torchrun, and leave them in the end; rank 0 alone prints.

    An error is raised on the rank where it happens, which prints again once it has left this.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        torch.set_float32_matmul_precision("high")  # TF32 for float32 runs: 11 bits, bfloat16 has 8
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend(), timeout=TIMEOUT)
    with contextlib.ExitStack() as quiet:
        if rank():
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    if dist.is_initialized():
        dist.barrier()  # a process must not end while gloo still sends for it
        dist.destroy_process_group()


def run_command(main) -> None:
    """Exit with main's status; of torchrun at once, since threads of torch may outlive Python."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # config.exit_early had another
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # as with `| head`, nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """The GPU of this rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))


def launcher() -> str:
    """What a user typed before the script's name."""
    if not dist.is_torchelastic_launched():
        return "python"
    nodes = int(os.environ["GROUP_WORLD_SIZE"])
    more = f" --nnodes={nodes} .." if nodes > 1 else ""
    return f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}{more}"


# --- 2. Who does what ----------------------------------------------------------------------------


def local_slice(count: int, unit: int = 1) -> slice:
    """This rank's part of `count` things, which stay together in groups of `unit`."""
    groups = count // unit
    start, stop = (groups * r // world() * unit for r in (rank(), rank() + 1))
    return slice(start, stop)


def all_gather(items: list) -> list:
    """The items of rank 0, then those of rank 1 .."""
    if world() == 1:
        return items
    parts = [None] * world()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def on_all_ranks(function, *args):
    """function(*args), which calls no other rank; an InputError of one rank ends them all."""
    result, errors = None, []
    try:
        result = function(*args)
    except InputError as error:
        errors = [str(error)]
    for message in all_gather(errors)[:1]:
        abort(message)
    return result


def abort(message: str) -> None:
    """End a run for an error that all ranks have alike: rank 0 prints it."""
    raise InputError(message) if rank() == 0 else SystemExit(2)


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Rows of similar lengths, longest first, in rectangles of at most `budget` tokens each."""
    batches = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def local_micro_batches(lengths: list[int], budget: int) -> list[tuple[list[int], float]]:
    """This rank's micro-batches of rows, each with its weight in the loss.

    FSDP takes the mean of the ranks' gradients, so the weight is their number. All ranks make as
    many backward passes, since each one communicates; a rank that has no rows left repeats one
    with weight 0.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    rows_of = [order[r :: world()] for r in range(world())]
    plans = [micro_batches([lengths[row] for row in rows], budget) for rows in rows_of]
    local = [[rows_of[rank()][i] for i in batch] for batch in plans[rank()]]
    idle = max(map(len, plans)) - len(local)
    return [(batch, float(world())) for batch in local] + [(order[-1:], 0.0)] * idle


# --- 3. Sharded models ---------------------------------------------------------------------------


def shard(model, precision: str, forward) -> None:
    """Shard a model's weights over the ranks: they keep their type, and compute in precision.

    forward(model, ...) becomes the method `gathered`. Layers are gathered one by one in it; what is
    left, the embedding and the last norm, stays whole from its start to the end of backward.
    """
    if not dist.is_initialized():
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device().type, (world(),))
    mixed = fsdp.MixedPrecisionPolicy(getattr(torch, precision), reduce_dtype=torch.float32)
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:  # the decoder layers
            fsdp.fully_shard(module, mesh=mesh, mp_policy=mixed)
    fsdp.fully_shard(model, mesh=mesh, mp_policy=mixed)
    model.gathered = partial(forward, model)
    fsdp.register_fsdp_forward_method(model, "gathered")


@torch.no_grad()
def unshard(model, full_copy):
    """A model that a rank can call alone: the model itself, or `full_copy` with its weights."""
    if not isinstance(model, fsdp.FSDPModule):
        return model
    model.reshard()  # what only looked forward, as the reference does, is still gathered
    for weight, part in zip(full_copy.parameters(), model.parameters(), strict=True):
        weight.copy_(part.to(weight.dtype).full_tensor())
    return full_copy


@torch.no_grad()
def copy_weights(model, source) -> None:
    """Copy the weights of `source`, a whole model, into one that may be sharded."""
    if isinstance(model, fsdp.FSDPModule):
        model.reshard()  # what is still gathered would be kept, or come back
    for weight, new in zip(model.parameters(), source.parameters(), strict=True):
        if weight is new:  # both have it from the same base (lora.py)
            continue
        if isinstance(weight, DTensor):  # every rank has read the whole, and keeps its share
            place = weight.device_mesh, weight.placements
            share_of_it = distribute_tensor(new.to(weight.device), *place, src_data_rank=None)
            weight.copy_(share_of_it)
        else:
            weight.copy_(new)


def average_gradients(model) -> None:
    """Give all ranks the mean of their gradients, where FSDP has not: those of adapters."""
    if world() == 1 or isinstance(model, fsdp.FSDPModule):
        return
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(total.view_as(grad) / world())


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, gathered if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_sharded(tensors: dict, folder: Path) -> None:
    """Write a tree of tensors, each rank its shares; OSError if that cannot be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a process may be alone
            logging.disable()  # what goes wrong is told once
            dcp.save(tensors, checkpoint_id=folder)
    except dcp.api.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise OSError(
            getattr(cause, "errno", None) or errno.EIO, str(cause), str(folder)
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def load_sharded(tensors: dict, folder: Path) -> None:
    """Fill a tree of tensors with what any number of ranks saved; refuse a damaged one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable()  # or a damaged file is told of in two tracebacks
            dcp.load(tensors, checkpoint_id=folder)
    except dcp.api.CheckpointException:
        abort(f"{folder} is damaged and kept as it is: begin anew with --out")
    finally:
        logging.disable(logging.NOTSET)

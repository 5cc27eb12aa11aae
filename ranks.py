"""Many GPUs: all code that knows of other processes. torchrun starts one, a rank, for each GPU.

    torchrun --nproc_per_node=8 score.py ...     the same flags, the same result, up to rounding

Each rank attempts its share of the problems. Then all ranks gather all episodes, so that each one
computes the same baselines, metrics and decisions. For scoring, each rank gets a share of the
transcripts. Policy and reference are sharded: a rank holds a share of every weight (FSDP2):

    policy     float32 masters and Adam's state, in shares; a layer is gathered in the precision of
               the run when it computes, and its gradients are averaged over ranks in float32
    ref        the frozen base model, in shares
    full copy  one whole model that samples, with the weights of policy or ref: decoding then needs
               no other rank, so one rank may finish long before another

Without torchrun, a float32 policy is not sharded and samples itself; a bfloat16 policy is "sharded"
over one rank. With --lora, nothing is sharded. All ranks must call the functions here in the same
order. Next to read: sft.py.
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

# No rank should wait so long for another, not even for one that decodes the longest attempts. If a
# rank dies, torchrun ends the others. This ends a run in which a rank hangs.
TIMEOUT = timedelta(minutes=30)

# --- 1. Who is there ---------------------------------------------------------------------------


@contextlib.contextmanager
def process_group():
    """Join the other processes of torchrun, and leave them in the end; only rank 0 prints.

    An error is raised on the rank where it happens. Outside of this, that rank prints again.
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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # config.exit_early set another
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as with `| head`
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
    """function(*args), which needs no other rank; an InputError on one rank ends all ranks."""
    result, errors = None, []
    try:
        result = function(*args)
    except InputError as error:
        errors = [str(error)]
    for message in all_gather(errors)[:1]:
        abort(message)
    return result


def abort(message: str) -> None:
    """End a run for an error that all ranks have: rank 0 prints it, the others only exit."""
    raise InputError(message) if rank() == 0 else SystemExit(2)


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Groups of rows of similar lengths, longest first; padded, each has at most `budget` tokens.

    A row that is longer is a group of its own.
    """
    batches = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def local_micro_batches(lengths: list[int], budget: int) -> list[tuple[list[int], float]]:
    """This rank's micro-batches of rows, each with its weight in the loss.

    FSDP takes the mean of the ranks' gradients, so the weight is the number of ranks. Each backward
    pass communicates, so all ranks must make equally many: a rank without rows left repeats one
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
    """Shard a model's weights over the ranks: they keep their dtype, and compute in `precision`.

    forward(model, ...) becomes the method `gathered`, in which layers are gathered one by one. The
    embedding and the last norm stay whole from its start to the end of backward.
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
    model.reshard()  # after a forward without backward, as of the reference, it is still gathered
    for weight, part in zip(full_copy.parameters(), model.parameters(), strict=True):
        weight.copy_(part.to(weight.dtype).full_tensor())
    return full_copy


@torch.no_grad()
def copy_weights(model, source) -> None:
    """Copy the weights of `source`, a whole model, into one that may be sharded."""
    if isinstance(model, fsdp.FSDPModule):
        model.reshard()  # else gathered old weights would stay in use, or come back
    for weight, new in zip(model.parameters(), source.parameters(), strict=True):
        if weight is new:  # both share this weight of the base (lora.py)
            continue
        if isinstance(weight, DTensor):  # every rank has read the whole, and keeps its share
            place = weight.device_mesh, weight.placements
            share_of_it = distribute_tensor(new.to(weight.device), *place, src_data_rank=None)
            weight.copy_(share_of_it)
        else:
            weight.copy_(new)


def average_gradients(model) -> None:
    """Average gradients over ranks where FSDP does not do it: the gradients of adapters."""
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
    """Write a tree of tensors, each rank its shares; OSError if that fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns if there is only one process
            logging.disable()  # torch logs what the exception says
            dcp.save(tensors, checkpoint_id=folder)
    except dcp.api.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise OSError(
            getattr(cause, "errno", None) or errno.EIO, str(cause), str(folder)
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def load_sharded(tensors: dict, folder: Path) -> None:
    """Fill a tree of tensors with what any number of ranks saved; end the run if it is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable()  # torch would log two tracebacks for a damaged file
            dcp.load(tensors, checkpoint_id=folder)
    except dcp.api.CheckpointException:
        abort(f"{folder} is damaged and left as it is: begin a new run with another --out")
    finally:
        logging.disable(logging.NOTSET)

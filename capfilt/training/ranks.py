"""The processes of one training, as `torchrun` starts them: who am I, wait for me, average over us.

`torchrun --nproc-per-node=2 -m capfilt.cli pretrain CONFIG` runs the command in each process. Only
the first rank writes and prints; steps that train nothing run on it alone, while the others wait.
Every rank must see the same run folder.

Gradients are averaged by a plain all-reduce after the backward pass and not by
DistributedDataParallel: a step calls several methods of MED, passes through shared parameters more
than once and leaves others unused, and each of these needs an exception in DistributedDataParallel.
What is lost is the overlap of the all-reduce with the backward pass.

Nothing here imports torch until it is called: the command line asks for the rank.
"""

import atexit
import os
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

BUCKET = 2**24
"""Elements of one all-reduce (64 MB of float32): the flat copy of all gradients needs no more."""
TIMEOUT = timedelta(days=7)
"""The other ranks wait while the first one downloads, captions and scores."""


def world_size() -> int:
    """Processes that `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def own_device(device: str) -> str:
    """The device of this rank: `cuda:<n>` for the n-th process of a machine."""
    if world_size() > 1 and device == "cuda":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


def start() -> None:
    """Joins the other ranks, once: nccl for CUDA tensors, gloo for all others."""
    import torch
    import torch.distributed as dist

    if world_size() == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(own_device("cuda"))
    dist.init_process_group(backend, timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)  # else its threads abort the process at the end


def wait() -> None:
    """Returns when all ranks have come here."""
    gather(None)


def gather(value: T) -> list[T]:
    """Every rank's value (anything that pickles), in the order of the ranks."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    start()
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """The first rank's value."""
    return gather(value)[0]


def average(values: "Tensor") -> "Tensor":
    """The mean of a tensor over the ranks, without a gradient."""
    from capfilt.models.losses import mean_across_ranks

    return mean_across_ranks(values)


def send_from_first(modules: "Iterable[nn.Module]") -> None:
    """Gives every rank the first one's weights and buffers, in place."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    start()
    for module in modules:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, 0)


def average_gradients(parameters: "Iterable[nn.Parameter]") -> None:
    """Averages the gradients over the ranks, in place.

    A parameter that only some ranks used has a gradient of 0 on the others. One that no rank used
    keeps none, so that the optimiser leaves it alone (no weight decay), as in a single process.
    """
    if world_size() == 1:
        return
    import torch
    import torch.distributed as dist

    trained = [parameter for parameter in parameters if parameter.requires_grad]
    used = torch.tensor([int(parameter.grad is not None) for parameter in trained])
    dist.all_reduce(used)
    bucket: list[Tensor] = []
    for number, (parameter, users) in enumerate(zip(trained, used.tolist(), strict=True)):
        if users:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
        if number == len(trained) - 1 or sum(grad.numel() for grad in bucket) >= BUCKET:
            _average(bucket)
            bucket = []


def _average(grads: "list[Tensor]") -> None:
    if not grads:
        return
    import torch
    import torch.distributed as dist

    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(
        grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)]
    )

"""Ways to change the values of a weight, of which many do not increment torch's version counter.

Each function of `WAYS` takes a list of parameters and changes them in place, or gives them other memory.
"""

from __future__ import annotations

import ctypes
import datetime
import threading

import torch
import torch.distributed as dist

from starflow_kernels import block_inverse


def _in_place(weights):
    with torch.no_grad():
        weights[0].mul_(2)


def _one_value_of_data(weights):
    weights[-1].data[-1] += 1


def _negated_data(weights):
    for w in weights:
        w.data.neg_()


def _swapped_values(weights):
    w = max(weights, key=torch.Tensor.numel).data.view(-1)
    w[:64] = w[:64].flip(0).clone()


def _other_data(weights):
    weights[0].data = weights[0].data * 2


def _set_storage(weights):
    with torch.no_grad():
        weights[0].set_((weights[0] * 2).contiguous())


def _numpy_view(weights):
    weights[0].detach().view(torch.uint8).numpy()[..., -1] ^= 128


def _dlpack_view(weights):
    torch.from_dlpack(weights[0].detach()).mul_(2)


def _memory(weights):
    w = weights[0]
    values = (w.detach() * 2).contiguous()
    ctypes.memmove(w.data_ptr(), values.data_ptr(), w.numel() * w.element_size())


def _storage(weights):
    storage = weights[0].untyped_storage()
    storage.copy_((weights[0].detach() * 2).contiguous().untyped_storage())


def _freed_and_allocated(weights):
    """FSDP frees the memory of a weight and fills new memory later."""
    values, storage = weights[0].detach() * 2, weights[0].untyped_storage()
    size = storage.size()
    storage.resize_(0)
    storage.resize_(size)
    weights[0].data.copy_(values)


def _stepped(optimizer):
    for w in optimizer.param_groups[0]["params"]:
        w.grad = torch.ones_like(w)
    optimizer.step()


def _fused_adamw(weights):
    _stepped(torch.optim.AdamW(weights, lr=0.1, fused=True))


def _fused_sgd(weights):
    _stepped(torch.optim.SGD(weights, lr=0.1, fused=True))


def _foreach(weights):
    with torch.no_grad():
        torch._foreach_mul_(weights, 2)


def _swap_tensors(weights):
    torch.utils.swap_tensors(weights[0], torch.nn.Parameter(weights[0].detach() * 2))


def _vector_to_parameters(weights):
    vector = torch.nn.utils.parameters_to_vector(weights).detach()
    torch.nn.utils.vector_to_parameters(vector * 2, weights)


def _kept_version(weights):
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weights[0]):
        weights[0].mul_(2)


def _inference_mode(weights):
    with torch.inference_mode():
        weights[0].mul_(2)


def _out(weights):
    torch.mul(weights[0].detach(), 2, out=weights[0].detach())


def _received(weights):
    """Receive a weight in a group of two threads, each in place of a process."""
    store = dist.HashStore()

    def group(rank):
        return dist.ProcessGroupGloo(store, rank, 2, datetime.timedelta(seconds=60))

    values = (weights[0].detach() * 2).contiguous()
    sender = threading.Thread(target=lambda: group(0).send([values], 1, 0).wait())
    sender.start()
    group(1).recv([weights[0].detach()], 0, 0).wait()
    sender.join()


def _double(weight):
    weight.mul_(2)


def _marked_as_negated(weights):
    weights[-1].data = torch._neg_view(weights[-1].data)


def _other_process(weights):
    weights[0].data.share_memory_()
    process = torch.multiprocessing.get_context("spawn").Process(target=_double, args=(weights[0].detach(),))
    process.start()
    process.join()
    assert process.exitcode == 0


WAYS = {
    function.__name__.strip("_").replace("_", " "): function
    for function in (
        *(_in_place, _one_value_of_data, _negated_data, _swapped_values, _other_data, _set_storage, _numpy_view),
        *(_dlpack_view, _memory, _storage, _freed_and_allocated, _fused_adamw, _fused_sgd, _foreach, _swap_tensors),
        *(_vector_to_parameters, _kept_version, _inference_mode, _out, _received, _marked_as_negated),
        _other_process,
    )
}


def inverse(*arguments, **options):
    """Return the data of block_inverse."""
    return block_inverse(*arguments, **options).x


def assert_new_results(way, block, spec, backend, calls):
    """Check that every call after a write has the bits of a call with copies of the weights, and not its old ones.

    Args:
        way: one of `WAYS`.
        block: data or noise, weights and context.
        spec: the block's spec.
        backend: backend of all calls.
        calls: name -> function(x, weights, spec, **context, backend=backend).
    """
    x, w, context = block
    w = {name: torch.nn.Parameter(weight) for name, weight in w.items()}
    with torch.no_grad():
        before = {name: call(x, w, spec, **context, backend=backend) for name, call in calls.items()}
    way(list(w.values()))
    copies = {name: weight.detach().clone() for name, weight in w.items()}
    with torch.no_grad():
        for name, call in calls.items():
            found = call(x, w, spec, **context, backend=backend)
            assert torch.equal(found, call(x, copies, spec, **context, backend=backend)), name
            assert not torch.equal(found, before[name]), name

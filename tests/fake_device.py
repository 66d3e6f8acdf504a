"""
Runs train.py's loop on a fake device in CPU memory that counts the host's reads, for
test_host_syncs.py. Prints, as JSON, the events between each two log lines.

    fake_device.py [reading] --key=value ...   # reading: the host reads the loss at each step
"""
import itertools
import json
import sys

import torch
from conftest import between_log_lines
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import ddp
import train
from configurator import load_config
from metrics import Metrics

# Tags of operations whose result, or its shape, the host must know: item, equal, nonzero.
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.float16]


backend_registration._setup_privateuseone_for_python_backend("far", Backend())
FAR = torch.device("far", 0)


class FarTensor(torch.Tensor):
    """A tensor that reports the device FAR. `near` is the CPU tensor with its values, which only
    FarDevice reads."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        self = torch.Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(),
            dtype=near.dtype, device=FAR)
        self.near = near
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside FarDevice")

    def tolist(self):   # PyTorch has no tolist for subclasses
        return self.cpu().tolist()


class FarDevice(TorchDispatchMode):
    """Runs operations on FAR on the CPU. events: {name: calls} of reads and uploads. On a real
    device, a read waits, and an upload waits if its memory is not pinned."""

    def __init__(self):
        super().__init__()
        self.events = {}

    def note(self, name):
        self.events[name] = self.events.get(name, 0) + 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        far = [isinstance(t, FarTensor) for t in tensors]
        target = kwargs.get("device")
        if not any(far) and target != FAR:
            return function(*args, **kwargs)
        copies = "copy" in str(function)
        assert copies or all(f or t.dim() == 0 for f, t in zip(far, tensors)), (
            f"{function} takes tensors of two devices")
        near_args, near_kwargs = pytree.tree_map(
            lambda t: t.near if isinstance(t, FarTensor) else t, (args, kwargs))
        if target is not None:
            near_kwargs["device"] = "cpu"
        out = function(*near_args, **near_kwargs)
        to_host = copies and (target or args[0].device).type == "cpu"
        if any(far) and (to_host or READS & set(function.tags)):
            self.note(f"read: {function}")
        if to_host:
            return args[0] if str(function).startswith("aten.copy_") else out
        if copies and not all(far):
            self.note("upload")
        out = pytree.tree_map_only(torch.Tensor, FarTensor, out)
        return return_and_correct_aliasing(function, args, kwargs, out)


def register(device):
    """Register what torch.tensor(..., device=FAR) calls, which bypasses TorchDispatchMode."""
    aten, everything = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return FarTensor(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source, target, non_blocking=False):
        device.note("upload")
        target.near.copy_(source)
        return target

    aten.impl("empty_strided", empty_strided, "PrivateUse1")
    aten.impl("_copy_from", copy_from, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return aten, everything   # they stay registered as long as these objects live


def reading(accumulate_gradients):
    """Wrap accumulate_gradients: afterwards the host reads the loss, each time in another way."""
    ways = itertools.cycle((torch.Tensor.item, float, int, bool, torch.Tensor.cpu,
                            FarTensor.tolist, lambda t: torch.zeros(()).copy_(t),
                            torch.nonzero))

    def wrapped(*args):
        loss = accumulate_gradients(*args)
        next(ways)(loss)
        return loss
    return wrapped


def main(argv):
    if argv[0] == "reading":
        train.accumulate_gradients = reading(train.accumulate_gradients)
        argv = argv[1:]
    torch.__future__.set_swap_module_params_on_conversion(True)   # keeps tied weights tied
    device, found = FarDevice(), []
    registered = register(device)
    Metrics.log_step = between_log_lines(Metrics.log_step, device.events.clear,
                                         lambda: found.append(dict(device.events)))
    with device:
        train.train(load_config(argv), ddp.World(0, 1, FAR))
    del registered
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])

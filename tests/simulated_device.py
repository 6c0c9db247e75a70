"""A GPU that the CPU plays, for mistakes that only a second device brings to light.

All tensors are the CPU's. A note on a tensor's storage says which device it counts as being on:
views share it, and so does what is computed from it. Two modes of torch keep these notes. One sees
what Python calls, tells where tensors are, and moves them. The other sees what is computed in the
end, below autograd and torch.func, and refuses what a GPU would. Nothing is compiled meanwhile.
"""

import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

_INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}
# The CPU waits for the size or the value of what these yield.
_WAITING = {"_local_scalar_dense", "bincount", "equal", "masked_select", "nonzero", "unique_dim"}
_WAITING |= {"_unique2", "repeat_interleave", "unique_consecutive"}


class Waits(Counter):
    """How often the CPU had to wait for the GPU, by the line of the package and by why."""

    def note(self, why):
        frame = sys._getframe(1)
        while frame is not None and Path(frame.f_code.co_filename).parent.name != "dc_replay":
            frame = frame.f_back
        if frame is not None:
            self[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}: {why}"] += 1


class _OfAnyDevice(type(Generator)):
    def __instancecheck__(cls, instance):
        return isinstance(instance, Generator)


class SimulatedGenerator(Generator, metaclass=_OfAnyDevice):
    """A generator that says which device it is of; what it draws is the CPU's."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.where = torch.device(device)
        return self

    device = property(lambda self: self.where)


def _storage(tensor):
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


def _where(tensor):
    """Its device; None for what torch made of nothing by itself, which goes with anything."""
    return getattr(_storage(tensor), "simulated", CPU)


def _put(tensor, device):
    _storage(tensor).simulated = GPU if device is not None and device.type == "cuda" else device
    return tensor


def _check_generator(generator, device):
    if generator.device.type != device.type:
        raise RuntimeError(f"Expected a {device} generator but found {generator.device}")


class _Noting:
    def __init__(self, waits):
        super().__init__()
        self.waits = waits


class _Calls(_Noting, TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, attribute = dict(kwargs or {}), getattr(func, "__self__", None)
        if attribute is Tensor.device or attribute is Tensor.is_cuda:
            device = _where(args[0]) or CPU
            return device if attribute is Tensor.device else device == GPU
        if func is Tensor.pin_memory:
            return args[0].clone()
        if func in (Tensor.numpy, Tensor.__array__) and _where(args[0]) == GPU:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.tolist and _where(args[0]) == GPU:
            self.waits.note("tolist")
        if func is torch.as_tensor and isinstance(args[0], Tensor):
            func = Tensor.to
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._moved(func, *args, **kwargs)
        device = kwargs.pop("device", None)
        if func is Tensor.new_tensor and device is None:
            device = _where(args[0])
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and (device is not None or _where(result) is None):
            _put(result, CPU if device is None else torch.device(device))
            if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and _where(result) == GPU:
                self.waits.note("numbers to the GPU")
        generator = kwargs.get("generator")
        if generator is not None and isinstance(result, Tensor):
            _check_generator(generator, _where(result))
        return result

    def _moved(self, func, tensor, *options, **named):
        here, there = _where(tensor) or CPU, {Tensor.cuda: GPU, Tensor.cpu: CPU}.get(func)
        for value in (*options, *named.values()):
            if isinstance(value, (str, torch.device)):
                there = torch.device(value)
            elif isinstance(value, Tensor):
                tensor, there = tensor.to(value.dtype), _where(value)
            elif isinstance(value, torch.dtype):
                tensor = Tensor.to(tensor, value)
        if there is None or there.type == here.type:
            return tensor
        if not named.get("non_blocking"):
            self.waits.note(f"a copy to {there.type}")
        return _put(tensor.clone(), there)


class _Computing(_Noting, TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        devices, name = [_where(tensor) for tensor in given], func.overloadpacket.__name__
        together = next((device for device in (GPU, CPU) if device in devices), None)
        if together == GPU:
            if CPU in devices:
                self._check(func, name, given, devices)
            chosen = pytree.tree_leaves(args[1]) if name in _INDEXING else []
            masks = any(isinstance(t, Tensor) and t.dtype == torch.bool for t in chosen)
            if name in _WAITING or masks:
                self.waits.note(name)
        known = {_storage(tensor)._cdata for tensor in given}
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                new = _storage(tensor)._cdata not in known
                if new or (together == GPU and _where(tensor) is None):
                    _put(tensor, together)
        return result

    def _check(self, func, name, given, devices):
        if name == "copy_" or (name in _INDEXING and devices[0] == GPU):
            self.waits.note(f"{name} from one device to the other")
            return
        pairs = zip(given, devices, strict=True)
        numbers = all(device != CPU or not tensor.ndim for tensor, device in pairs)
        takes_numbers = torch.Tag.pointwise in func.tags or "foreach" in name or name == "fill_"
        if not numbers or not takes_numbers:
            raise RuntimeError(f"Expected all tensors to be on the same device, in {func}")


@contextmanager
def simulated_gpu(monkeypatch):
    """Let ``cuda`` be the simulated GPU; yields what the CPU waited for."""
    state, waits = Generator(), Waits()
    asked = {"mem_get_info": (2**30, 2**30), "memory_allocated": 0, "memory_reserved": 0}
    asked |= {"max_memory_allocated": 2**20, "reset_peak_memory_stats": None, "synchronize": None}
    asked |= {"get_device_capability": (7, 0), "device": nullcontext()}
    for name, answer in asked.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "manual_seed", state.manual_seed)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: state.get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda new, *_: state.set_state(new))
    for module in ("torch", "dc_replay.randomness"):
        monkeypatch.setattr(f"{module}.Generator", SimulatedGenerator)
    with _Calls(waits), _Computing(waits):
        yield waits

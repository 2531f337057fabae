"""Load the library of the pretend GPUs before torch, and replace the Python layer of `torch.cuda` after.

torch.cuda's own functions call into parts of torch that a CPU build leaves out. Those that the kit, torch's loader,
DDP, FSDP, DataParallel and GradScaler use are replaced here, each by the shortest that keeps its promise.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import time
from types import SimpleNamespace
from typing import Any

from . import build


def load_library() -> Any:
    """Return the library's Python module; torch itself must not be imported yet."""
    folder = build.torch_folder() / "lib"
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so", "libtorch_python.so"):
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    path = build.library()
    ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)  # registers the pretend GPUs
    return path


def install(path: Any) -> None:
    """Replace torch.cuda's Python; torch has just been imported."""
    import torch
    import torch._dynamo  # looks at torch.cuda as it is imported, and wants its own classes
    import torch.utils.data

    spec = importlib.util.spec_from_file_location(build.NAME, path)
    assert spec is not None and spec.loader is not None
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    from . import nccl, watch

    watch.start(library)
    Cuda(torch, library).install()
    nccl.install(library)


def visible() -> int:
    """Return the number of GPUs that CUDA_VISIBLE_DEVICES leaves."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
    return len([word for word in listed.split(",") if word.strip() in ("0", "1")])


class Cuda:
    """The replacements, which share the library."""

    def __init__(self, torch: Any, library: Any) -> None:
        self.torch, self.library = torch, library
        self.initialised_in: int | None = None
        """The process that has started CUDA. A fork of this process cannot use the GPUs."""
        self.generators = tuple(torch.Generator() for _ in range(2))

    def index(self, device: Any = None) -> int:
        if device is None:
            return self.library.current_device()
        if isinstance(device, int):
            return device
        found = self.torch.device(device).index
        return self.library.current_device() if found is None else found

    def lazy_init(self) -> None:
        if self.initialised_in is None:
            self.initialised_in = os.getpid()
        if self.in_bad_fork():
            raise RuntimeError(
                "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the "
                "'spawn' start method"
            )

    def in_bad_fork(self) -> bool:
        return self.initialised_in not in (None, os.getpid())

    def set_device(self, device: Any) -> None:
        self.lazy_init()
        index = self.index(device)
        if not 0 <= index < visible():
            raise RuntimeError(f"CUDA error: invalid device ordinal {index} of {visible()}")
        self.library.set_device(index)

    def synchronize(self, device: Any = None) -> None:
        self.library.host_waits("synchronize", self.index(device))

    def memory(self, device: Any = None) -> Any:
        return self.library.memory(self.index(device))

    def seed_all(self, seed: int) -> None:
        for generator in self.generators:
            generator.manual_seed(seed)

    def install(self) -> None:
        torch, cuda, library = self.torch, self.torch.cuda, self.library
        classes = stream_classes(torch, self)
        properties = SimpleNamespace(
            name="Tesla T4", total_memory=15 << 30, multi_processor_count=40, major=7, minor=5, warp_size=32
        )
        replaced = {
            "is_available": lambda: visible() > 0,
            "device_count": visible,
            "_is_compiled": lambda: True,
            "is_initialized": lambda: self.initialised_in == os.getpid(),
            "_is_in_bad_fork": self.in_bad_fork,
            "_lazy_init": self.lazy_init,
            "init": self.lazy_init,
            "set_device": self.set_device,
            "current_device": lambda: library.current_device(),
            "synchronize": self.synchronize,
            "empty_cache": lambda: None,
            "ipc_collect": lambda: None,
            "get_device_name": lambda device=None: properties.name,
            "get_device_capability": lambda device=None: (7, 5),
            "get_device_properties": lambda device=None: properties,
            "get_arch_list": lambda: ["sm_75"],
            "is_bf16_supported": lambda including_emulation=True: including_emulation,
            "can_device_access_peer": lambda device, peer: False,
            "memory_allocated": lambda device=None: self.memory(device)[0],
            "max_memory_allocated": lambda device=None: self.memory(device)[1],
            "max_memory_reserved": lambda device=None: self.memory(device)[1],
            "mem_get_info": lambda device=None: (
                self.memory(device)[2] - self.memory(device)[0],
                self.memory(device)[2],
            ),
            "reset_peak_memory_stats": lambda device=None: library.forget_peak(self.index(device)),
            "default_generators": self.generators,
            "manual_seed": lambda seed: self.generators[self.index()].manual_seed(seed),
            "manual_seed_all": self.seed_all,
            "get_rng_state": lambda device=None: self.generators[self.index(device)].get_state(),
            "set_rng_state": lambda state, device=None: self.generators[self.index(device)].set_state(state),
            "get_rng_state_all": lambda: [generator.get_state() for generator in self.generators],
            "set_rng_state_all": lambda states: [
                generator.set_state(state) for generator, state in zip(self.generators, states, strict=True)
            ],
            "is_current_stream_capturing": lambda: False,
            "set_sync_debug_mode": set_sync_debug_mode,
            **classes,
        }
        for name, value in replaced.items():
            setattr(cuda, name, value)
            if hasattr(cuda.random, name):  # libraries call its functions there, and they call each other
                setattr(cuda.random, name, value)
        for name, value in {
            "is_available": cuda.is_available,
            "current_accelerator": lambda check_available=False: torch.device("cuda") if visible() else None,
            "current_device_index": library.current_device,
            "set_device_index": self.set_device,
            "device_count": visible,
            "synchronize": self.synchronize,
            "current_stream": cuda.current_stream,
        }.items():
            # a function of its own, since torch.compile keeps a table of torch's functions
            setattr(torch.accelerator, name, functools.partial(value))
        torch._C._scatter, torch._C._gather = scatter(torch), gather(torch)
        torch._C._broadcast_coalesced = broadcast(torch)
        torch._C._cuda_getCurrentRawStream = lambda device: library.current_stream(device)
        torch._C._cuda_init = self.lazy_init

        torch.Tensor.record_stream = lambda tensor, stream: None  # torch's own takes a stream of its own class
        resize = torch.UntypedStorage.resize_

        def resize_(storage: Any, size: int) -> Any:  # fsdp frees and fills the storage of gathered weights
            if storage.device.type != "cuda":
                return resize(storage, size)
            library.resize_storage(storage, size)
            return storage

        torch.UntypedStorage.resize_ = resize_
        compile_, eager = torch.compile, {"backend": "eager"}  # there is no compiler for a pretend GPU
        torch.compile = lambda *args, **options: compile_(*args, **{**options, **eager})


def set_sync_debug_mode(mode: int | str) -> None:
    """As torch's: "warn" warns of each wait of the host."""
    from . import watch

    watch.warns = mode in (1, "warn")


def stream_classes(torch: Any, pair: Cuda) -> dict[str, Any]:
    """Return Stream, Event and the functions around them; each of their calls is noted in watch.py."""
    from . import watch

    library = pair.library

    class Stream:
        made = 0

        def __init__(self, device: Any = None, priority: int = 0, number: int | None = None) -> None:
            self.device = torch.device("cuda", pair.index(device))
            self.device_index, self.device_type, self.priority = self.device.index, 1, priority
            if number is None:
                Stream.made += 1
            self.stream_id = self.cuda_stream = Stream.made if number is None else number

        def wait_stream(self, other: Stream) -> None:
            watch.note("wait_stream", self.device.index, self.stream_id, other.stream_id)

        def wait_event(self, event: Event) -> None:
            watch.note("wait_event", self.device.index, self.stream_id, event.stream)

        def record_event(self, event: Event | None = None) -> Event:
            event = event or Event()
            event.record(self)
            return event

        def synchronize(self) -> None:
            library.host_waits("synchronize", self.device.index)

        def query(self) -> bool:
            return True

        def is_capturing(self) -> bool:
            return False

        def __eq__(self, other: object) -> bool:
            mine = self.device, self.stream_id
            return isinstance(other, Stream) and mine == (other.device, other.stream_id)

        def __hash__(self) -> int:
            return hash((self.device, self.stream_id))

        def __enter__(self) -> Stream:
            self.context = StreamContext(self)
            self.context.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.context.__exit__(*error)

    class Event:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.stream: int | None = None
            self.seconds = 0.0

        def record(self, on: Stream | None = None) -> None:
            on = on or current_stream()
            self.stream, self.seconds = on.stream_id, time.perf_counter()
            watch.note("record_event", on.device.index, on.stream_id)

        def wait(self, on: Stream | None = None) -> None:
            (on or current_stream()).wait_event(self)

        def synchronize(self) -> None:
            library.host_waits("synchronize", library.current_device())

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: Event) -> float:
            return (end.seconds - self.seconds) * 1e3

    def current_stream(device: Any = None) -> Stream:
        index = pair.index(device)
        return Stream(index, number=library.current_stream(index))

    def set_stream(stream: Stream) -> None:
        library.set_stream(stream.device.index, stream.stream_id)

    class StreamContext:
        def __init__(self, stream: Stream | None) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            if self.stream is not None:
                self.before = library.current_device(), current_stream(self.stream.device)
                library.set_device(self.stream.device.index)
                set_stream(self.stream)

        def __exit__(self, *error: Any) -> None:
            if self.stream is not None:
                set_stream(self.before[1])
                library.set_device(self.before[0])

    class device:  # noqa: N801 (torch's name)
        def __init__(self, device: Any) -> None:
            self.device = device

        def __enter__(self) -> None:
            self.before = library.current_device()
            if self.device is not None and self.device != -1:
                library.set_device(pair.index(self.device))

        def __exit__(self, *error: Any) -> None:
            library.set_device(self.before)

    return {
        "Stream": Stream, "Event": Event, "stream": StreamContext, "StreamContext": StreamContext, "device": device,
        "current_stream": current_stream, "set_stream": set_stream,
        "default_stream": lambda device=None: Stream(device, number=0),
    }  # fmt: skip


# The three that DataParallel calls
def scatter(torch: Any) -> Any:
    def scatter_(tensor: Any, devices: Any, chunk_sizes: Any = None, dim: int = 0, streams: Any = None) -> Any:
        parts = tensor.split(chunk_sizes, dim) if chunk_sizes else tensor.chunk(len(devices), dim)
        return [
            part.to(torch.device("cuda", index), non_blocking=True) for part, index in zip(parts, devices, strict=False)
        ]

    return scatter_


def gather(torch: Any) -> Any:
    def gather_(tensors: Any, dim: int, destination: int | None) -> Any:
        target = torch.device("cuda", max(destination or 0, 0))
        return torch.cat([tensor.to(target) for tensor in tensors], dim)

    return gather_


def broadcast(torch: Any) -> Any:
    def broadcast_(tensors: Any, devices: Any, buffer_size: int = 0) -> Any:
        others = devices[1:]  # on the first device the tensors serve as they are
        copies = [[tensor.to(torch.device("cuda", index), copy=True) for tensor in tensors] for index in others]
        return [list(tensors), *copies]

    return broadcast_

"""CUDA devices that aren't there: `cuda:0` and `cuda:1` in a torch built for CPUs.

Tensors on a simulated device are plain `torch.Tensor`s of device type "cuda" with their
data in the CPU's memory. `simulated_devices.cpp`, compiled once by g++ against torch's
headers, fills the gap that such a torch has at its CUDA dispatch key: it checks devices
as the real kernels do, runs the CPU's kernel on the same memory, and gives the result
the device. All above it is torch itself: autograd, autocast, `.to`, factories,
accelerate's hooks, pickling.

    simulate()              # once in a process, before its first backward; it can't be undone
    model.to("cuda:0")      # torch.cuda.device_count() is 2, and mixing devices raises RuntimeError

A test asks for it by its marker, and runs in a process of its own (`own_process.py`):

    pytestmark = pytest.mark.devices

As on real devices: an op on tensors of two devices raises, except where torch says
otherwise (its `native_functions.yaml`): scalars of a CPU in pointwise ops, indices of a
CPU in indexing, `copy_`. Integer matrix products, `lstsq` but by gels, and another
device's generator raise. Each device has a random state of its own, and counts the
bytes of its tensors.

Not simulated, so never tested by it: speed, memory limits, errors that come late,
numbers that differ from a CPU's, streams, torch.compile, sparse tensors, NCCL, kernels
of other libraries (triton, bitsandbytes, flash attention).
"""

import hashlib
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from filelock import FileLock

DEVICES = 2
CLAIMED = 8 << 30  # bytes that each device claims to have
SOURCE = Path(__file__).with_suffix(".cpp")
BUILD = Path(__file__).parents[1] / "build"


def why_not() -> str | None:
    """Why devices can't be simulated here, if so."""
    if sys.platform != "linux":
        return "devices are simulated on Linux alone"
    if torch.version.cuda or torch.version.hip:
        return "this torch has kernels for devices of its own: install its CPU build"
    return (
        None if shutil.which("g++") else "simulated devices are compiled: install g++"
    )


def simulate() -> None:
    """Have this process see `DEVICES` CUDA devices until it ends."""
    if hasattr(torch.ops.simulated, "current"):
        return
    torch.ops.load_library(str(library()))
    simulated = torch.ops.simulated
    simulated.leave_unchecked(ops_without_check())
    _answer_as_cuda(simulated)
    torch.UntypedStorage.__new__ = staticmethod(_new_storage)  # type: ignore[method-assign]
    generators = tuple(torch.Generator(f"cuda:{index}") for index in range(DEVICES))
    torch.cuda.default_generators = generators
    for generator in generators:
        simulated.default_generator(generator)


def library() -> Path:
    """The compiled library, made where it isn't there yet, in ten seconds."""
    from torch.utils.cpp_extension import include_paths

    version = hashlib.sha256(
        SOURCE.read_bytes() + f"{torch.__version__} {torch.__file__}".encode()
    )
    made = BUILD / f"simulated-devices-{version.hexdigest()[:16]}.so"
    BUILD.mkdir(exist_ok=True)
    with FileLock(made.with_suffix(".lock")):
        if not made.exists():
            headers = [*include_paths(), sysconfig.get_paths()["include"]]
            libraries = Path(torch.__file__).parent / "lib"
            abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
            command = [
                *("g++", "-shared", "-fPIC", "-std=c++20", "-O1", "-w"),
                *(f"-DDEVICES={DEVICES}", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"),
                *(f"-I{path}" for path in headers),
                *(str(SOURCE), "-o", str(made.with_suffix(".part"))),
                *(f"-L{libraries}", "-ltorch_cpu", "-lc10"),
            ]
            subprocess.run(command, check=True)
            made.with_suffix(".part").replace(made)
    return made


def ops_without_check() -> list[str]:
    """The ops whose CUDA kernels torch generates without a check of devices."""
    import torchgen

    listed = (
        Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    )
    ops = listed.read_text().split("\n- func: ")[1:]
    return [
        op.split("(")[0]
        for op in ops
        if re.search(r"^\s*device_check: NoCheck", op, re.M)
    ]


def _new_storage(
    kind: type, *args: Any, device: Any = None, **kwargs: Any
) -> torch.UntypedStorage:
    if device is None:
        return _CPU_STORAGE(kind, *args, **kwargs)
    if torch.device(device).type != "cuda":
        return _CPU_STORAGE(kind, *args, device=device, **kwargs)
    size = args[0] if args else 0
    return torch.empty(size, dtype=torch.uint8, device=device).untyped_storage()


_CPU_STORAGE = torch.UntypedStorage.__new__


class _Event:
    """A time, as what is done is done at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        return 1e3 * (end.at - self.at)

    def synchronize(self) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _answer_as_cuda(simulated: Any) -> None:
    """Have `torch.cuda` answer what it answers in a build with CUDA."""
    cuda = torch.cuda
    about = SimpleNamespace(
        name="Simulated",
        **{"major": 9, "minor": 0, "total_memory": CLAIMED, "multi_processor_count": 1},
        **{
            "warp_size": 32,
            "max_threads_per_multi_processor": 2048,
            "is_integrated": 0,
        },
        **{"gcnArchName": "", "uuid": "simulated"},
    )
    stream = SimpleNamespace(
        **{
            "cuda_stream": 0,
            "stream_id": 0,
            "synchronize": _nothing,
            "query": lambda: True,
        },
        **{"wait_stream": _nothing, "wait_event": _nothing},
        record_event=lambda event=None: event,
    )

    def index_of(device: Any = None) -> int:
        index = cuda._utils._get_device_index(device, optional=True)
        return simulated.current() if index is None else index

    def memory_stats(device: Any = None) -> dict[str, int]:
        index = index_of(device)
        bytes_of = {
            "current": simulated.allocated(index),
            "peak": simulated.peak(index),
        }
        kinds = ("allocated", "reserved", "active")
        return {
            f"{kind}_bytes.all.{at}": n for kind in kinds for at, n in bytes_of.items()
        }

    nothing = ("_lazy_init", "init", "synchronize", "empty_cache", "ipc_collect")
    true = ("is_initialized", "_is_compiled", "is_available")
    answers = {
        **dict.fromkeys((*nothing, "reset_accumulated_memory_stats"), _nothing),
        **dict.fromkeys(true, lambda: True),
        **dict.fromkeys(("device_count", "_device_count_nvml"), lambda: DEVICES),
        **dict.fromkeys(
            ("current_stream", "default_stream"), lambda device=None: stream
        ),
        **dict.fromkeys(
            ("_exchange_device", "_maybe_exchange_device"), simulated.set_current
        ),
        "_initialized": True,
        "current_device": simulated.current,
        "set_device": lambda device: simulated.set_current(index_of(device)),
        "get_device_properties": lambda device=None: about,
        "get_device_name": lambda device=None: about.name,
        "get_device_capability": lambda device=None: (about.major, about.minor),
        "get_arch_list": lambda: ["sm_90"],
        "can_device_access_peer": lambda one, other: True,
        "mem_get_info": lambda device=None: (CLAIMED, CLAIMED),
        "memory_stats": memory_stats,
        "reset_peak_memory_stats": lambda device=None: simulated.reset_peak(
            index_of(device)
        ),
        "is_current_stream_capturing": lambda: False,
        "Event": _Event,
    }
    for name, answer in answers.items():
        for module in (cuda, cuda.memory):
            if module is cuda or hasattr(module, name):
                setattr(module, name, answer)
    torch._C._cuda_getDeviceCount = lambda: DEVICES
    torch._C._cuda_getCurrentRawStream = lambda index: 0

"""Time the launch of two workers from a notebook until their first training step, for this and other launchers.

    python tools/bench/launch.py
    python tools/bench/launch.py --rounds 9 --peers torchrun,spawn

Each launcher has a Jupyter kernel, where two workers (gloo, CPU) take a DistributedDataParallel step of a small model
with AdamW. A round is a launch of each in turn; the time is from the call to the end of the step on the slower rank.
Figures are medians after some rounds of warm-up; on a noisy machine read the ratios. A second table compares the first
launch of a fresh kernel with the second, with the server started a cell before the call and by the call itself.
The launchers with "Trainer" in their names run a step of transformers' Trainer, and are compared with each other.
`pip install -e '.[bench]'` installs the other launchers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import statistics
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jupyter_client.manager import KernelManager

ROOT = Path(__file__).parents[2]

# The code of the workers; in a module, since spawn cannot take functions from cells.
STEP = """
import os, time

def step(folder):
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():  # the kit's launch leaves the group to the function, as torchrun does
        dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(32, 64)).sum().backward()
    optimizer.step()
    now = time.monotonic()
    with open(f"{folder}/{dist.get_rank()}", "w") as file:
        file.write(repr(now))

def join(rank, count, port):
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)

def leave():  # without the barrier a rank may abort because the other is gone
    import torch.distributed as dist
    dist.barrier()
    dist.destroy_process_group()

def spawned(rank, folder, port):
    join(rank, 2, port)
    step(folder)
    leave()

def with_accelerate(folder):
    from accelerate import PartialState
    PartialState(cpu=True)
    step(folder)
    leave()

def with_trainer(folder):
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Net(torch.nn.Linear):
        def forward(self, x, labels):
            return {"loss": (super().forward(x) - labels).square().mean()}

    class Notes(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            with open(f"{folder}/{args.process_index}", "w") as file:
                file.write(repr(time.monotonic()))

    args = TrainingArguments(
        f"{folder}/run", max_steps=1, per_device_train_batch_size=32, use_cpu=True, save_strategy="no", report_to=[],
        disable_tqdm=True, logging_strategy="no", ddp_find_unused_parameters=False,
    )
    data = [{"x": torch.randn(64), "labels": torch.randn(64)} for _ in range(64)]
    trainer = Trainer(Net(64, 64), args, train_dataset=data, callbacks=[Notes()])
    assert args.world_size == 2
    trainer.train()

if __name__ == "__main__":
    import sys
    import torch.distributed as dist
    dist.init_process_group("gloo")
    step(sys.argv[1])
    leave()
"""

# launcher -> (a cell before the launches, the launch)
CONTENDERS = {
    "kaggle_mgpu": (
        "from kaggle_mgpu import env, launch\nenv.fix(verbose=False, start_workers=True)",
        "launch(step, folder, nproc=2)",
    ),
    "lightning": (
        "from lightning.fabric import Fabric",
        "Fabric(accelerator='cpu', devices=2, strategy='ddp_notebook').launch(lambda fabric: step(folder))",
    ),
    "accelerate": (
        "os.environ['ACCELERATE_USE_CPU'] = '1'\nfrom accelerate import notebook_launcher",
        "notebook_launcher(launch_step.with_accelerate, (folder,), num_processes=2, use_port=str(free_port()))",
    ),
    "spawn": (
        "import torch.multiprocessing",
        "torch.multiprocessing.spawn(launch_step.spawned, (folder, free_port()), nprocs=2)",
    ),
    "torchrun": (
        "import subprocess, sys",
        "subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',"
        " launch_step.__file__, folder], check=True, capture_output=True)",
    ),
    # Where bitsandbytes is installed, a cell with `from transformers import Trainer` imports it, and accelerate refuses
    "kaggle_mgpu Trainer": (
        "import transformers\nfrom kaggle_mgpu import env, launch\nenv.fix(verbose=False, start_workers=True)",
        "launch(launch_step.with_trainer, folder, nproc=2)",
    ),
    "accelerate Trainer": (
        "import transformers\nos.environ['ACCELERATE_USE_CPU'] = '1'\nfrom accelerate import notebook_launcher",
        "notebook_launcher(launch_step.with_trainer, (folder,), num_processes=2, use_port=str(free_port()))",
    ),
    "torchrunx": (
        "import torchrunx",
        "torchrunx.Launcher(hostnames=['localhost'], workers_per_host=2, backend='gloo').run(step, folder)",
    ),
}

PRELUDE = """
import os, socket, tempfile, time
import launch_step
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
def step(folder):  # a function of a cell, which spawn and torchrun cannot run
    return launch_step.step(folder)
"""

TIMED = """
folder = tempfile.mkdtemp()
start = time.monotonic()
{launch}
print("RESULT", max(float(open(f"{{folder}}/{{rank}}").read()) for rank in range(2)) - start)
"""

MEMORY = 'print("RESULT", int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)'


class Kernel:
    """Run cells in a Jupyter kernel."""

    def __init__(self, folder: str) -> None:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        self.manager = KernelManager(kernel_name="python3")
        self.manager.kernel_spec.argv = command  # type: ignore[union-attr]
        path = os.pathsep.join([str(ROOT), folder])
        self.manager.start_kernel(cwd=folder, env={**os.environ, "PYTHONPATH": path})
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(120)

    def run(self, code: str) -> float:
        """Run a cell; return the number printed after "RESULT", or nan."""
        said: list[str] = []

        def hear(message: Any) -> None:
            content = message["content"]
            said.append(content.get("text", "") + "\n".join(content.get("traceback", [])))

        reply = self.client.execute_interactive(textwrap.dedent(code), timeout=300, output_hook=hear)
        text = "".join(said)
        if reply["content"]["status"] != "ok":
            raise RuntimeError(text)
        return float(text.rpartition("RESULT ")[2].split()[0]) if "RESULT" in text else float("nan")

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@contextlib.contextmanager
def kernel(folder: str) -> Iterator[Kernel]:
    opened = Kernel(folder)
    try:
        yield opened
    finally:
        opened.close()


def compare(names: list[str], rounds: int, warmup: int, folder: str) -> None:
    """Print the times of all launchers in turn, each in its own kernel."""
    with contextlib.ExitStack() as stack:
        kernels = {name: stack.enter_context(kernel(folder)) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        memory: dict[str, float] = {}
        for name in names:
            kernels[name].run(PRELUDE)
            memory[name] = kernels[name].run(MEMORY)
            kernels[name].run(CONTENDERS[name][0])
        for number in range(warmup + rounds):
            for name in names:
                try:
                    taken = kernels[name].run(TIMED.format(launch=CONTENDERS[name][1]))
                except RuntimeError as error:
                    print(f"{name} failed in round {number}: {str(error).splitlines()[-1]}", flush=True)
                    continue
                if number >= warmup:
                    times[name].append(taken)
        middles = {name: statistics.median(times[name]) for name in names if times[name]}
        print(f"call to first training step, median of {rounds} after {warmup}; the notebook's own memory")
        for name, middle in middles.items():
            ours = middles.get("kaggle_mgpu Trainer" if name.endswith("Trainer") else "kaggle_mgpu", float("nan"))
            grown = kernels[name].run(MEMORY) - memory[name]
            spread = f"{min(times[name]):.3f}-{max(times[name]):.3f}"
            print(f"{name:19} {middle:7.3f} s  ({spread})  {middle / ours:6.1f} x  {grown:+7.1f} MB", flush=True)


def first_and_second(rounds: int, folder: str) -> None:
    """Print the times of the first and the second launch in fresh kernels."""
    prelude = CONTENDERS["kaggle_mgpu"][0]
    timed = TIMED.format(launch=CONTENDERS["kaggle_mgpu"][1])
    # stands for the user's other cells: waits until the server is ready
    ready = (
        "from multiprocessing import connection\n"
        "from kaggle_mgpu.env import worker_server\n"
        "connection.wait([worker_server.current.control], 120)"
    )
    times: dict[str, list[float]] = {"first": [], "second": [], "first, server started by it": []}
    for _ in range(rounds):
        with kernel(folder) as fresh:
            fresh.run(PRELUDE)
            fresh.run(prelude)
            fresh.run(ready)
            times["first"].append(fresh.run(timed))
            times["second"].append(fresh.run(timed))
        with kernel(folder) as fresh:
            fresh.run(PRELUDE)
            fresh.run("from kaggle_mgpu import launch")
            times["first, server started by it"].append(fresh.run(timed))
    second = statistics.median(times["second"])
    print(f"launches of a fresh kernel, median of {rounds}")
    for name, taken in times.items():
        print(f"{name:28} {statistics.median(taken):7.3f} s  {statistics.median(taken) / second:5.2f} x", flush=True)


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--warmup", type=int, default=2)
    options.add_argument("--peers", default=",".join(name for name in CONTENDERS if name != "kaggle_mgpu"))
    given = options.parse_args()
    modules = {"spawn": "torch", "torchrun": "torch"}
    names = ["kaggle_mgpu"]
    for name in filter(None, given.peers.split(",")):
        needed = "transformers" if name.endswith("Trainer") else modules.get(name, name)
        if importlib.util.find_spec(needed) is None:
            print(f"{name} is not installed")
        else:
            names.append(name)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "launch_step.py").write_text(STEP)
        compare(names, given.rounds, given.warmup, folder)
        first_and_second(given.rounds, folder)


if __name__ == "__main__":
    main()

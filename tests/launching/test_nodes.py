"""Many machines: two nodes of two ranks each, in network namespaces of their own, one killed and brought back.

Without the right to make namespaces both nodes are on the loopback address, and all else is the same.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pause_at import PauseAt
from runs import free_port

ROOT = Path(__file__).parents[2]


@dataclass
class Node:
    address: str
    interface: str
    inside: list[str]
    """What starts a command there."""


def ip(command: str) -> None:
    subprocess.run(["ip", *shlex.split(command)], check=True, capture_output=True, timeout=600)


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    mark = os.getpid()
    names = [f"node{index}-{mark}" for index in range(2)]
    ends = [f"n{index}-{mark}" for index in range(2)]
    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add {ends[0]} type veth peer name {ends[1]}")
        for index, (name, end) in enumerate(zip(names, ends, strict=True)):
            ip(f"link set {end} netns {name}")
            ip(f"-n {name} addr add 10.213.77.{index + 1}/24 dev {end}")
            ip(f"-n {name} link set {end} up")
            ip(f"-n {name} link set lo up")
    except (OSError, subprocess.SubprocessError):
        yield [Node("127.0.0.1", "lo", []) for _ in names]
    else:
        yield [
            Node(f"10.213.77.{index + 1}", end, ["ip", "netns", "exec", name])
            for index, (name, end) in enumerate(zip(names, ends, strict=True))
        ]
    finally:
        for name in names:  # with what is in them
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", ends[0]], capture_output=True, check=False)


RECIPE = (
    "-m kaggle_mgpu train text_generation --tokenizer byte --n-layer 1 --n-head 2 --n-embd 16 --block-size 16 "
    "--dropout 0.1 --global-batch-size 16 --gradient-accumulation-steps 2 --max-steps 30 --eval-every 20 "
    "--save-every 3 --strategy fsdp --checkpoint-format sharded --data-workers 0 --log-every 10"
).split()


def test_a_node_killed_and_brought_back_changes_nothing(nodes: list[Node], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 200)
    recipe = [*RECIPE, "--data-path", str(tmp_path / "text.txt")]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    # torch's agents otherwise share a store whose address a surviving agent does not tell one that joins later (2.13)
    variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    endpoint = f"{nodes[0].address}:{free_port()}"
    held = PauseAt(tmp_path / "hold", "os.rename", r"/step-00000009$")
    variables |= held.variables(variables)

    def start(index: int) -> subprocess.Popen[bytes]:
        node = nodes[index]
        torchrun = [*node.inside, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        torchrun += ["--nproc-per-node", "2", "--max-restarts", "3", "--rdzv-backend", "c10d"]
        torchrun += ["--rdzv-endpoint", endpoint, "--rdzv-id", "run", "--rdzv-conf", f"is_host={int(index == 0)}"]
        torchrun += ["--local-addr", node.address]
        with open(tmp_path / f"node{index}.log", "ab") as log:
            return subprocess.Popen(
                [*torchrun, *recipe, "--output-dir", str(tmp_path / "killed")],
                cwd=tmp_path,
                env={**variables, "GLOO_SOCKET_IFNAME": node.interface, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def logs() -> str:
        return "\n".join((tmp_path / f"node{index}.log").read_text() for index in range(2))

    agents = [start(0), start(1)]
    try:
        held.wait(agents[0], tmp_path / "node0.log")
        lost = [psutil.Process(agents[1].pid), *psutil.Process(agents[1].pid).children(recursive=True)]
        assert len(lost) >= 3
        for process in lost:
            process.kill()
        agents[1].wait()
        held.release()
        agents[1] = start(1)
        assert [agent.wait(600) for agent in agents] == [0, 0], logs()
    finally:
        for agent in agents:
            for process in [*psutil.Process(agent.pid).children(recursive=True)] if agent.poll() is None else []:
                process.kill()
            agent.kill()
            agent.wait()
    result = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert result["finished"] and result["world_size"] == 4 and result["strategy"] == "fsdp"
    records = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    starts = [record["step"] for record in records if record["kind"] == "start"]
    assert len(starts) >= 2 and starts[0] == 0 and starts[1] >= 3, starts

    whole = [sys.executable, *recipe, "--output-dir", str(tmp_path / "whole"), "--nproc", "4"]
    subprocess.run(whole, cwd=tmp_path, env=variables, check=True, capture_output=True, timeout=600)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]

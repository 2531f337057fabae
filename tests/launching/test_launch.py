"""The launcher with real processes: from this one, and from the cells of real Jupyter kernels."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import psutil
import pytest
import torch
from jupyter_client.manager import KernelManager
from safetensors.torch import load_file

from kaggle_mgpu import TrainConfig, devices, distributed, launch, session, train
from kaggle_mgpu.env import worker_server
from kaggle_mgpu.errors import HangError, RestartError, WorkerDiedError, WorkerError, WorkerTraceback
from kaggle_mgpu.launching import ProcessSettings, server, workers
from kaggle_mgpu.launching.output import CELL_CHARACTERS
from kaggle_mgpu.launching.workers import Workers
from pause_at import PauseAt
from runs import free_port
from tasks import Regression

ROOT = Path(__file__).parents[2]
LONG = 1000.0  # seconds: no test waits so long, so what would is known to have been ended


def children() -> list[psutil.Process]:
    """What this process has started and has not ended, except the server itself."""
    apart = {worker_server.current.process.pid} if worker_server.current else set()
    for kernel in [notebook.process for notebook in Notebook.running]:
        apart |= {kernel.pid, *(process.pid for process in kernel.children(recursive=True))}
    return [process for process in psutil.Process().children(recursive=True) if process.pid not in apart]


def soon(condition: Callable[[], bool], seconds: float = 600.0) -> bool:
    """Whether it comes true within a time that no machine needs, however busy."""
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return true


@pytest.fixture(autouse=True)
def a_busy_machine_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """To tell how a worker ended, and to end it: which error it is, and what a log holds, does not rest on that."""
    for name in ("GRACE_SECONDS", "END_SECONDS"):
        monkeypatch.setattr(workers, name, 600.0)
    monkeypatch.setattr(devices, "QUERY_TIMEOUT", 600.0)  # a stand-in for nvidia-smi is started, too


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is handler
    assert soon(lambda: not children()), children()


# --- values -----------------------------------------------------------------------------------------


def test_every_ranks_value_comes_back_in_order() -> None:
    base = 10

    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

    def function(point: Point, *, factor: int) -> Point:
        return Point(base + factor * point.x + distributed.rank())

    assert [point.x for point in launch(function, Point(1), factor=3, nproc=2)] == [13, 14]
    assert launch(lambda: distributed.world_size(), nproc=3) == [3, 3, 3]


def test_tensors_travel_without_their_graph_or_the_rest_of_their_storage() -> None:
    large = torch.arange(1_000_000.0)

    def function(part: torch.Tensor) -> Any:
        model = torch.nn.Linear(2, 2)
        return {"loss": model(part[:2]).sum(), "model": model, "part": part, "storage": part.untyped_storage().nbytes()}

    value = launch(function, large[3:6], nproc=2)[1]
    assert value["part"].tolist() == [3.0, 4.0, 5.0]
    assert value["storage"] == 12
    assert value["loss"].grad_fn is None
    assert isinstance(value["model"].weight, torch.nn.Parameter) and value["model"].weight.requires_grad


def test_what_cannot_travel_is_named() -> None:
    def function() -> Any:
        return {"history": [1.0], "state": {"lock": threading.Lock()}}

    with pytest.raises(
        TypeError, match=r"rank \d's return value cannot be sent .* value\['state'\]\['lock'\] is a _threa"
    ):
        launch(function, nproc=2)
    lock = threading.Lock()
    with pytest.raises(
        TypeError, match=r"the function, with its arguments, .*: lock \(in .*<lambda>\) is a _thread.lock"
    ):
        launch(lambda: lock, nproc=2)


def test_a_value_that_cannot_be_read_here_is_an_error() -> None:
    def parent_trap(pid: int) -> Any:
        class Trap:
            def __reduce__(self) -> Any:
                return (eval, (f"1 / (__import__('os').getpid() - {pid})",))

        return Trap()

    with pytest.raises(TypeError, match=r"rank \d's return value cannot be read here: ZeroDivisionError"):
        launch(parent_trap, os.getpid(), nproc=2)


def test_a_large_value_comes_back_also_where_sockets_have_a_default_timeout() -> None:
    with contextlib.ExitStack() as stack:
        stack.callback(socket.setdefaulttimeout, None)
        socket.setdefaulttimeout(0.01)
        assert launch(lambda: bytes(10**7) + b"x", nproc=2) == [bytes(10**7) + b"x"] * 2


def test_one_process_runs_in_place() -> None:
    assert launch(os.getpid, nproc=1) == [os.getpid()]


def test_a_launch_within_a_worker_runs_in_place() -> None:
    values = launch(lambda: launch(distributed.rank, nproc=2), nproc=2)
    assert values == [[0, 1], [0, 1]]


# --- the state of this process at launch time -------------------------------------------------------


def test_workers_find_this_process_as_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(distributed.rank, nproc=2)
    server = worker_server.current and worker_server.current.process.pid
    (tmp_path / "written_in_a_cell.py").write_text("value = 7")
    monkeypatch.setenv("SET_IN_A_CELL", "yes")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.chdir(tmp_path)

    def function() -> Any:
        import written_in_a_cell

        ids = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
        seen = [os.environ.get("SET_IN_A_CELL"), os.environ.get("HOME"), os.getcwd(), written_in_a_cell.value]
        child = subprocess.run([sys.executable, "-c", "import written_in_a_cell"], check=False).returncode
        return ids, seen, child, sys.argv

    for rank, value in enumerate(launch(function, nproc=2)):
        assert value == ([str(rank), str(rank), "2", "2"], ["yes", None, str(tmp_path), 7], 0, [""])
    assert server == (worker_server.current and worker_server.current.process.pid)


def test_a_variable_that_only_a_start_reads_starts_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(distributed.rank, nproc=2)
    server = worker_server.current and worker_server.current.process.pid
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    level = launch(lambda: torch.distributed.get_debug_level().name, nproc=2)
    assert level == ["DETAIL", "DETAIL"]
    assert server != (worker_server.current and worker_server.current.process.pid)


def test_a_changed_package_starts_another_server(tmp_path: Path) -> None:
    """The package unpacked from a notebook's payload, then another version of it in the same place."""
    code = f"""
        import os, shutil, sys
        shutil.copytree({str(ROOT / "kaggle_mgpu")!r}, "site-packages/kaggle_mgpu")
        sys.path.append(os.path.abspath("site-packages"))
        sys.path[:] = [p for p in sys.path if p not in ({str(ROOT)!r}, {str(ROOT / "tests")!r})]
        from kaggle_mgpu import launch
        def where():
            from kaggle_mgpu import optim
            return optim.__file__, getattr(optim, "ADDED", None)
        print(launch(where, nproc=2)[1])
        with open("site-packages/kaggle_mgpu/training/optim.py", "a") as file:
            file.write("\\nADDED = 1\\n")
        print(launch(where, nproc=2)[1])
    """
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = run_script(tmp_path, code, variables, "-P")
    expected = str(tmp_path / "site-packages" / "kaggle_mgpu" / "training" / "optim.py")
    assert done.stdout.splitlines() == [str((expected, None)), str((expected, 1))], done.stderr


def run_script(folder: Path, code: str, variables: dict[str, str] | None = None, *flags: str) -> Any:
    (folder / "script.py").write_text(textwrap.dedent(code))
    command = [sys.executable, *flags, "script.py"]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600, check=False)


def test_forks_draw_different_random_numbers() -> None:
    def function() -> Any:
        import random

        import numpy

        return random.random(), numpy.random.rand()

    drawn = [number for _ in range(2) for value in launch(function, nproc=2) for number in value]
    assert len(set(drawn)) == len(drawn)


def test_the_first_step_of_training_imports_next_to_nothing(tmp_path: Path) -> None:
    def function(config: TrainConfig) -> list[str]:
        before = set(sys.modules)
        train(config, Regression(samples=64))
        return [name for name in sys.modules if name not in before and name != "tasks"]

    config = TrainConfig(global_batch_size=32, nproc=2, max_steps=2, output_dir=str(tmp_path))
    assert len(launch(function, config)[0]) < 10
    assert launch(lambda: "sympy" in sys.modules and torch.cuda.is_initialized(), nproc=2) == [False, False]


# --- failures ---------------------------------------------------------------------------------------


class NeedsTwoError(Exception):
    def __init__(self, first: int, *, second: int) -> None:
        super().__init__(f"{first} and {second}")
        self.second = second


def test_an_exception_is_raised_as_itself() -> None:
    def function() -> None:
        if distributed.rank() == 1:
            raise NeedsTwoError(1, second=2)
        time.sleep(LONG)

    with pytest.raises(NeedsTwoError, match=r"^1 and 2$") as caught:
        launch(function, nproc=2)
    assert caught.value.second == 2
    assert isinstance(caught.value.__cause__, WorkerTraceback)
    assert "rank 1:" in str(caught.value.__cause__) and "raise NeedsTwoError(1, second=2)" in str(
        caught.value.__cause__
    )


def test_the_cause_is_raised_and_not_what_follows_from_it() -> None:
    def function() -> None:
        if distributed.rank() == 1:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.barrier()

    with pytest.raises(WorkerDiedError, match="rank 1 of 2 ended by SIGKILL"):
        launch(function, nproc=2)


def test_a_collectives_error_is_a_consequence_however_torch_words_it() -> None:
    def function() -> None:
        distributed.barrier()  # rank 0 keeps the store: rank 1 could not begin without it
        if distributed.rank() == 1:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        exec(compile("raise RuntimeError('new words')", "/site/torch/distributed/distributed_c10d.py", "exec"))

    with pytest.raises(WorkerDiedError, match="rank 1 of 2 ended by SIGKILL"):
        launch(function, nproc=2)


def test_lines_that_gloo_prints_for_each_group_do_not_reach_the_cell(capsys: pytest.CaptureFixture[str]) -> None:
    line = "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\n"

    def function() -> None:
        os.write(1, line.encode())
        os.write(1, b"the first line\n")

    launch(function, nproc=2)
    assert capsys.readouterr().out == "the first line\n"


def test_a_death_is_no_consequence_though_gloo_has_printed_to_its_log() -> None:
    def function() -> None:
        print("[Gloo] Rank 1 is connected to 1 peer ranks")
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.barrier()

    with pytest.raises(WorkerDiedError, match="rank 1 of 2 ended by SIGKILL"):
        launch(function, nproc=2)


def test_an_exception_that_does_not_pickle_is_told_with_its_text() -> None:
    def function() -> None:
        error = ValueError("of its own kind")
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error

    with pytest.raises(WorkerError, match=r"rank \d: ValueError: of its own kind"):
        launch(function, nproc=2)


class NoTextError(Exception):
    def __str__(self) -> str:
        raise KeyError("text")


class EmptyTextError(RuntimeError):
    """An error with an empty text. Raised by a collective, it starts a restart, which is told in a line."""


def test_an_error_without_a_text_is_told_by_its_type(capsys: pytest.CaptureFixture[str]) -> None:
    def function(error: type[Exception], file: str) -> None:
        exec(compile("raise error", file, "exec"), {"error": error()})

    with pytest.raises(WorkerError, match=r"rank \d: .*NoTextError: <exception str\(\) failed>"):
        launch(function, NoTextError, "cell", nproc=2)
    capsys.readouterr()
    with pytest.raises(EmptyTextError, match=r"^$"):
        launch(function, EmptyTextError, "/site/torch/distributed/distributed_c10d.py", nproc=2, max_restarts=1)
    assert capsys.readouterr().out == "EmptyTextError: \nstarting again: restart 1 of 1\n"


def test_a_function_may_close_its_output() -> None:
    def function(fails: bool) -> int:
        os.close(1)
        os.close(2)
        return 1 // (not fails)

    assert launch(function, False, nproc=2) == [1, 1]
    with pytest.raises(ZeroDivisionError):
        launch(function, True, nproc=2)


def test_a_full_shared_memory_is_named(tmp_path: Path) -> None:
    code = """
        import ctypes, multiprocessing, os
        ctypes.CDLL(None).unshare(0x00020000)  # CLONE_NEWNS: what is mounted is mounted for this process alone
        if os.system("mount --make-rprivate / && mount -t tmpfs -o size=64k tmpfs /dev/shm"):
            raise SystemExit("mounting a small /dev/shm takes root")
        open("/dev/shm/filler", "wb").write(bytes(2**16))
        from kaggle_mgpu import launch
        try:
            launch(lambda: multiprocessing.Semaphore(), nproc=2)
        except OSError as error:
            print(error, *error.__notes__)
    """
    done = run_script(tmp_path, code, {**os.environ, "PYTHONPATH": str(ROOT)})
    if "takes root" in done.stderr:
        pytest.skip("mounting a small /dev/shm takes root")
    expected = "No space left on device /dev/shm, the memory that processes share, is full: 0.0 of 0.1 MiB are free"
    assert expected in done.stdout, done.stderr


def test_a_server_that_can_start_no_worker_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(distributed.rank, nproc=2)
    assert worker_server.current is not None
    limit = resource.prlimit(worker_server.current.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(worker_server.current.process.pid, resource.RLIMIT_NOFILE, (20, limit[1]))
    monkeypatch.setattr(workers, "START_ATTEMPTS", 1)
    with pytest.raises(WorkerError, match=r"no worker could be started by 1 servers; the last said: Traceback"):
        launch(distributed.rank, nproc=20)


def test_more_processes_than_a_launch_can_start_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="nproc=125: expected at most 124"):
        launch(os.getpid, nproc=125)


def test_a_process_with_many_open_files_launches() -> None:
    """select() takes no descriptor above 1023."""
    if worker_server.current is not None:
        worker_server.current.stop()  # the next server's socket is to have a high number too
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1024):
            stack.enter_context(open(os.devnull))
        assert launch(distributed.rank, nproc=2) == [0, 1]
        assert worker_server.current is not None and worker_server.current.control.fileno() > 1023


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (lambda: ctypes.string_at(0), r"SIGSEGV \(a crash in native code\).*string_at"),
        (lambda: os._exit(3), "exit code 3, without an exception"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL .*lack of memory: lower micro_batch_size"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "SIGBUS .*/dev/shm is full"),
    ],
    ids=["segfault", "exit", "kill", "bus"],
)
def test_a_death_names_rank_signal_cause_and_last_lines(end: Callable[[], Any], text: str) -> None:
    def function() -> None:
        print("last words")
        if distributed.rank() == 1:
            end()
        time.sleep(LONG)

    with pytest.raises(WorkerDiedError, match=rf"(?s)rank 1 of 2 ended (by|with) {text}") as caught:
        launch(function, nproc=2)
    assert "last words" in str(caught.value)


def test_sys_exit_in_a_worker_does_not_end_this_process() -> None:
    with pytest.raises(WorkerError, match=r"called sys.exit\(4\)"):
        launch(lambda: sys.exit(4), nproc=2)


def test_children_of_workers_end_with_them() -> None:
    def function() -> int:
        child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        if distributed.rank() == 1:
            distributed.barrier()
            raise ValueError("no more")
        distributed.barrier()
        return child.pid

    with pytest.raises(ValueError, match="no more"):
        launch(function, nproc=2)
    assert soon(lambda: not children())  # not the sleep of a thousand seconds


def test_the_server_may_be_killed_at_any_time(tmp_path: Path) -> None:
    launch(distributed.rank, nproc=2)
    assert worker_server.current is not None
    worker_server.current.process.kill()
    assert launch(distributed.rank, nproc=2) == [0, 1]
    server = worker_server.current.process

    def function() -> None:
        child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        (tmp_path / str(distributed.rank())).write_text(str(child.pid))
        distributed.barrier()
        if distributed.rank() == 1:
            server_pid = psutil.Process(os.getppid()).ppid()
            os.kill(server_pid, signal.SIGKILL)
        time.sleep(LONG)

    with pytest.raises(WorkerDiedError, match="because the supervisor of its launch was killed"):
        launch(function, nproc=2)
    assert server.wait(600) == -signal.SIGKILL
    sleeping = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert soon(lambda: not any(psutil.pid_exists(pid) for pid in sleeping))
    assert launch(distributed.rank, nproc=2) == [0, 1]


def test_a_supervisor_that_the_kernel_leaves_out_of_its_list_is_no_orphan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of children is not exact while one of them ends, as that of the launch before does."""
    lists: list[list[int]] = []
    monkeypatch.setattr(server, "_children", lambda: lists.pop())
    with subprocess.Popen(["sleep", "1000"]) as supervisor, subprocess.Popen(["sleep", "1000"]) as orphan:
        lists += [[supervisor.pid, orphan.pid], [supervisor.pid], []]
        supervisors = {supervisor.pid}
        try:
            assert [server._end_orphans(supervisors) for _ in range(3)] == [True] * 3
            assert orphan.wait() == -signal.SIGKILL
            os.kill(supervisor.pid, signal.SIGTERM)
            assert supervisor.wait() == -signal.SIGTERM, "and not by SIGKILL"
        finally:
            for process in (supervisor, orphan):
                process.kill()
        lists.append([])
        assert not server._end_orphans(supervisors)
        assert supervisors == set()


def test_a_signal_that_a_supervisor_has_left_unread_hides_no_end(tmp_path: Path) -> None:
    """The kernel then tells of a connection that was reset before it hands over what was sent."""
    ended = Workers((print, (), {}), 2, [], tmp_path, ProcessSettings(), 0)
    ended.links = [socket.socketpair()[0] for _ in range(2)]
    ended.channel, supervisors = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for rank in range(2):
        supervisors.send(server.END.pack(rank, signal.SIGKILL))
    ended._signal(signal.SIGINT)
    supervisors.close()
    with ended.channel:
        while len(ended.failures) < 2:
            ended._receive_end()
    assert all(f"rank {rank} of 2 ended by SIGKILL" in str(error) for rank, error in ended.failures.items())


def test_a_server_that_cannot_import_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise ImportError('this torch is broken')")
    code = """
        from kaggle_mgpu import launch
        try:
            launch(print, nproc=2)
        except Exception as error:
            print(type(error).__name__, error)
    """
    done = run_script(tmp_path, code, {**os.environ, "PYTHONPATH": f"{tmp_path}/broken:{ROOT}"})
    assert "WorkerError the worker server ended with code 1" in done.stdout
    assert "this torch is broken" in done.stdout


# --- hangs ------------------------------------------------------------------------------------------


def once_it_waits(path: Path) -> None:
    """In a worker: make a file when this rank is in its next collective, and waits."""
    main = threading.main_thread().ident
    assert main is not None

    def waits() -> bool:
        code = sys._current_frames()[main].f_code
        return (code.co_filename, code.co_name) == (distributed.__file__, "wait")

    def look() -> None:
        while not waits():
            time.sleep(0.01)
        path.touch()

    threading.Thread(target=look, daemon=True).start()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], bool]], None]:
    """The launcher looks for a hang only once a condition holds: a busy machine may be slow to get there."""
    check = Workers._check_pulse

    def wait_for(condition: Callable[[], bool]) -> None:
        monkeypatch.setattr(Workers, "_check_pulse", lambda self, *args: condition() and check(self, *args))

    return wait_for


def hang_in_one_rank(folder: Path) -> None:
    for step in range(5):
        distributed.alive(step)
        if step == 3:
            if distributed.rank() == 1:
                (folder / "1").touch()
                time.sleep(LONG)
            once_it_waits(folder / "0")
        distributed.barrier()


def test_a_hang_shows_each_ranks_stack_and_who_is_behind(
    tmp_path: Path, patience: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "STACK_SECONDS", 600.0)  # both will answer
    patience(lambda: len(list(tmp_path.iterdir())) == 2)
    with pytest.raises(HangError) as caught:
        launch(hang_in_one_rank, tmp_path, nproc=2, timeout=1.0)
    text = str(caught.value)
    assert "rank 1 is behind (rank 0: step 3, 1 signs of life since; rank 1: step 3, 0 signs of life since)" in text
    first, second = text.split("Stack of rank ")[1:]
    assert "in wait" in first and "in barrier" in first
    assert "in hang_in_one_rank" in second and "in barrier" not in second


def test_a_stopped_process_is_a_hang_too(tmp_path: Path, patience: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def function() -> None:
        distributed.init()
        if distributed.rank() == 1:
            (tmp_path / "stopped").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        once_it_waits(tmp_path / "waits")
        distributed.barrier()

    def stopped() -> bool:
        file = tmp_path / "stopped"
        pid = file.read_text() if file.exists() and (tmp_path / "waits").exists() else ""
        return bool(pid) and psutil.Process(int(pid)).status() == psutil.STATUS_STOPPED

    monkeypatch.setattr(workers, "STACK_SECONDS", 0.5)  # none will come
    patience(stopped)
    with pytest.raises(HangError, match=r"rank 1 is behind(?s:.*)Stack of rank 1:\n\(no answer"):
        launch(function, nproc=2, timeout=1.0)


def signal_within_the_next_message(number: signal.Signals) -> None:
    """In a worker: send this process a signal when it has written the size of a message and not yet its content."""
    writes: list[Any] = []

    def watch(frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in ("write", "sendall"):
            writes.append(function)
            if len(writes) == 2:
                os.kill(os.getpid(), number)

    sys.setprofile(watch)
    threading.setprofile(watch)


def test_a_process_that_stops_within_a_message_blocks_nothing(
    tmp_path: Path, patience: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def function(folder: Path) -> bytes:
        (folder / f"pid-{os.getpid()}").touch()
        distributed.barrier()
        signal_within_the_next_message(signal.SIGSTOP)
        return bytes(100_000)

    def stopped(folder: Path) -> bool:
        ids = [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]
        return len(ids) == 2 and all(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in ids)

    def interrupt_once_stopped() -> bool:
        if stopped(interrupted):
            os.kill(os.getpid(), signal.SIGINT)
        return False

    monkeypatch.setattr(workers, "STACK_SECONDS", 0.1)  # none will come
    hanging, interrupted = tmp_path / "hanging", tmp_path / "interrupted"
    hanging.mkdir()
    patience(lambda: stopped(hanging))
    with pytest.raises(HangError, match=r"Stack of rank 1:\n\(no answer"):
        launch(function, hanging, nproc=2, timeout=1.0)
    interrupted.mkdir()
    patience(interrupt_once_stopped)
    with pytest.raises(KeyboardInterrupt):
        launch(function, interrupted, nproc=2)


def test_an_interrupt_leaves_no_half_of_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(session, "_channel", lambda html, text, display_id: shown.append(text))

    def function() -> str:
        distributed.barrier()
        signal_within_the_next_message(signal.SIGINT)
        try:
            session.show("x" * 100_000, "panel", "id")
        except KeyboardInterrupt:
            return "interrupted"
        return "not interrupted"

    assert launch(function, nproc=2) == ["interrupted"] * 2
    assert shown == ["panel"] * 2


def test_work_without_signs_of_life_is_no_hang_unless_asked_for(tmp_path: Path) -> None:
    def function() -> int:
        time.sleep(1.5)
        return distributed.rank()

    config = TrainConfig(hang_timeout_minutes=0.01, output_dir=str(tmp_path))
    assert launch(lambda config: function(), config, nproc=2) == [0, 1]


def test_a_stack_is_waited_for_until_it_is_whole(
    tmp_path: Path, patience: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """faulthandler writes it line by line, and a busy machine may let it wait in between."""

    def function() -> None:
        import faulthandler

        whole = tmp_path / "whole"
        with open(whole, "w") as file:
            faulthandler.dump_traceback(file)
        lines = whole.read_text().splitlines(keepends=True)

        def slowly(*_: object) -> None:
            os.write(2, "".join(lines[:2]).encode())
            time.sleep(0.5)
            os.write(2, "".join(lines[2:]).encode())

        if distributed.rank() == 0:
            faulthandler.unregister(signal.SIGQUIT)
            signal.signal(signal.SIGQUIT, slowly)
            (tmp_path / "ready").touch()
        time.sleep(LONG)

    monkeypatch.setattr(workers, "STACK_SECONDS", 600.0)
    patience((tmp_path / "ready").exists)
    with pytest.raises(
        HangError, match=r"Stack of rank 0:\n(?s:.*)in function\n(?s:.*)in main\n(?s:.*)Stack of rank 1:"
    ) as caught:
        launch(function, nproc=2, timeout=0.1)
    assert workers._OUTERMOST_FRAME.search(str(caught.value)), "this it was, and not the end of its patience"


def test_lines_are_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own: the last line was noticed so many limits ago."""
    check, limit = Workers._check_pulse, 100.0

    def function() -> int:
        print("still here")
        while not (tmp_path / "heard").exists():
            time.sleep(0.01)
        return distributed.rank()

    def check_after(limits: float) -> None:
        def later(self: Workers, *given: Any) -> None:
            check(self, *given)
            if all(path.stat().st_size for path in self.log_paths) and self.log_sizes == [
                path.stat().st_size for path in self.log_paths
            ]:
                noticed = self.log_grew
                clocks = {
                    "monotonic": lambda: noticed + limits * limit,
                    "monotonic_ns": lambda: time.monotonic_ns() + 10**15,
                }
                with monkeypatch.context() as patch:
                    patch.setattr(workers, "time", SimpleNamespace(**{**vars(time), **clocks}))
                    check(self, *given)
                (tmp_path / "heard").touch()

        monkeypatch.setattr(Workers, "_check_pulse", later)

    check_after(1.5)
    with pytest.raises(HangError, match="no rank made progress"):
        launch(function, nproc=2, timeout=limit)
    check_after(0.5)
    assert launch(function, nproc=2, timeout=limit) == [0, 1]


# --- output -----------------------------------------------------------------------------------------


def logged(folder: Path, rank: int) -> str:
    """Return a rank's log without the lines of gloo, which torch 2.10 writes."""
    lines = (folder / "logs" / f"rank{rank}.log").read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("[Gloo]"))


def test_rank_0_is_shown_and_each_rank_has_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def function(config: TrainConfig) -> None:
        for i in range(500):
            print(f"rank {distributed.rank()} line {i} é")
        os.write(1, b"from below\n")

    launch(function, TrainConfig(output_dir=str(tmp_path), nproc=2))
    expected = [[f"rank {rank} line {i} é" for i in range(500)] + ["from below"] for rank in range(2)]
    assert capfd.readouterr().out.splitlines() == expected[0]
    assert [logged(tmp_path, rank).splitlines() for rank in range(2)] == expected


def test_a_flood_of_lines_is_cut_in_the_cell_and_whole_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = 200_000

    def function(config: TrainConfig) -> None:
        for i in range(count):
            print("line", i)

    launch(function, TrainConfig(output_dir=str(tmp_path), nproc=2))
    shown = capsys.readouterr().out
    assert len(shown) < CELL_CHARACTERS + 2000
    lines = shown.splitlines()
    assert lines[0] == "line 0"
    assert lines[-1] == f"line {count - 1}"
    assert str(tmp_path / "logs" / "rank0.log") in shown
    for rank in range(2):
        assert logged(tmp_path, rank) == "".join(f"line {i}\n" for i in range(count))


def test_an_errors_traceback_is_in_the_log_and_once_in_the_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def function(config: TrainConfig) -> None:
        print("before")
        if distributed.rank() == 0:
            raise ZeroDivisionError("oh")
        time.sleep(LONG)

    with pytest.raises(ZeroDivisionError):
        launch(function, TrainConfig(output_dir=str(tmp_path), nproc=2))
    assert capsys.readouterr().out == "before\n"
    assert "ZeroDivisionError: oh" in (tmp_path / "logs" / "rank0.log").read_text()


def test_what_follows_a_display_is_not_shown_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where this process hears of the display only when the traceback of an error after it is in the log."""
    shown: list[str] = []
    monkeypatch.setattr(session, "_channel", lambda html, text, display_id: shown.append(text))
    receive = Workers._receive

    def late(self: Workers, rank: int) -> bool:
        log = self.log_paths[0]
        assert soon(lambda: "ZeroDivisionError: oh" in log.read_text())
        return receive(self, rank)

    monkeypatch.setattr(Workers, "_receive", late)

    def function(config: TrainConfig) -> None:
        if distributed.rank() == 0:
            print("before")
            session.show("<b>panel</b>", "panel", "id")
            raise ZeroDivisionError("oh")
        time.sleep(LONG)

    with pytest.raises(ZeroDivisionError):
        launch(function, TrainConfig(output_dir=str(tmp_path), nproc=2))
    assert (capsys.readouterr().out, shown) == ("before\n", ["panel"])


def test_temporary_logs_go_with_a_launch_that_ends_well_and_few_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for number in range(15):
        (tmp_path / f"kaggle_mgpu-logs-20260101-0000{number:02}-abc").mkdir()
    with pytest.raises(ZeroDivisionError):
        launch(lambda: 1 // 0, nproc=2)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert len(kept) == 10 and kept[0].endswith("-000006-abc")
    assert "ZeroDivisionError" in (tmp_path / kept[-1] / "rank0.log").read_text()
    assert launch(distributed.rank, nproc=2) == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept[1:]


# --- settings ---------------------------------------------------------------------------------------


def test_a_collective_waits_no_longer_than_the_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.1)  # the other rank will say nothing

    def function(config: TrainConfig) -> None:
        distributed.init()
        group = torch.distributed.group.WORLD
        assert group is not None
        assert group._get_backend(torch.device("cpu")).options._timeout == datetime.timedelta(minutes=20)
        distributed.barrier()
        # the ranks have found each other, however long that took: now it may be short
        torch.distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=0.5), group)
        if distributed.rank() == 0:
            distributed.barrier()
        time.sleep(LONG)

    with pytest.raises(RuntimeError, match=r"(?i)timed out") as caught:
        launch(function, TrainConfig(collective_timeout_minutes=20, output_dir=str(tmp_path)), nproc=2)
    assert "in barrier" in str(caught.value.__cause__)


SMI = """#!/bin/sh
printf '0, GPU-a, Tesla T4, 15360, 7.5\\n1, GPU-b, Tesla T4, 15360, 7.5\\n2, GPU-c, Tesla T4, 15360, 7.5\\n'
"""


def test_gpus_are_chosen_and_nccl_is_set_for_t4s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    names = [
        "CUDA_VISIBLE_DEVICES",
        "CUDA_DEVICE_ORDER",
        "NCCL_P2P_DISABLE",
        "NCCL_CUMEM_HOST_ENABLE",
        "NCCL_SOCKET_IFNAME",
    ]

    def function(config: TrainConfig | None = None) -> list[str | None]:
        return [os.environ.get(name) for name in names]

    monkeypatch.chdir(tmp_path)  # the logs of a run without a folder of its own
    assert launch(function, TrainConfig(gpu_ids="0,2"))[1] == ["0,2", "PCI_BUS_ID", "1", "0", "lo"]
    assert launch(function, gpu_ids="2,1")[0][:2] == ["2,1", "PCI_BUS_ID"]
    assert launch(function, TrainConfig(nccl_p2p="on"))[2] == ["0,1,2", "PCI_BUS_ID", None, None, "lo"]
    # dp has several GPUs in this very process
    assert launch(function, TrainConfig(strategy="dp"), nproc=1)[0][2:4] == ["1", "0"]
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")  # peer access off by the user's own hand
    assert launch(function, TrainConfig(nccl_p2p="on"))[0][2:4] == ["1", "0"]
    with pytest.raises(ValueError, match="expected at most 2"):
        launch(function, gpu_ids="0,1", nproc=3)


# --- restarts ---------------------------------------------------------------------------------------


class DiesOnce(Regression):
    """Kills its rank at a step of the first attempt."""

    def __init__(self, flag: Path, step: int) -> None:
        super().__init__(samples=200, val_samples=0, dropout=0.2)
        self.flag, self.left = flag, step

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        self.left -= 1
        if self.left == 0 and distributed.rank() == 1 and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch)


def settings(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(global_batch_size=20, nproc=2, max_steps=30, save_every=5, output_dir=str(folder)).replace(
        **changes
    )


def test_a_killed_run_goes_on_in_the_same_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flag").touch()
    whole = launch(train, settings(tmp_path / "whole"), DiesOnce(tmp_path / "flag", 18))
    (tmp_path / "flag").unlink()
    launch(train, settings(tmp_path / "killed", max_steps=7), DiesOnce(tmp_path / "none", 100))  # is begun anew
    result = launch(
        train, settings(tmp_path / "killed", resume="never", max_restarts=1), DiesOnce(tmp_path / "flag", 18)
    )
    assert result.finished and result.step == whole.step == 30
    shown = capsys.readouterr().out
    assert "rank 1 of 2 ended by SIGKILL" in shown
    assert "restart 1 of 1" in shown
    # a busy machine may not have written the newest by then
    assert re.search(r"step-000000(05: step 5|10: step 10|15: step 15) of 30", shown)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "--- restart 1 ---" in (tmp_path / "killed" / "logs" / "rank1.log").read_text()


@pytest.mark.parametrize("cause", [ValueError, RestartError])
def test_what_others_make_of_a_failure_while_they_may_still_write_is_not_its_cause(
    cause: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = Workers._wait_for_writes

    def waiting(self: Workers, *given: Any) -> None:
        (tmp_path / "waiting").touch()
        wait(self, *given)

    monkeypatch.setattr(Workers, "_wait_for_writes", waiting)

    def function() -> bool:
        again = (tmp_path / "begun").exists()
        distributed.barrier()
        if again:
            return again
        (tmp_path / "begun").touch()
        if distributed.rank() == 1:
            raise cause("this one")
        distributed.saving(cause is ValueError)
        with contextlib.suppress(RuntimeError):
            distributed.barrier()
        while not (tmp_path / "waiting").exists():
            time.sleep(0.01)
        os.abort()

    if cause is ValueError:
        with pytest.raises(ValueError, match="this one"):
            launch(function, nproc=2)
    else:
        assert launch(function, nproc=2) == [True, True]


def test_restarts_come_to_an_end(tmp_path: Path) -> None:
    def function() -> None:
        with open(tmp_path / "attempts", "a") as file:
            file.write("x")
        distributed.barrier()
        os._exit(1)

    with pytest.raises(WorkerDiedError):
        launch(function, nproc=2, max_restarts=2)
    assert (tmp_path / "attempts").read_text() == "x" * 6
    with pytest.raises(ZeroDivisionError):  # would only happen again
        launch(lambda: [open(tmp_path / "error", "a").write("x"), 1 / 0], nproc=2, max_restarts=2)  # noqa: SIM115
    assert len((tmp_path / "error").read_text()) <= 2


# --- torchrun ---------------------------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def test_under_torchrun_the_call_is_made_in_place(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os\n"
        "from kaggle_mgpu import distributed, launch\n"
        "values = launch(lambda: (distributed.rank(), os.getpid()))\n"
        "assert values[distributed.rank()] == (distributed.rank(), os.getpid())\n"
        "print(len(values), flush=True)\n"
        "os._exit(0)\n"  # else torch's threads now and then abort a process that has ended well, and with it the other
    )
    done = subprocess.run(
        [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout.count("2") == 2, done.stderr  # torchrun may tear lines


NODE = """
import os, sys
from kaggle_mgpu import TrainConfig, launch, train
from tasks import Regression

config = TrainConfig(global_batch_size=20, max_steps=30, save_every=5, output_dir=sys.argv[1], eval_every="end")
result = launch(train, config, Regression(samples=200, dropout=0.2))
assert result.world_size == 2, result.world_size
sys.stdout.flush()
# as `python -m kaggle_mgpu` does: torch's own threads now and then abort a process that has ended well ("terminate
# called without an active exception"), and the agent then restarts what is finished
os._exit(0)
"""


def test_two_nodes_one_killed_and_restarted_end_with_the_weights_of_an_undisturbed_run(tmp_path: Path) -> None:
    (tmp_path / "node.py").write_text(NODE)
    endpoint = f"127.0.0.1:{free_port()}"
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "GLOO_SOCKET_IFNAME": "lo"}
    # torch's agents otherwise share a store whose address a surviving agent does not tell one that joins later (2.13)
    variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    held = PauseAt(tmp_path / "hold", "os.rename", r"/step-00000015$")
    variables |= held.variables(variables)

    def agent(number: int, folder: str) -> subprocess.Popen[bytes]:
        options = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
        options += ["--rdzv-endpoint", endpoint, "--rdzv-id", folder, "--rdzv-conf", f"is_host={int(number == 0)}"]
        options += ["--local-addr", "127.0.0.1"]
        with open(tmp_path / f"{folder}-{number}.log", "ab") as log:
            return subprocess.Popen(
                [*TORCHRUN, *options, "node.py", folder], cwd=tmp_path, env=variables, stdout=log, stderr=log
            )

    agents = [agent(0, "killed"), agent(1, "killed")]
    try:
        held.wait(agents[0], tmp_path / "killed-0.log")
        # the agent first: it would start another worker
        for process in [first := psutil.Process(agents[1].pid), *first.children(recursive=True)]:
            process.kill()
        agents[1].wait()
        held.release()
        agents[1] = agent(1, "killed")
        codes = [process.wait(600) for process in agents]
    finally:
        for process in agents:
            process.kill()
            process.wait()
    logs = "\n".join((tmp_path / f"killed-{number}.log").read_text() for number in range(2))
    assert codes == [0, 0], logs
    assert "going on from" in logs
    result = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert result["finished"] and result["step"] == 30

    whole = TrainConfig(
        global_batch_size=20, max_steps=30, save_every=5, output_dir=str(tmp_path / "whole"), eval_every="end"
    )
    launch(train, whole, Regression(samples=200, dropout=0.2), nproc=2)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# --- notebooks --------------------------------------------------------------------------------------


class Notebook:
    """A real Jupyter kernel, and what its cells print."""

    running: ClassVar[list[Notebook]] = []

    def __init__(self, folder: Path) -> None:
        # sockets with names of their own: ports are chosen before the kernel has them, and another may take one
        self.temporary = tempfile.TemporaryDirectory(prefix="kernel-")  # names of sockets are short
        connection = f"{self.temporary.name}/connection.json"
        self.manager = KernelManager(kernel_name="python3", transport="ipc", connection_file=connection)
        variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tools'}"}
        self.manager.start_kernel(cwd=str(folder), env=variables)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(600)
        self.process = psutil.Process(self.manager.provisioner.pid)  # type: ignore[union-attr]
        self.running.append(self)

    def run(self, code: str, *, on_line: Callable[[str], None] = lambda line: None, timeout: float = 600.0) -> str:
        """Run a cell; what it printed, or what its error shows. `on_line` hears each chunk of output as it comes."""
        # else a kernel drops a cell that arrives at once after one with an error
        self.client.execute(textwrap.dedent(code), stop_on_error=False)
        text = ""
        while True:
            message = self.client.get_iopub_msg(timeout=timeout)
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                text += content["text"]
                on_line(content["text"])
            elif kind == "error":
                text += "\n".join(content["traceback"])
            elif kind == "status" and (content["execution_state"], message["parent_header"].get("msg_type")) == (
                "idle",
                "execute_request",
            ):
                self.client.get_shell_msg(timeout=timeout)
                return text

    def close(self) -> None:
        self.running.remove(self)
        self.client.stop_channels()
        with contextlib.suppress(RuntimeError):
            self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()
        self.temporary.cleanup()


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    notebook = Notebook(tmp_path_factory.mktemp("notebook"))
    notebook.run(
        """
        from kaggle_mgpu import env
        env.fix(start_workers=True)
        import os, signal, sys, time
        import psutil
        from kaggle_mgpu import TrainConfig, distributed, launch, train
        from tasks import Regression
        """
    )
    yield notebook
    notebook.close()


def test_in_a_notebook_functions_and_classes_of_cells_travel(notebook: Notebook) -> None:
    notebook.run("class Point:\n    def __init__(self, x): self.x = x\noffset = 5")
    notebook.run("def move(point): return Point(point.x + offset + distributed.rank())")
    assert notebook.run("print([p.x for p in launch(move, Point(1), nproc=2)])") == "[6, 7]\n"
    assert notebook.run("print(isinstance(launch(move, Point(1), nproc=2)[0], Point))") == "True\n"


def test_in_a_notebook_an_exception_shows_the_cells_own_lines(notebook: Notebook) -> None:
    notebook.run(
        """
        class OwnError(Exception): pass
        def fails():
            if distributed.rank() == 1:
                raise OwnError("from a cell")  # this line is shown
            time.sleep(1000)
        """
    )
    shown = notebook.run("launch(fails, nproc=2)")
    plain = "".join(part.partition("m")[2] if i else part for i, part in enumerate(shown.split("\x1b[")))
    assert "OwnError: from a cell" in plain
    assert "rank 1:" in plain
    assert plain.count('raise OwnError("from a cell")  # this line is shown') == 1
    shown = notebook.run("try:\n    launch(fails, nproc=2)\nexcept OwnError:\n    print('caught')")
    assert shown == "caught\n"


def test_in_a_notebook_a_cell_that_was_edited_shows_its_new_lines(notebook: Notebook) -> None:
    for text in ("first", "second"):
        notebook.run(f"def fails():\n    # a line more in each\n    return (lambda: int('{text}'))()  # edited")
        shown = notebook.run(
            "try:\n    launch(fails, nproc=2)\nexcept ValueError as error:\n    print(error.__cause__)"
        )
        assert f"return (lambda: int('{text}'))()  # edited" in shown


def test_in_a_notebook_lines_come_live_and_once(notebook: Notebook, tmp_path: Path) -> None:
    """Each is written only when the one before has been seen here."""
    heard: list[str] = []

    def hear(text: str) -> None:
        heard.extend(text.splitlines())
        (tmp_path / str(len(heard))).touch()

    shown = notebook.run(
        f"""
        def talks():
            for i in range(6):
                print("rank", distributed.rank(), "line", i)
                while not os.path.exists(f"{tmp_path}/{{i + 1}}"):
                    time.sleep(0.01)
        _ = launch(talks, nproc=2)
        """,
        on_line=hear,
    )
    assert shown == "".join(f"rank 0 line {i}\n" for i in range(6))


TRAINING = """
    config = TrainConfig(global_batch_size=20, nproc=2, max_steps=100_000, output_dir={folder!r}, log_every=10)
    handler = signal.getsignal(signal.SIGINT)
    class Telling(Regression):
        def on_record(self, record):
            if record["kind"] == "train":
                print("took a step")
    result = launch(train, config, Telling(val_samples=0))
    print("REASON", result.reason, 0 < result.step < 100_000, signal.getsignal(signal.SIGINT) is handler)
"""


def test_in_a_notebook_an_interrupt_saves_and_the_next_launch_goes_on(notebook: Notebook, tmp_path: Path) -> None:
    interrupted: list[str] = []

    def interrupt(text: str) -> None:
        # a step was taken: before the first one there is nothing to save, and an interrupt is Python's own
        if "took a step" in text and not interrupted:
            interrupted.append(text)
            notebook.manager.interrupt_kernel()

    code = TRAINING.format(folder=str(tmp_path / "run"))
    assert "REASON asked to stop True True" in notebook.run(code, on_line=interrupt)
    step = json.loads((tmp_path / "run" / "result.json").read_text())["step"]
    interrupted.clear()
    shown = notebook.run(code, on_line=interrupt)
    assert f"going on from {tmp_path}/run/checkpoints/step-{step:08d}" in shown


def test_in_a_notebook_a_second_interrupt_ends_workers_that_ignore_the_first(notebook: Notebook) -> None:
    waited_for = ["ignored", "ready"]  # a third interrupt might reach the next cell

    def interrupt(text: str) -> None:
        if waited_for and waited_for[-1] in text:
            waited_for.pop()
            notebook.manager.interrupt_kernel()

    shown = notebook.run(
        """
        def ignores():
            signal.signal(signal.SIGINT, lambda *_: print("ignored"))
            distributed.barrier()  # both of them
            print("ready")
            while True:
                time.sleep(0.1)
        launch(ignores, nproc=2)
        """,
        on_line=interrupt,
    )
    assert "KeyboardInterrupt" in shown
    assert notebook.run("print(launch(distributed.rank, nproc=2))") == "[0, 1]\n"


def test_in_a_notebook_ten_launches_leave_no_trace(notebook: Notebook) -> None:
    shown = notebook.run(
        """
        def traces():
            me = psutil.Process()
            while len(me.children(recursive=True)) > 1:  # the server; what has ended takes a moment to be gone
                time.sleep(0.05)
            return me.num_fds(), me.memory_info().rss / 2**20
        def step():
            import torch
            torch.distributed.init_process_group("gloo")
            model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
            model(torch.randn(2, 4)).sum().backward()
            return model.module.weight
        launch(step, nproc=2)
        before = traces()
        for _ in range(10):
            _ = launch(step, nproc=2)
        after = traces()
        print(before[0] == after[0], after[1] - before[1] < 5)
        """
    )
    assert shown == "True True\n"


def test_in_a_notebook_faults_leave_nothing_behind(notebook: Notebook) -> None:
    shown = notebook.run("import launch_faults\nprint('CODE', launch_faults.main(['--count', '16']))")
    assert "CODE 0" in shown, shown


def test_two_notebooks_launch_at_once_and_a_killed_kernel_takes_its_workers_along(
    notebook: Notebook, tmp_path: Path
) -> None:
    other = Notebook(tmp_path)
    try:
        other.run("from kaggle_mgpu import distributed, launch\nimport subprocess, time")
        other.client.execute(
            textwrap.dedent(
                """
                def waits():
                    subprocess.Popen(["sleep", "1000"])
                    print("waiting")
                    open(f"waiting-{distributed.rank()}", "w").close()
                    time.sleep(1000)
                launch(waits, nproc=2)
                """
            )
        )
        assert soon(lambda: len(list(tmp_path.glob("waiting-*"))) == 2)
        assert notebook.run("print(launch(distributed.rank, nproc=2))") == "[0, 1]\n"
        family = other.process.children(recursive=True)
        assert len(family) >= 6  # the server, a supervisor, two workers and a child of each
        other.process.kill()
        _, alive = psutil.wait_procs(family, timeout=600)
        assert not alive
    finally:
        other.close()


# --- GPUs -------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_workers_use_the_gpu_after_this_process_has() -> None:
    torch.ones(1, device="cuda")

    def function() -> Any:
        value = torch.full((1,), float(distributed.rank()), device="cuda")
        return distributed.sum(value) if distributed.world_size() > 1 else value

    # two processes only where there are two: NCCL takes one process a GPU
    count = min(2, torch.cuda.device_count())
    if count == 2:
        values = launch(function, nproc=2)
        assert [value.device.type for value in values] == ["cpu", "cpu"]
        assert [value.item() for value in values] == [1.0, 1.0]
        assert launch(lambda: torch.cuda.current_device(), nproc=2) == [0, 1]
    else:
        pytest.skip("needs two GPUs")


def test_one_worker_may_be_asked_for() -> None:
    """So that nothing of the call, a CUDA context for one, stays in this process."""
    assert launch(os.getpid, nproc=1) == [os.getpid()]
    (pid,) = launch(os.getpid, nproc=1, in_worker=True)
    assert pid != os.getpid()

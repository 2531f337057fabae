"""What went wrong on GPUs alone, each on the pretend pair; and the pair's own strictness.

One launch computes the findings of a group of tests, so each test costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kaggle_mgpu import launch
from kaggle_mgpu.parallel import Strategy
from pretend_cuda import watch
from pretend_cuda.gpu_tasks import Own

pytestmark = pytest.mark.usefixtures("gpus")


def findings(checks: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Run each check in a worker; return its value, or its error as text."""
    found = {}
    for name, check in checks.items():
        try:
            found[name] = check()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


# --- the pair itself ------------------------------------------------------------------------------------------------


def late_copy() -> list[bool]:
    target = torch.zeros(2).pin_memory()
    target.copy_(torch.ones(2, device="cuda"), non_blocking=True)
    before = bool(target.isnan().all())
    torch.cuda.synchronize()
    return [before, bool((target == 1).all())]


def seen_waits() -> list[str]:
    x = torch.ones(3, device="cuda")
    with watch.waits() as found:
        x.sum().item()
        torch.as_tensor(3, device="cuda")
        x.cpu()
        x[x > 0]
        x.to("cuda:1")
        x + 1
    return [wait.operation for wait in found]


def seen_streams() -> list[Any]:
    stream = torch.cuda.Stream()
    with watch.operations() as found, torch.cuda.stream(stream):
        torch.ones(3, device="cuda")
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    return [found[0][1:] == (0, stream.stream_id), found[-1] == ("wait_stream", 0, stream.stream_id, 0)]


def short_memory(error: str) -> str:
    watch.limit_memory(1, watch.used_memory(1) + 100, error)
    try:
        torch.ones(1000, device="cuda:1")
        return "no error"
    except RuntimeError as raised:
        return f"{type(raised).__name__}: {raised}"
    finally:
        watch.limit_memory(1, 1 << 40)


PAIR: dict[str, Callable[[], Any]] = {
    "two": lambda: [
        torch.cuda.device_count(),
        torch.ones(2, device="cuda:1").device.index,
        torch.cuda.get_device_name(),
    ],
    "garbage": lambda: bool(torch.empty(5, device="cuda").isnan().all()),
    "mixed GPUs": lambda: torch.ones(2, device="cuda:0") + torch.ones(2, device="cuda:1"),
    "mixed with the CPU": lambda: nn.Linear(2, 2).cuda()(torch.ones(1, 2)),
    "late copy": late_copy,
    "waits": seen_waits,
    "streams": seen_streams,
    "pinned": lambda: [torch.empty(3, pin_memory=True).is_pinned(), torch.empty(3).is_pinned()],
    "memory": lambda: {error: short_memory(error) for error in watch.MEMORY_ERRORS},
}


@pytest.fixture(scope="module")
def pair(gpus: None) -> dict[str, Any]:
    return launch(findings, PAIR, nproc=1, in_worker=True)[0]


EXPECTED = {
    "two": [2, 1, "Tesla T4"], "garbage": True, "late copy": [True, True], "streams": [True, True],
    "pinned": [True, False],
    "waits": ["item", "copy_ to a GPU", "copy_ to the CPU", "aten::nonzero", "aten::index"],
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_the_pretend_pair_behaves_as_cuda_does(pair: dict[str, Any], name: str) -> None:
    assert pair[name] == EXPECTED[name]


@pytest.mark.parametrize("name", ["mixed GPUs", "mixed with the CPU"])
def test_the_pretend_pair_refuses_mixed_devices(pair: dict[str, Any], name: str) -> None:
    assert "RuntimeError: Expected all tensors to be on the same device" in pair[name]


# --- skipping a step on the device ----------------------------------------------------------------------------------


def skipped_step(make: str, precision: str) -> dict[str, Any]:
    """Take three finite steps and an infinite one; compare weights and state before and after the last."""
    strategy = Strategy(
        lambda model, x: (model(x) * x).sum(), None, precision=precision, device=torch.device("cuda", 0)
    )
    torch.manual_seed(0)
    model = strategy.prepare(nn.Linear(4, 4))
    optimizer = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        "own": lambda p: Own(p, lr=0.1),
        "unfused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    }[make](model.parameters())

    def held() -> list[torch.Tensor]:
        state = [v.cpu().clone() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        return [p.detach().cpu().clone() for p in model.parameters()] + state

    def step(value: float) -> None:
        strategy.backward(torch.full((2, 4), value, device="cuda:0"), 1.0, lambda: 2)
        strategy.step(optimizer, max_norm=1.0)

    for _ in range(3):
        step(0.1)
    before = held()
    with watch.waits() as waits:
        step(float("inf"))
    after, skipped = held(), int(strategy.skipped)
    step(0.1)
    return {
        "same": all(map(torch.equal, before, after)),
        "skipped": skipped,
        "moves": not torch.equal(held()[0], after[0]) and bool(held()[0].isfinite().all()),
        "waits": len(waits),
    }


SKIPS = [
    (make, precision)
    for make in ("SGD", "momentum", "own", "unfused AdamW", "fused AdamW")
    for precision in ("fp32", "fp16")
]


@pytest.fixture(scope="module")
def skips(gpus: None) -> dict[str, Any]:
    checks = {f"{make} {precision}": (lambda m=make, p=precision: skipped_step(m, p)) for make, precision in SKIPS}
    return launch(findings, checks, nproc=1, in_worker=True)[0]


@pytest.mark.parametrize(("make", "precision"), SKIPS)
def test_a_step_with_an_infinite_gradient_changes_nothing(skips: dict[str, Any], make: str, precision: str) -> None:
    waits = 1 if make == "unfused AdamW" else 0  # its step counts are on the CPU, which must know
    expected = {"same": True, "skipped": 1, "moves": True}
    found = skips[f"{make} {precision}"]
    assert {name: found[name] for name in expected} == expected
    assert found["waits"] == 0 if waits == 0 else found["waits"] >= 1

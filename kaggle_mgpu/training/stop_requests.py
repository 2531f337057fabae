"""Turn the stop button's interrupt and SIGTERM into a request, which a loop checks after each step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Yield an event, set by the first SIGINT or SIGTERM; the same signal again has its usual effect.

    Outside the main thread no signal sets the event.
    """
    request = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals reach the main thread only
        return
    before: dict[int, Any] = {}

    process = os.getpid()

    def on_signal(number: int, frame: Any) -> None:
        if os.getpid() != process:
            return  # a loader process inherited this handler; its parent gets the signal too
        request.set()
        signal.signal(number, before[number])
        with contextlib.suppress(RuntimeError):  # the signal interrupted a print
            print("asked to stop: finishing the step and saving. Ask again to stop at once.", flush=True)

    for wanted in (signal.SIGINT, signal.SIGTERM):
        before[wanted] = signal.signal(wanted, on_signal)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

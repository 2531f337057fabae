"""How often the host waits for a GPU in training steps: not once between two records, whatever the optimizer.

pytest tests/pretend_cuda/test_host_waits.py -s    # prints the table
"""

from __future__ import annotations

from typing import Any

import pytest

from kaggle_mgpu import TrainConfig, launch, train
from pretend_cuda import watch
from pretend_cuda.gpu_tasks import Normalised

pytestmark = pytest.mark.usefixtures("gpus")

OPTIMIZERS, PRECISIONS = ("AdamW", "SGD", "own"), ("fp32", "fp16")


class Counted(Normalised):
    """Notes the waits of the host from the record of step 10 to that of step 20."""

    def __init__(self, optimizer: str, waits: list[watch.Wait]) -> None:
        super().__init__(optimizer)
        self.waits, self.marks = waits, [0]

    def val_data(self) -> Any:
        return None

    def on_record(self, record: dict[str, Any]) -> None:
        if record.get("kind") == "train":
            self.marks.append(len(self.waits))

    def found(self) -> list[str]:
        """The waits of ten steps, without those of the record itself, which reads the loss."""
        _, _, first, last, *_ = self.marks
        return [wait.place for wait in self.waits[first:last] if "training/log.py" not in wait.stack]


def count(folder: str, strategy: str) -> dict[str, list[str]]:
    """Train with each optimizer and precision in turn; return the waits of ten steps."""
    found = {}
    for optimizer in OPTIMIZERS:
        for precision in PRECISIONS:
            name = f"{optimizer} {precision}"
            settings = TrainConfig(
                output_dir=f"{folder}/{strategy} {name}", strategy=strategy, precision=precision, global_batch_size=16,
                max_steps=20, log_every=10, lr=0.01, ema_decay=0.9, max_norm=1.0, save_every=1000,
            )  # fmt: skip
            with watch.waits() as waits:
                task = Counted(optimizer, waits)
                train(settings, task)
                found[name] = task.found() if len(task.marks) > 2 else []
    return found


@pytest.fixture(scope="module")
def waits(gpus: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    folder = str(tmp_path_factory.mktemp("waits"))
    ranks = {"single": 1, "dp": 1, "ddp": 2}
    return {name: launch(count, folder, name, nproc=n, in_worker=True)[0] for name, n in ranks.items()}


@pytest.mark.parametrize("strategy", ["single", "dp", "ddp"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_host_never_waits_between_two_records(
    waits: dict[str, dict[str, list[str]]], strategy: str, optimizer: str, precision: str
) -> None:
    found = waits[strategy][f"{optimizer} {precision}"]
    print(f"\n{strategy:6} {optimizer:5} {precision}: {len(found) / 10:g} waits of the host a step")
    assert not found, "\n".join(sorted(set(found)))

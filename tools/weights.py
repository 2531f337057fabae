"""Print the sha256 of the final weights of a fixed task for each strategy, accumulation and precision.

    python tools/weights.py            # run it before and after a change that must not change numbers, and diff

Every run trains six steps of AdamW on uneven token counts, and evaluates once.
"""

import argparse
import contextlib
import hashlib
import io
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, installed or not

from kaggle_mgpu import Task, TrainConfig, launch, train

STRATEGIES = {
    "single": ("single", 1),
    "dp x2": ("dp", 2),
    "ddp x2": ("ddp", 2),
    "ddp x3": ("ddp", 3),
    "fsdp x2": ("fsdp", 2),
}


class Tokens(torch.utils.data.Dataset):
    """A dataset of 96 sequences with 12 tokens each and 1 to 12 loss terms."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, 32, (12,), generator=generator)
        return tokens, torch.arange(12) < 1 + index % 12


class Guess(Task):
    """Predict each token from itself."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(32, 48), nn.Linear(48, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32))

    def train_data(self) -> Tokens:
        return Tokens()

    def val_data(self) -> Tokens:
        return Tokens()

    def loss(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        tokens, mask = batch
        losses = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten(), reduction="none")
        return (losses * mask.flatten()).sum()

    def count(self, batch: list[Tensor]) -> int:
        return int(batch[1].sum())


def main() -> None:
    """Train every row of the matrix and print a line per row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="keep the runs' folders here")
    arguments = parser.parse_args()
    for name, (strategy, nproc) in STRATEGIES.items():
        for accumulation in (1, 3):
            for precision in ("fp32", "bf16"):
                with tempfile.TemporaryDirectory() as temporary:
                    folder = (arguments.keep or Path(temporary)) / f"{strategy}-{nproc}-{accumulation}-{precision}"
                    config = TrainConfig(
                        strategy=strategy,  # type: ignore[arg-type]
                        nproc=nproc,
                        global_batch_size=36,
                        gradient_accumulation_steps=accumulation,
                        precision=precision,
                        max_steps=6,
                        lr=1e-2,
                        ema_decay=0.9,
                        output_dir=str(folder),
                        resume="never",
                        seed=3,
                    )
                    with contextlib.redirect_stdout(io.StringIO()):
                        launch(train, config, Guess())
                    weights = (folder / "model.safetensors").read_bytes()
                digest = hashlib.sha256(weights).hexdigest()
                print(f"{name:8} accumulation {accumulation} {precision}  {digest}", flush=True)


if __name__ == "__main__":
    main()

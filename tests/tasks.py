"""Small tasks that the tests train; importable by worker processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, TensorDataset

from kaggle_mgpu import Task, TrainConfig, distributed


class Regression(Task):
    """A sine of a sum: 8 numbers in, one out, and one loss term per sample."""

    def __init__(self, samples: int = 500, val_samples: int = 77, dropout: float = 0.0) -> None:
        self.samples, self.val_samples, self.dropout = samples, val_samples, dropout

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(16, 1))

    def data(self, seed: int, samples: int) -> Dataset[Any]:
        x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(x, (x.sum(1, keepdim=True) / 4).sin())

    def train_data(self) -> Dataset[Any]:
        return self.data(0, self.samples)

    def val_data(self) -> Dataset[Any] | None:
        return self.data(1, self.val_samples) if self.val_samples else None

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return (model(x) - y).square().sum()


class Sequences(Dataset[dict[str, Tensor]]):
    """Token sequences, padded; `length` says how many are real: most have 1 to 3 and repeat, few have 24 and count up.

    So a mean over sequences, micro-batches or ranks is quite another figure than the mean over tokens.
    """

    def __init__(self, samples: int = 100) -> None:
        generator = torch.Generator().manual_seed(5)
        long = torch.rand(samples, generator=generator) < 0.2
        self.lengths = torch.where(long, 24, torch.randint(1, 4, (samples,), generator=generator))
        first = torch.randint(0, 11, (samples, 1), generator=generator)
        self.tokens = (first + torch.arange(25) * long[:, None]) % 11

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[index], "length": self.lengths[index]}


class NextToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of each real token of a batch: float[number of real tokens]."""
    tokens, length = batch["tokens"], batch["length"]
    logits = model(tokens[:, :-1])
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    real = torch.arange(tokens.shape[1] - 1, device=tokens.device) < length[:, None]
    return losses[real.flatten()]


class Language(Task):
    """Uneven token counts, SGD: a gradient of the wrong scale shows at once, which Adam would hide."""

    unit = "tokens"

    def __init__(self, samples: int = 100) -> None:
        self.samples = samples

    def model(self) -> nn.Module:
        return NextToken()

    def train_data(self) -> Dataset[Any]:
        return Sequences(self.samples)

    def val_data(self) -> Dataset[Any] | None:
        return Sequences(31)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return token_losses(model, batch).sum()

    def count(self, batch: Any) -> int:
        return int(batch["length"].sum())

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=config.lr)


class Images(Language):
    """Small images for a network with BatchNorm."""

    unit = "samples"

    def model(self) -> nn.Module:
        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.Tanh()]

        # without weights too: such layers have statistics all the same
        head = [nn.BatchNorm2d(8, affine=False), nn.Flatten(), nn.Linear(32, 5)]
        return nn.Sequential(*block(1, 4), *block(4, 8), *head)

    def train_data(self) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(5)
        scale = torch.rand(self.samples, 1, 1, 1, generator=generator) * 3
        images = torch.randn(self.samples, 1, 6, 6, generator=generator) * scale + scale
        return TensorDataset(images, torch.randint(0, 5, (self.samples,), generator=generator))

    def val_data(self) -> Dataset[Any] | None:
        return None

    def count(self, batch: Any) -> int:
        return len(batch[0])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


class Pairs(Images):
    """Two views of each sample, to be told from the views of all others: the loss of SimCLR."""

    whole_batch_loss = True

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 8))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        views = [nn.functional.normalize(model(view)) for view in (batch[0], batch[0].flip(3))]
        (first, own), (second, _) = map(distributed.gather_with_gradients, views)
        places = torch.arange(own.start, own.stop)
        total = torch.zeros(())
        for mine, theirs in ((first, second), (second, first)):
            others = (mine[own] @ mine.T / 0.5).index_put((torch.arange(len(places)), places), torch.tensor(-1e9))
            logits = torch.cat([mine[own] @ theirs.T / 0.5, others], 1)
            total = total + nn.functional.cross_entropy(logits, places, reduction="sum") / 2
        return total


class MeanOfMeans(Language):
    """What most loops do: each micro-batch's mean, averaged over micro-batches and ranks."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return token_losses(model, batch).mean()

    def count(self, batch: Any) -> int:
        return 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.hidden = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.hidden(self.norm(x)))


class Tied(nn.Module):
    """Blocks in a list, a head that shares the embedding's weights, and buffers: one saved, one not."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(16, 11)
        self.head.weight = self.embedding.weight
        self.register_buffer("shift", torch.randn(16))
        self.register_buffer("unsaved", torch.randn(16), persistent=False)
        self.checkpointing = False

    def gradient_checkpointing_enable(self) -> None:
        self.checkpointing = True

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.shift + self.unsaved
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(x)


class TiedLanguage(Language):
    """The same task with a deeper model, and AdamW as the kit has it."""

    def __init__(self, samples: int = 100, val_samples: int = 31) -> None:
        super().__init__(samples)
        self.val_samples = val_samples
        self.made_on: list[str] = []

    def model(self) -> nn.Module:
        model = Tied()
        self.made_on.append(model.head.weight.device.type)
        return model

    def val_data(self) -> Dataset[Any] | None:
        return Sequences(self.val_samples)

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        return Task.optimizer(self, model, config)

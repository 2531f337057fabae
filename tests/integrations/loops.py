"""Small runs of other libraries' loops, with dropout and augmentation, that can be killed after a step."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kaggle_mgpu import distributed

STEPS = 12
TRAINING: dict[str, Any] = {
    "num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 4,
    "logging_steps": 1, "use_cpu": True, "dataloader_num_workers": 1, "report_to": [], "disable_tqdm": True,
    "learning_rate": 1e-2,
}  # fmt: skip
asked = False


class Augmented(Dataset[Any]):
    """Samples that draw from all three global random generators."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randn(8, generator=torch.Generator().manual_seed(int(index)))
        noisy = x * (0.5 + random.random()) + 0.1 * torch.randn(8) + float(numpy.random.rand())
        return {"x": noisy, "labels": x.sum()[None]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.net(x)
        return {"loss": (out - labels).square().mean(), "logits": out}


def network() -> Net:
    torch.manual_seed(0)
    return Net()


def weights(*models: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])


def maybe_end(step: int, kill: int | None) -> None:
    """Kill this rank after a step, by SIGKILL, if it is rank 1."""
    if step == kill and distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def maybe_ask_to_stop(step: int, stop: int | None) -> None:
    """Interrupt this rank after a step, once, if it is rank 1; the stop button interrupts all."""
    global asked
    if step == stop and distributed.rank() == 1 and not asked:
        asked = True
        os.kill(os.getpid(), signal.SIGINT)


def with_trainer(folder: str, kill: int | None = None, stop: int | None = None, limit: float | None = None) -> Any:
    from transformers import Trainer, TrainingArguments

    return kept_trainer(
        lambda callbacks: Trainer(
            network(), TrainingArguments(folder, **TRAINING), train_dataset=Augmented(), callbacks=callbacks
        ), folder, kill, stop, limit,
    )  # fmt: skip


def kept_trainer(make: Any, folder: str, kill: int | None, stop: int | None, limit: float | None) -> Any:
    from transformers import TrainerCallback

    from kaggle_mgpu.integrations.transformers import SessionCallback, find_checkpoint

    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            maybe_end(state.global_step, kill)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            maybe_ask_to_stop(state.global_step, stop)

    # transformers 5.0, Kaggle's, loads a rank's optimizer to "cpu:0", which torch does not know; "cuda:0" it does
    torch.serialization.register_package(11, lambda _: None, lambda obj, place: obj if place == "cpu:0" else None)
    keeper = SessionCallback(time_limit=limit)
    trainer = make([keeper, Ends()])
    trainer.train(resume_from_checkpoint=find_checkpoint(folder))
    return keeper.finished, trainer.state.global_step, weights(trainer.model)


def with_trl(folder: str, kill: int | None = None, stop: int | None = None, limit: float | None = None) -> Any:
    """Fine-tune a Llama from random weights, with dropout, on token lists of many lengths."""
    from datasets import Dataset as Table
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({str(number): number for number in range(32)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
    table = Table.from_dict({"input_ids": [[2 + (i * j) % 30 for j in range(3 + i % 7)] for i in range(1, 49)]})
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        attention_dropout=0.3, pad_token_id=0, eos_token_id=1,
    ))  # fmt: skip
    args = SFTConfig(folder, bf16=False, gradient_checkpointing=False, **TRAINING)
    return kept_trainer(
        lambda callbacks: SFTTrainer(
            model, args, train_dataset=table, processing_class=tokenizer, callbacks=callbacks
        ), folder, kill, stop, limit,
    )  # fmt: skip


def with_accelerate(folder: str, kill: int | None = None, stop: int | None = None, limit: float | None = None) -> Any:
    from accelerate import Accelerator

    from kaggle_mgpu.integrations.accelerate import Session

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    prepared, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(Augmented(), 2, shuffle=True, num_workers=1)
    )
    with Session(accelerator, folder, max_steps=STEPS, time_limit=limit) as session:
        for batch in session.batches(loader):
            with accelerator.accumulate(prepared):
                loss = prepared(**batch)["loss"]
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            session.step(loss)
            if session.steps_taken in (4, 8):
                session.save()
            if accelerator.sync_gradients:
                maybe_end(session.steps_taken, kill)
                maybe_ask_to_stop(session.steps_taken, stop)
    return session.finished, session.steps_taken, weights(model)


def after_step(run: Any, kill: int | None, stop: int | None) -> None:
    """Save a watched run after two of its steps, to the end, which else comes during the next steps; kill, or stop."""
    if run.steps_taken in (4, 8):
        run.save()
        run.session.progress.note("saved")
        if distributed.is_main():
            run._checkpoints.wait()
        distributed.barrier()
    maybe_end(run.steps_taken, kill)
    maybe_ask_to_stop(run.steps_taken, stop)


def by_hand(folder: str, kill: int | None = None, stop: int | None = None, limit: float | None = None) -> Any:
    """A GAN with two optimizers and a schedule, in plain DistributedDataParallel."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data.distributed import DistributedSampler

    from kaggle_mgpu.integrations import watch

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 8))
    critic = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))
    generator_adam = torch.optim.AdamW(generator.parameters(), 1e-2)
    critic_adam = torch.optim.AdamW(critic.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(generator_adam, 30)
    data = Augmented()
    loader = DataLoader(data, 4, sampler=DistributedSampler(data), num_workers=1)
    g, c = DistributedDataParallel(generator), DistributedDataParallel(critic)
    with watch(
        folder, max_steps=STEPS, time_limit=limit, generator=g, critic=c, generator_adam=generator_adam,
        critic_adam=critic_adam, schedule=schedule,
    ) as run:  # fmt: skip
        for batch in run.batches(loader):
            fake = g(torch.randn(len(batch["x"]), 4))
            critic_loss = c(fake.detach()).mean() - c(batch["x"]).mean()
            critic_loss.backward()
            critic_adam.step()
            critic_adam.zero_grad()
            loss = -c(g(torch.randn(len(batch["x"]), 4))).mean()
            loss.backward()
            generator_adam.step()
            generator_adam.zero_grad()
            critic_adam.zero_grad()
            schedule.step()
            run.step(loss, critic=critic_loss)
            after_step(run, kill, stop)
    dist.destroy_process_group()
    return run.finished, run.steps_taken, weights(generator, critic)


def plain_loop(folder: str, kill: int | None = None, stop: int | None = None, limit: float | None = None) -> Any:
    """A loop without DistributedDataParallel, which averages the gradients itself."""
    import torch.distributed as dist
    from torch.utils.data import Subset

    from kaggle_mgpu.integrations import watch

    dist.init_process_group()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    share = Subset(Augmented(), range(dist.get_rank(), 48, dist.get_world_size()))
    loader = DataLoader(share, 4, shuffle=True, num_workers=1)
    with watch(folder, max_steps=STEPS, time_limit=limit, model=model, optimizer=optimizer) as run:
        for batch in run.batches(loader):
            loss = model(**batch)["loss"]
            loss.backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
            optimizer.step()
            optimizer.zero_grad()
            run.step(loss)
            after_step(run, kill, stop)
    return run.finished, run.steps_taken, weights(model)


def with_lightning(folder: str, kill: int | None = None, stop: int | None = None, limit: float | None = None) -> Any:
    import lightning

    from kaggle_mgpu.integrations.lightning import SessionCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    class Ends(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step in (4, 8):
                keeper.save(trainer)
            maybe_end(trainer.global_step, kill)

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            maybe_ask_to_stop(trainer.global_step, stop)

    keeper = SessionCallback(folder, time_limit=limit)
    trainer = lightning.Trainer(
        devices=distributed.local_world_size(), strategy="ddp", accelerator="cpu", max_epochs=2, logger=False,
        accumulate_grad_batches=2, callbacks=[keeper, Ends()], enable_checkpointing=False, enable_progress_bar=False,
        log_every_n_steps=1, enable_model_summary=False,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, DataLoader(Augmented(), 2, shuffle=True, num_workers=1), ckpt_path=keeper.find_checkpoint())
    return keeper.finished, trainer.global_step, weights(module)


def with_fabric(folder: str, kill: int | None = None, stop: int | None = None, limit: float | None = None) -> Any:
    from lightning.fabric import Fabric

    from kaggle_mgpu.integrations import watch

    fabric = Fabric(accelerator="cpu", devices=distributed.local_world_size(), strategy="ddp")
    fabric.launch()
    net = network()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), 1e-2))
    loader = fabric.setup_dataloaders(DataLoader(Augmented(), 4, shuffle=True, num_workers=1))
    with watch(folder, max_steps=STEPS, time_limit=limit, model=model, optimizer=optimizer) as run:
        for batch in run.batches(loader):
            loss = model(**batch)["loss"]
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            run.step(loss)
            after_step(run, kill, stop)
    assert fabric.world_size == distributed.world_size()
    return run.finished, run.steps_taken, weights(net)

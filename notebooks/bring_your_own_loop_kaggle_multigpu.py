# %% [markdown]
# # Your own loop on every GPU
# This notebook runs three common training loops on all GPUs of the session: a transformers Trainer, an accelerate loop
# and a plain DistributedDataParallel script. `launch` starts each loop; each stops and saves before the session ends,
# and the next session resumes it exactly. Then `launch_each` runs several small trainings, one per GPU at a time. The
# models are small and start from random weights.
# On Kaggle: Settings > Accelerator > GPU T4 x2, then Run All. No internet is needed.

# %% [markdown]
# The next cell carries the library, `kaggle_mgpu`, so that this notebook is one file. There is nothing to edit in it.

# %% tags=["payload"]
# tools/notebooks.py build puts the package here. Run from a checkout, this source needs nothing in this cell.

# %%
from kaggle_mgpu import env

env.fix()  # before anything else is imported

import json
from pathlib import Path

from kaggle_mgpu import devices, launch, launch_each, notebook_parameters

print(devices.report())

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
# Parameters of this notebook
output_dir = "bring_your_own_loop"
steps = 60  # of each loop
width = 64  # of the models
samples = 2048  # of the synthetic data
folds = 4  # small trainings, one per GPU at a time
nproc = "auto"  # processes; auto: one per GPU
time_limit = None  # "45m", "3h": stop in good order after this long; None: shortly before the session ends
seed = 7

# %%
# The names defined in the cell above, and in papermill's cell after it. A misspelt name is an error.
given = notebook_parameters(globals())
own = ("output_dir", "steps", "width", "samples", "folds", "nproc", "time_limit", "seed")
if unknown := set(given) - set(own):
    raise ValueError(f"unknown parameters {sorted(unknown)}: expected {', '.join(own)}")

# %% [markdown]
# ## The model and the data of all three
# The model classifies noisy sine waves of three frequencies. The noise is drawn anew for each sample and each epoch.


# %%
def model():
    import torch
    from torch import nn

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 3))

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(seed)
    return Classifier()


def data():
    import torch
    from torch.utils.data import Dataset

    class Waves(Dataset):
        def __len__(self):
            return samples

        def __getitem__(self, index):
            wave = torch.sin(torch.arange(32) * (0.2 + 0.2 * (index % 3)) + index)
            return {"x": wave + 0.5 * torch.randn(32), "labels": torch.tensor(index % 3)}

    return Waves()


# %% [markdown]
# ## transformers' Trainer
# A usual script with two changes: the callback, and the checkpoint to resume from.


# %%
def with_trainer(folder):
    import torch
    from transformers import Trainer, TrainingArguments

    from kaggle_mgpu.integrations.transformers import SessionCallback, find_checkpoint

    keeper = SessionCallback(time_limit=time_limit)
    args = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=16, logging_steps=20, report_to=[], disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), seed=seed, learning_rate=1e-3,
    )  # fmt: skip
    trainer = Trainer(model(), args, train_dataset=data(), callbacks=[keeper])
    trainer.train(resume_from_checkpoint=find_checkpoint(folder))
    return keeper.finished


trainer_finished = launch(with_trainer, f"{output_dir}/trainer", nproc=nproc)

# %% [markdown]
# ## A loop with accelerate
# `session.batches` replaces the two loops over epochs and batches, and continues where the run was interrupted.


# %%
def with_accelerate(folder):
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    from kaggle_mgpu.integrations.accelerate import Session

    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network, optimizer, loader = accelerator.prepare(network, optimizer, DataLoader(data(), 16, shuffle=True))
    with Session(accelerator, folder, max_steps=steps, seed=seed, time_limit=time_limit) as session:
        for batch in session.batches(loader):
            with accelerator.accumulate(network):
                loss = network(**batch)["loss"]
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            session.step(loss)
    return session.finished


accelerate_finished = launch(with_accelerate, f"{output_dir}/accelerate", nproc=nproc)

# %% [markdown]
# ## A plain DistributedDataParallel script
# The script is written as for torchrun, and makes its own process group. `watch` saves and restores the model, the
# optimizer and the place in the data.


# %%
def by_hand(folder):
    import os

    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler

    from kaggle_mgpu import watch

    dist.init_process_group()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    network = DistributedDataParallel(model().to(device))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    waves = data()
    loader = DataLoader(waves, 16, sampler=DistributedSampler(waves))
    kept = {"model": network, "optimizer": optimizer}
    with watch(folder, max_steps=steps, seed=seed, time_limit=time_limit, **kept) as run:
        for batch in run.batches(loader):
            loss = network(batch["x"].to(device), batch["labels"].to(device))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step(loss)
    dist.destroy_process_group()
    return run.finished


by_hand_finished = launch(by_hand, f"{output_dir}/by_hand", nproc=nproc, in_worker=True)

# %% [markdown]
# ## One job per GPU
# Several small models train faster on a GPU each than one after the other on all GPUs. Each fold here trains without a
# part of the samples, and is tested on this part.


# %%
def fold(number):
    import torch

    waves = data()
    rows = [waves[index] for index in range(min(samples, 512))]
    x, y = torch.stack([row["x"] for row in rows]), torch.stack([row["labels"] for row in rows])
    held_out = torch.arange(len(x)) % folds == number
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(steps):
        network(x[~held_out], y[~held_out])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()
    return (network(x, y)["logits"].argmax(1) == y)[held_out].double().mean().item()


accuracy = launch_each(fold, range(folds), output_dir=f"{output_dir}/folds")
print("accuracy of each fold:", accuracy)

# %%
loops = {"trainer": trainer_finished, "accelerate": accelerate_finished, "by_hand": by_hand_finished}
complete = all(all(ranks) for ranks in loops.values()) and None not in accuracy
result = {"finished": complete, "step": 3 * steps if complete else 0, "max_steps": 3 * steps}
result |= {
    "reason": "finished" if complete else "stopped early: run the same again",
    "metrics": {"accuracy": sum(filter(None, accuracy)) / folds},
}
result["world_size"] = len(by_hand_finished)
Path(output_dir, "result.json").write_text(json.dumps(result, indent=1))
print(result)

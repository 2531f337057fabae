# %% [markdown]
# # Does this machine train right?
# This notebook checks in ten seconds whether the GPUs of this session compute correctly, communicate, and give the same
# gradient together as one GPU alone. Then it measures with a small transformer how much faster a second GPU makes
# training.
# On Kaggle: Settings > Accelerator > GPU T4 x2, then Run All. No internet is needed.

# %% [markdown]
# The next cell carries the library, `kaggle_mgpu`, so that this notebook is one file. There is nothing to edit in it.

# %% tags=["payload"]
# tools/notebooks.py build puts the package here. Run from a checkout, this source needs nothing in this cell.

# %%
from kaggle_mgpu import env

env.fix()  # before anything else is imported

import torch
from torch import nn
from torch.utils.data import TensorDataset

from kaggle_mgpu import Task, TrainConfig, check, compare_strategies, devices, notebook_parameters, plan

print(devices.report())

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
# Parameters of this notebook
output_dir = "check_gpus"  # checked for space; result.json is written there
compare = "auto"  # measure single, dp and ddp: True, False, or "auto": only where there is a GPU
steps = 20  # of each strategy
proof = False  # True: eight minutes of tests that need GPUs; their figures go to gpu_proof.json
plan_on = None  # plan for "T4x2", "L4x4", "A100", "H100"; None: for what is here, or T4x2 where there is no GPU
depth = 8  # of the transformer that is measured: blocks,
width = 256  # numbers per token,
heads = 8
length = 512  # and tokens per sample
global_batch_size = 64
max_steps = 2000  # of the run that is planned

# %%
# The names defined in the cell above, and in papermill's cell after it. A misspelt name is an error.
parameters = notebook_parameters(globals())
own = ("compare", "steps", "proof", "plan_on", "depth", "width", "heads", "length")
compare, steps, proof, plan_on, depth, width, heads, length = (parameters.pop(name) for name in own)
config = TrainConfig.from_dict(parameters)
gpus = devices.gpus()

# %% [markdown]
# ## The check
# Each line passed, failed or was skipped, with advice where needed. The GPU tests run in other processes, so the
# notebook itself takes no GPU memory.

# %%
report = check.run(output_dir)
report

# %% [markdown]
# ## What a run takes
# An estimate before a GPU hour is spent: batch, memory, time, number of sessions, share of the week's quota, and the
# expected speed-up from a second GPU.


# %%
class Guessing(Task):
    """A transformer that guesses random tokens: all the work of training, and nothing to learn."""

    unit = "tokens"

    def model(self):
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        body = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        return nn.Sequential(nn.Embedding(1024, width), body, nn.Linear(width, 1024))

    def train_data(self):
        return TensorDataset(torch.randint(1024, (4096, length + 1)))

    def loss(self, model, batch):
        (tokens,) = batch
        logits = model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")

    def count(self, batch):
        return batch[0][:, 1:].numel()


task = Guessing()
print(plan(config, task, on=plan_on or (None if gpus else "T4x2")))

# %% [markdown]
# ## The gain from a second GPU
# The same steps with the same global batch on one GPU (single), with one process for all GPUs (dp), and with one
# process per GPU (ddp).

# %%
rows = []
if compare is True or (compare == "auto" and gpus):
    rows = compare_strategies(config, task, steps=steps)
else:
    print("Not measured: there is no GPU. Set compare = True to try it on the CPU.")

# %% [markdown]
# ## Proof
# With `proof = True` the GPUs are tested further: every precision against the CPU, resuming after a kill, running out
# of memory, the CPU's waits for the GPU, the speed of a step against a hand-written loop, two ranks on one GPU, and
# both GPUs together. gpu_proof.json has all figures.

# %%
if proof:
    from kaggle_mgpu.planning import gpu_proof

    gpu_proof.run(f"{output_dir}/gpu_proof.json")
else:
    print("Not run: set proof = True on a machine with GPUs.")

# %%
print(report.save(output_dir, metrics={row.strategy: row.samples_per_s for row in rows}))

# %% [markdown]
# # Does this machine train right?
#
# Ten seconds that say whether the GPUs of this session compute, talk to each other and give the same gradient together
# as one of them alone; then what a second GPU buys, measured with a small transformer.
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
compare = "auto"  # measure single, dp and ddp: True, False, or auto, where there is a GPU
steps = 20  # of each strategy
proof = False  # True: eight minutes of tests that only real GPUs can run; figures go to gpu_proof.json, for a report
plan_on = None  # plan for "T4x2", "L4x4", "A100", "H100"; None: for what is here, or T4x2 where there is no GPU
depth = 8  # of the transformer that is measured: blocks,
width = 256  # numbers per token,
heads = 8
length = 512  # and tokens per sample
global_batch_size = 64
max_steps = 2000  # of the run that is planned

# %%
# What the cell above defines, and the one that papermill puts after it. A misspelt name is an error.
parameters = notebook_parameters(globals())
own = ("compare", "steps", "proof", "plan_on", "depth", "width", "heads", "length")
compare, steps, proof, plan_on, depth, width, heads, length = (parameters.pop(name) for name in own)
config = TrainConfig.from_dict(parameters)
gpus = devices.gpus()

# %% [markdown]
# ## The check
#
# Each line passed, failed or was skipped, and says what to do. This notebook's own process stays clean of CUDA.

# %%
report = check.run(output_dir)
report

# %% [markdown]
# ## What a run takes
#
# Before a GPU hour is spent: batch, memory, time, sessions, quota, and what a second GPU is expected to buy.


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
# ## What a second GPU buys
#
# The same steps on the same global batch, one GPU (single), one process for all (dp), one process each (ddp).

# %%
rows = []
if compare is True or (compare == "auto" and gpus):
    rows = compare_strategies(config, task, steps=steps)
else:
    print("Not measured: there is no GPU. Set compare = True to try it on the CPU.")

# %% [markdown]
# ## Proof
#
# With `proof = True`: every precision against the CPU, resume after a kill, memory that runs out, waits of the host,
# the kit's step beside a loop by hand, two ranks on one GPU, and both GPUs together. The file holds all figures.

# %%
if proof:
    from kaggle_mgpu.planning import gpu_proof

    gpu_proof.run(f"{output_dir}/gpu_proof.json")
else:
    print("Not run: set proof = True on a machine with GPUs.")

# %%
print(report.save(output_dir, metrics={row.strategy: row.samples_per_s for row in rows}))

# %% [markdown]
# # Text generation on two GPUs
#
# This notebook trains a small GPT from scratch on your text, on every GPU of the session, and lets it write.
# On Kaggle: Settings > Accelerator > GPU T4 x2, then Run All. No internet is needed.
# Add text files (.txt, .jsonl, .parquet) as an input; the notebook finds them. Without such an input it reads the books
# on Kaggle's image (Gutenberg, 12 MB), on other machines Python's help topics.

# %% [markdown]
# The next cell carries the library, `kaggle_mgpu`, so that this notebook is one file. There is nothing to edit in it.

# %% tags=["payload"]
# tools/notebooks.py build puts the package here. Run from a checkout, this source needs nothing in this cell.

# %%
from kaggle_mgpu import env

env.fix()  # before anything else is imported

import math

from kaggle_mgpu import compare_strategies, devices, launch, notebook_parameters, train
from kaggle_mgpu.recipes.text_generation import Config, TextGeneration, baselines

# %matplotlib inline
print(devices.report())

# %% [markdown]
# ## Parameters
# `global_batch_size` counts blocks of `block_size` tokens per optimizer step over all GPUs, so results do not depend on
# the number of GPUs. (`"per_gpu:64"` makes it 64, 128 or 256 on one, two or four GPUs, and results depend on their
# number.)
# Any other field of `Config` can be set in this cell too. Papermill sets fields with `-p epochs 5`.

# %% tags=["parameters"]
# Parameters of this notebook
data_path = None  # a file or folder of text; None: the largest folder of text files among the inputs
tokenizer = "auto"  # auto, byte or bpe
n_layer = 8
n_head = 8
n_embd = 256
block_size = 512
epochs = 20
max_steps = None  # instead of epochs, when given
global_batch_size = 64
micro_batch_size = None  # blocks per forward pass on one GPU; None: global_batch_size shared out
lr = "auto"  # or a number; auto: 1e-3 for n_embd 256, twice as much for half the width
strategy = "auto"  # auto, single, dp or ddp
nproc = "auto"  # processes; auto: one per GPU
precision = "auto"  # auto, fp32, fp16 or bf16
eval_every = "epoch"  # steps, epoch or end
log_every = 10
time_limit = None  # "45m", "3h": stop in good order after this long; None: shortly before the session ends
output_dir = "text_generation"
seed = 1337
prompts = ["The ", "A class is", "When an exception is raised, "]
max_new_tokens = 200
compare_steps = 10  # steps to compare one and several GPUs, where there are several; 0: not compared

# %%
# The names defined in the cell above, and in papermill's cell after it. A name unknown to Config is an error.
parameters = notebook_parameters(globals())
prompts, max_new_tokens = parameters.pop("prompts"), parameters.pop("max_new_tokens")
compare_steps = parameters.pop("compare_steps")
config = Config.from_dict(parameters)
task = TextGeneration(config)
print(task.describe())

# %%
if compare_steps and len(devices.gpus()) > 1:
    compare_strategies(config, task, steps=compare_steps)  # one GPU, one process for all, one process each

# %% [markdown]
# ## Training
# If the session ends early, little is lost: run the notebook again, and training continues from the newest checkpoint,
# also on another number of GPUs. A finished run returns at once.

# %%
result = launch(train, config, task)
print(f"step {result.step} of {result.max_steps} ({result.reason}), {result.seconds:.0f} s of training")

# %%
result.plot()

# %% [markdown]
# ## How good is it?
# Loss on held-out text in nats per token, compared with two tables: how often each token occurs (unigram), and how
# often it follows the token before (bigram). Bits per byte can be compared across tokenizers.

# %%
if result.metrics:
    counted = baselines(task)
    rows = {name: (counted[name], counted[f"{name}_bits_per_byte"]) for name in ("unigram", "bigram")}
    rows["this model"] = (result.metrics["loss"], result.metrics["bits_per_byte"])
    print(f"{'':10}  validation loss  perplexity  bits per byte")
    for name, (loss, bits) in rows.items():
        print(f"{name:10}  {loss:15.3f}  {math.exp(loss):10.1f}  {bits:13.3f}")
    print(f"The best of the run, whose weights write below: {result.best:.3f}")
else:
    print("Nothing was evaluated yet.")

# %% [markdown]
# ## Let it write
# First, texts written at several evaluations during the run, all with the same beginning; then texts by the best
# weights from your own prompts.

# %%
samples = [(record["step"], record["sample"]) for record in result.records() if "sample" in record]
for step, text in samples[:: max(1, len(samples) // 6)]:
    print(f"step {step:6,}: {text!r}")

# %%
model = result.load(task.model(), "best")
for number, prompt in enumerate(prompts):
    print(task.sample(model, prompt, max_new_tokens=max_new_tokens, seed=seed + number))
    print("-" * 80)

# %% [markdown]
# ## What is where
# To continue later, run this notebook again with the same parameters. On Kaggle, a new session starts with an empty
# working folder: add this notebook's own earlier output as an input, and the run is found there.

# %%
print(result.files({"best/model.safetensors": "the weights with the lowest validation loss"}))

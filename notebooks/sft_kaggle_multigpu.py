# %% [markdown]
# # Fine-tuning a language model on two GPUs
# This notebook teaches a language model to answer as your examples do, on every GPU of the session: with LoRA adapters,
# with adapters on 4-bit weights (QLoRA), or by training all weights.
# On Kaggle: Settings > Accelerator > GPU T4 x2, Add Input > Models, put the model's folder below, then Run All. No
# internet is needed, except for QLoRA's bitsandbytes.
#
# Without a model and examples it makes a tiny model on the spot, with random weights, and teaches it what the functions
# of Python's standard library do: to see that everything works, on a CPU too.

# %% [markdown]
# The next cell carries the library, `kaggle_mgpu`, so that this notebook is one file. There is nothing to edit in it.

# %% tags=["payload"]
# tools/notebooks.py build puts the package here. Run from a checkout, this source needs nothing in this cell.

# %%
from kaggle_mgpu import env

env.fix()  # before anything else is imported


import torch

from kaggle_mgpu import devices, launch, notebook_parameters, train
from kaggle_mgpu.recipes.sft import Config, Finetune

# %matplotlib inline
print(devices.report())

# %% [markdown]
# ## Parameters
# A sample is a pack of several conversations, up to `max_length` tokens together. `global_batch_size` counts packs per
# optimizer step over all GPUs, so results do not depend on the number of GPUs. For a real model, begin with `lr = 2e-4`
# and `tuning = "auto"` (LoRA) or `"qlora"`. Any other field of `Config` can be set in this cell too.

# %% tags=["parameters"]
# Parameters of this notebook
model = None  # a model's folder, or the end of one among the inputs; None: a tiny one with random weights
tuning = "auto"  # lora, qlora or full; auto: lora, and full for the tiny model
data_path = None  # .jsonl, .json, .csv or .parquet conversations, or a folder of them; None: the largest such input
max_length = 256
packing = True  # False for models that cannot keep packed conversations apart; an error says so
lora_rank = 16
epochs = 4
max_steps = None  # instead of epochs, when given
global_batch_size = 8
micro_batch_size = None  # packs per forward pass on one GPU; "auto": as many as fit
gradient_checkpointing = False  # True: less memory, a third slower
lr = 4e-3  # for the tiny model's random weights; 2e-4 for adapters on a real one
strategy = "auto"
nproc = "auto"  # processes; auto: one per GPU
precision = "auto"  # auto, fp32, fp16 or bf16
eval_every = "epoch"  # steps, epoch or end
eval_generate_samples = 16  # held-out questions that are answered at each evaluation, for ROUGE-L
max_new_tokens = 40
log_every = 10
time_limit = None  # "45m", "3h": stop in good order after this long; None: shortly before the session ends
output_dir = "sft"
seed = 1337

# %%
# The names defined in the cell above, and in papermill's cell after it. A name unknown to Config is an error.
config = Config.from_dict(notebook_parameters(globals()))
task = Finetune(config)
print(task.describe())

# %% [markdown]
# ## Before
# The model before training: its loss on held-out answers, and its answers to a few held-out questions.

# %%
untrained = task.untrained()
before = task.evaluate(untrained)
answers_before = task.answers(untrained)
del untrained  # frees its memory for training
if torch.cuda.is_available():
    torch.cuda.empty_cache()
print({name: round(value, 4) for name, value in before.items()})

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
# ## After
# Held-out loss in nats per token of an answer, compared with a table of how often each token occurs in the training
# answers (unigram). ROUGE-L compares the words of an answer with the expected answer; 1 means the same words.

# %%
tuned = task.load(result)
after = task.evaluate(tuned)
print(f"{'':18}  loss   perplexity  ROUGE-L")
if after:
    print(f"{'unigram table':18}  {task.unigram_loss():.3f}")
    for name, found in {"model before": before, "model after (best)": after}.items():
        print(f"{name:18}  {found['loss']:.3f}  {found['perplexity']:<10.1f}  {found.get('rouge_l', 0):.3f}")
else:
    print("Nothing was held out.")

# %%
for (question, expected, earlier), (_, _, now) in list(zip(answers_before, task.answers(tuned), strict=False))[:6]:
    print(f"{' '.join(question.split())}\n  expected: {expected}\n  before:   {earlier[:100]!r}\n  after:    {now}\n")

# %% [markdown]
# ## What is where
#
# The adapter is in peft's own format: `PeftModel.from_pretrained(base, folder)` loads it anywhere. One model without
# adapters: `!python -m kaggle_mgpu merge OUTPUT_DIR --dtype fp16 --to FOLDER` in a cell.

# %%
folder = task.export(result)
print((folder / "README.md").read_text())
print(
    result.files(
        {
            "adapter": "the adapter, tokenizer and model card, for plain peft",
            "README.md": "the model card",
            "model.safetensors": "the final weights that were trained",
            "best/model.safetensors": "those with the lowest held-out loss",
        }
    )
)

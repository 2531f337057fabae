# %% [markdown]
# # Camouflage segmentation on two GPUs
#
# This notebook trains a network that finds hidden animals (COD10K), on every GPU of the session, in two stages: first
# the decoder alone, then the backbone too, unfrozen from the top.
# On Kaggle: Settings > Accelerator > GPU T4 x2, then Run All. No internet is needed.
# Add COD10K as an input; the notebook knows its usual layouts. Without COD10K it draws **synthetic** scenes: textures
# with an object of another texture in them. They show that everything works, not how well animals are found.

# %% [markdown]
# The next cell carries the library, `kaggle_mgpu`, so that this notebook is one file. There is nothing to edit in it.

# %% tags=["payload"]
# tools/notebooks.py build puts the package here. Run from a checkout, this source needs nothing in this cell.

# %%
from kaggle_mgpu import env

env.fix()  # before anything else is imported

from pathlib import Path

from kaggle_mgpu import devices, notebook_parameters
from kaggle_mgpu.recipes.camouflage_segmentation import CamouflageSegmentation, Config, baselines, run

# %matplotlib inline
print(devices.report())

# %% [markdown]
# ## Parameters
#
# Any other field of `Config` can be set in this cell too. Papermill sets fields with `-p epochs 5`. `None` leaves a
# field to the preset: `balanced`, `fast` (a smaller model, a larger batch) or `high_resolution` (352 pixels). The costs
# of the presets are printed below. For COD10K a pretrained backbone helps most: `backbone = "edgenext_base"` (or
# another of timm's), with its weights as an input, or `backbone_weights = "download"` and the internet switched on.

# %% tags=["parameters"]
# Parameters of this notebook
data_path = None  # a folder with COD10K; None: searched among the inputs, else synthetic scenes
scenes = 200  # synthetic scenes to train on, where there are no files
val_scenes = 50
preset = "balanced"  # balanced, fast or high_resolution
backbone = "compact"  # the recipe's own, or the name of a timm backbone
backbone_weights = None  # of a timm backbone: a file, or "download"; None: searched among the inputs
image_size = None
width = None  # of the compact backbone
decoder = "small"  # or "experts": of seven kinds, with more parameters and slower steps
decoder_width = None
num_experts = None
routing = "soft"  # soft or topk
frozen_epochs = 2  # stage 1
unfreeze_parts = 3  # stage 2: number of runs; the last trains everything
partial_epochs = 1  # of each part before the last
epochs = 30  # of the last part
max_steps = None  # of each stage and part, instead of epochs: for a quick look
global_batch_size = None
micro_batch_size = None  # images per forward pass on one GPU; None: global_batch_size shared out
lr = 1e-3
tta = False  # evaluate and predict with the mean of each image's and its mirror image's prediction
strategy = "auto"  # auto, single, dp or ddp
nproc = "auto"  # processes; auto: one per GPU
precision = "auto"  # auto, fp32, fp16 or bf16
gradient_checkpointing = False
eval_every = None  # steps, "epoch" or "end"; None: ten times on synthetic scenes, four times on files
log_every = 10
time_limit = None  # "45m", "3h": stop in good order after this long; None: shortly before the session ends
output_dir = "camouflage_segmentation"
seed = 1337
pictures = 4

# %%
# The names defined in the cell above, and in papermill's cell after it. A name unknown to Config is an error.
parameters = notebook_parameters(globals())
pictures = parameters.pop("pictures")
config = Config.from_dict(parameters)
task = CamouflageSegmentation(config)
print(task.describe())

# %% [markdown]
# ## Training
# If the session ends early, little is lost: run the notebook again, and training continues from the newest checkpoint
# of the unfinished stage, also on another number of GPUs. Finished stages return at once.

# %%
result = run(config, task.found)
print(f"step {result.step} of {result.max_steps} ({result.reason}), {result.seconds:.0f} s of training")

# %%
result.plot()

# %% [markdown]
# ## How good is it?
# The usual measures of camouflaged object detection on held-out images, for the model and for three predictions without
# a model. Larger is better, except for the mean absolute error, `mae`. Papers report several measures, since an empty
# prediction scores well by some.

# %%
if result.metrics:
    rows = {**baselines(task), "this model": result.metrics}
    names = ("s_measure", "e_mean", "e_max", "e_adaptive", "weighted_f", "iou", "dice", "mae")
    print(f"{'':14}" + "".join(f"{name:>12}" for name in names))
    for row, values in rows.items():
        print(f"{row:14}" + "".join(f"{values[name]:12.4f}" for name in names))
    print(f"The best S-measure of the run, whose weights draw below: {result.best:.4f}")
else:
    print("Nothing was evaluated yet.")

# %% [markdown]
# ## What it sees

# %%
if task.found.val is not None:
    from IPython.display import Image, display

    model = result.load(task.network(), "best")
    display(Image(filename=str(task.figure(model, Path(result.output_dir, "predictions.png"), count=pictures))))
    print(f"every prediction, as images: {task.write_predictions(model, Path(result.output_dir, 'predictions.zip'))}")

# %% [markdown]
# ## What is where
# To continue later, run this notebook again with the same parameters. On Kaggle, a new session starts with an empty
# working folder: add this notebook's own earlier output as an input, and the stages are found there.

# %%
print(
    result.files(
        {
            "model.safetensors": "the weights of the last stage",
            "best/model.safetensors": "the weights with the best S-measure",
            "predictions.zip": "the held-out images' predictions, as the field's evaluation tools read them",
            "predictions.png": "the figure above",
            "metrics.jsonl": "every number that was logged, all stages",
            "stage1": "stage 1: its own checkpoints, records and weights; so for the others",
        }
    )
)

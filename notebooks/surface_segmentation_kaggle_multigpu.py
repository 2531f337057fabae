# %% [markdown]
# # Papyrus surfaces in 3-D on two GPUs
#
# This notebook trains a 3-D U-Net to find the papyrus sheets in scans of rolled scrolls, on every GPU of the session,
# predicts the test volumes and writes `submission.zip`.
# On Kaggle: Settings > Accelerator > GPU T4 x2, add the competition *Vesuvius Challenge - Surface Detection* as an
# input, then Run All. No internet is needed. Without this input it uses small synthetic volumes, and takes minutes.

# %% [markdown]
# The next cell carries the library, `kaggle_mgpu`, so that this notebook is one file. There is nothing to edit in it.

# %% tags=["payload"]
# tools/notebooks.py build puts the package here. Run from a checkout, this source needs nothing in this cell.

# %%
from kaggle_mgpu import env

env.fix()  # before anything else is imported

from pathlib import Path

from IPython.display import Image

from kaggle_mgpu import devices, notebook_parameters
from kaggle_mgpu.recipes.surface_segmentation import Config, SurfaceSegmentation, baselines, cross_validate, run

# %matplotlib inline
print(devices.report())

# %% [markdown]
# ## Parameters
# `global_batch_size` counts patches per optimizer step over all GPUs, so results do not depend on the number of GPUs.
# Any other field of `Config` can be set in this cell too. Papermill sets fields with `-p epochs 5`.

# %% tags=["parameters"]
# Parameters of this notebook
data_path = None  # the folder with train_images/, train_labels/, test_images/; None: found among the inputs
patch_size = "auto"  # side of the cubes; auto: 128, on synthetic volumes 32
width = "auto"  # channels at full resolution; auto: 32, on synthetic volumes 8
patches_per_volume = 4
val_fraction = 0.05  # share of the volumes held out: whole scrolls where they are small enough
folds = None  # 5: also cross-validate, with a model for each of 5 parts of the volumes, one per GPU at a time
epochs = 40
max_steps = None  # instead of epochs, when given
global_batch_size = 8
micro_batch_size = "auto"  # patches per forward pass on one GPU; auto: as many as fit
lr = 1e-3
schedule = "cosine_restarts"
warmup_steps = 0.05  # a fraction of the run, or steps
deep_supervision = False
skeleton_recall = 0.0  # 1.0: a further term of the loss, the missed share of the sheets' middle
gradient_checkpointing = False  # less memory, a third more time
overlap = 0.5  # of the windows that predict a volume
tta_axes = ()  # (0, 1, 2): the mean over eight flips of each window, for eight times the work
threshold = "auto"  # lowest probability of a sheet voxel; auto: chosen on the held-out volumes
min_component = "auto"  # remove predicted parts of fewer voxels; auto: chosen on the held-out volumes
save_probabilities = False  # also keep the probabilities of the predicted volumes
weights = "best"  # or "final", or .safetensors files: then nothing is trained, and their mean probability predicts
ignore_label = 2  # the label of voxels without annotation; 255 in many data sets
strategy = "auto"  # auto, single, dp or ddp
nproc = "auto"  # processes; auto: one per GPU
precision = "auto"  # auto, fp32, fp16 or bf16
save_interval_minutes = 30
time_limit = None  # "45m", "3h": stop in good order after this long; None: shortly before the session ends
output_dir = "surface_segmentation"
seed = 1337

# %%
# The names defined in the cell above, and in papermill's cell after it. A name unknown to Config is an error.
parameters = notebook_parameters(globals())
folds = Config.from_dict({"folds": parameters.pop("folds")}).folds
config = Config.from_dict(parameters)
task = SurfaceSegmentation(config)
if folds:
    SurfaceSegmentation(config.replace(folds=folds)).split  # too many folds are an error now, not after training
print(task.describe())

# %% [markdown]
# ## Training, then prediction
# Every volume is read once before training starts, so that a malformed volume is found now and not after hours.
# If the session ends early, little is lost: run the notebook again, and training continues from the newest checkpoint,
# or prediction with the volumes that are missing.

# %%
result = run(config, task)
print(f"step {result.step} of {result.max_steps} ({result.reason}), {result.seconds:.0f} s of training")

# %%
result.plot()

# %% [markdown]
# ## How good is it?
# Scores of whole held-out volumes, predicted with a Gaussian-blended sliding window. Surface Dice (with a tolerance of
# 2 voxels) and the VOI score are terms of the competition's score, computed as its metric does. Its third term, a Betti
# matching, is not computed here: betti0_f1, betti1_f1 and betti2_f1 compare only the numbers of parts, tunnels and
# cavities, and are upper bounds. The model is compared with two trivial answers: every voxel is sheet, or every voxel
# brighter than the best threshold on training volumes.

# %%
if "volume_dice" in result.metrics:
    rows = baselines(task)  # on at most 8 of the held-out volumes
    print(f"{'':18}" + "".join(f"{name:>14}" for name in rows["this model"]))
    for name, row in rows.items():
        print(f"{name:18}" + "".join(f"{value:14.3f}" for value in row.values()))
    print(f"All held-out volumes: Dice {result.metrics['volume_dice']:.3f}")
else:
    print("Nothing was held out, or the predictions are not complete yet.")

# %%
slices = Path(result.output_dir, "slices.png")
Image(str(slices)) if result.finished and slices.exists() else None

# %% [markdown]
# ## Cross-validation
# If `folds` is a number, the volumes are divided into as many parts (of whole scrolls, where there are several), and a
# model is trained without each part, one model per GPU at a time. The standard deviation over the parts shows how much
# the scores depend on the volumes. Then the mean of these models predicts the test volumes; its `submission.zip`
# replaces the single model's. Finished folds do not run again.

# %%
if folds and result.finished and (found := cross_validate(config, folds)):
    print(found)
    run(found.ensemble(config))

# %% [markdown]
# ## What is where
# To continue later, run this notebook again with the same parameters. On Kaggle, a new session starts with an empty
# working folder: add this notebook's own earlier output as an input, and the run is found there.

# %%
print(
    result.files(
        {
            "submission.zip": "one TIFF a test volume, checked; on Kaggle also in /kaggle/working",
            "predictions": "every predicted volume, held out or test",
            "predictions/postprocessing.json": "the threshold and the smallest part, where they were chosen",
            "slices.png": "image, label and prediction",
            "best/model.safetensors": "the weights with the highest validation Dice, which predict",
        }
    )
)

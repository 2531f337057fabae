# make demo   train a GPT from the template notebook with two processes, end to end
# make test   everything: lint, types, tests
# make test-env   env.fix() on real TensorFlows x protobufs: 30 environments, half an hour, 9 GB under build/envs
# Both make .venv first. PYTHON=python3.12 chooses another interpreter, CONSTRAINTS= lets pip choose the versions.

PYTHON ?= python3
CONSTRAINTS ?= .ci/constraints.txt
VENV := .venv
BIN := $(VENV)/bin
# one thread a process: two processes with two threads each on two cores crawl
export OMP_NUM_THREADS ?= 1

# 1.2 M parameters, 8 epochs of the text that comes with Python: two minutes on two quiet cores
DEMO := -p nproc 2 -p n_layer 4 -p n_head 4 -p n_embd 128 -p block_size 128 -p global_batch_size 16 \
        -p lr 3e-3 -p max_steps 450 -p eval_every 75 -p max_new_tokens 120

.PHONY: demo test test-env test-gpu lint notebooks bench clean

$(VENV)/installed: requirements.txt tests/requirements.txt $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -r requirements.txt -r tests/requirements.txt
	touch $@

demo: $(VENV)/installed
	$(BIN)/python tools/notebooks.py build
	$(BIN)/python tools/notebooks.py run text_generation $(DEMO) --output build/demo/text_generation.ipynb

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu

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

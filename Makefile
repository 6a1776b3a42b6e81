# make        the whole road on the default world: data → base → sft → comparisons → reward → ppo, dpo → table
# make seeds  the same once per seed of SEEDS="0 1 2", in $(OUT)/seed-N, and one table of means and their spread
# make test   the tests;  make test-all  the slow ones too;  make bench  speed;  make clean  removes $(OUT)
# make experiments  what the documents claim, tried on what make or make seeds left (tests/experiments.py: one at a time)
# make pictures  README's figures of ZeRO and of attention, drawn anew from runs (tests/pictures.py; the SFT model's attention)
# make labs   the list of labs;  make lab N=7  empties a function in a copy, labs/7;  make check N=7  is it right?
#
# NPROC=2 ZERO=3 OUT=out2 SEED=1    processes, ZeRO stage, output folder, seed of everything
# PIP="..."                         further arguments of pip install, such as another index for torch

PYTHON ?= python3
NPROC ?= 1
ZERO ?= 0
OUT ?= out
SEED ?= 0
SEEDS ?= 0 1 2
PIP ?=

BIN := .venv/bin
LAUNCH := $(BIN)/python
ifneq ($(NPROC),1)
LAUNCH := OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(NPROC)
endif
FLAGS := --zero $(ZERO) --seed $(SEED)
.DELETE_ON_ERROR:
.PHONY: all data base sft collect reward ppo dpo seeds test test-all bench experiments pictures labs lab check clean

all: $(OUT)/table.json
data: $(OUT)/data/tokenizer.json
base: $(OUT)/base/eval.json
sft: $(OUT)/sft/eval.json
collect: $(OUT)/comparisons.jsonl
reward: $(OUT)/reward/eval.json
ppo: $(OUT)/ppo/eval.json
dpo: $(OUT)/dpo/eval.json

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP) -r requirements.txt
	touch $@

$(OUT)/data/tokenizer.json: | .venv/ready
	$(BIN)/python data.py world --seed $(SEED) --out $(OUT)/data

$(OUT)/base/eval.json: $(OUT)/data/tokenizer.json
	$(LAUNCH) pretrain.py $(FLAGS) --data $(OUT)/data/corpus.jsonl --tokenizer $(OUT)/data --out $(OUT)/base

$(OUT)/sft/eval.json: $(OUT)/base/eval.json
	$(LAUNCH) sft.py $(FLAGS) --data $(OUT)/data/sft.jsonl --init $(OUT)/base --out $(OUT)/sft

$(OUT)/comparisons.jsonl: $(OUT)/sft/eval.json
	$(LAUNCH) reward.py collect $(FLAGS) --init $(OUT)/sft --prompts $(OUT)/data/prompts.jsonl --out $@

$(OUT)/reward/eval.json: $(OUT)/comparisons.jsonl
	$(LAUNCH) reward.py $(FLAGS) --init $(OUT)/sft --data $< --out $(OUT)/reward

$(OUT)/ppo/eval.json: $(OUT)/reward/eval.json
	$(LAUNCH) ppo.py $(FLAGS) --init $(OUT)/sft --reward $(OUT)/reward --prompts $(OUT)/data/prompts.jsonl --out $(OUT)/ppo

# Two rounds of DPO, the second on what the first replies; the reference stays SFT.
$(OUT)/dpo-1/eval.json: $(OUT)/comparisons.jsonl
	$(LAUNCH) dpo.py $(FLAGS) --init $(OUT)/sft --data $< --out $(OUT)/dpo-1

$(OUT)/comparisons-2.jsonl: $(OUT)/dpo-1/eval.json
	$(LAUNCH) reward.py collect $(FLAGS) --init $(OUT)/dpo-1 --prompts $(OUT)/data/prompts.jsonl --temperatures 1,1,1,1 --out $@

$(OUT)/dpo/eval.json: $(OUT)/comparisons-2.jsonl
	$(LAUNCH) dpo.py $(FLAGS) --init $(OUT)/dpo-1 --reference $(OUT)/sft --data $< --out $(OUT)/dpo

$(OUT)/table.json: $(OUT)/ppo/eval.json $(OUT)/dpo/eval.json
	$(LAUNCH) reward.py table $(FLAGS) --models $(OUT)/base,$(OUT)/sft,$(OUT)/ppo,$(OUT)/dpo \
	  --data $(OUT)/data/eval.jsonl --text $(OUT)/data/heldout.jsonl --prompts $(OUT)/data/prompts.jsonl \
	  --reward $(OUT)/reward --reference $(OUT)/sft --out $@
	$(BIN)/python tests/seeds.py road --table $@ --data $(OUT)/data/eval.jsonl --prompts $(OUT)/data/prompts.jsonl \
	  --train $(OUT)/data/sft.jsonl

seeds:
	for seed in $(SEEDS); do $(MAKE) SEED=$$seed OUT=$(OUT)/seed-$$seed all || exit 1; done
	$(BIN)/python tests/seeds.py merge $(SEEDS:%=$(OUT)/seed-%/table.json) --out $(OUT)/table.json

test: .venv/ready
	$(BIN)/python -m pytest -q -m "not slow" tests

test-all: .venv/ready
	$(BIN)/python -m pytest -q tests

bench: .venv/ready
	$(BIN)/python tests/bench.py

experiments: .venv/ready
	$(BIN)/python tests/experiments.py all --root $(OUT)

pictures: $(OUT)/sft/eval.json
	$(BIN)/python tests/pictures.py memory
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 tests/pictures.py timeline
	$(BIN)/python tests/pictures.py attention $(OUT)/sft

labs: .venv/ready
	$(BIN)/python tests/labs.py

lab: .venv/ready
	$(BIN)/python tests/labs.py start $(N)

check: .venv/ready
	$(BIN)/python tests/labs.py check $(N)

clean:
	rm -rf $(OUT)

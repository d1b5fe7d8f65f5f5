# Every target builds .venv first when it is missing or when pyproject.toml or constraints.txt changed.
# PYTHON picks the interpreter (3.11 or later); PIP_ARGS goes to pip, e.g. an index with the torch build of your choice.
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2
DEMO_ARGS ?=
# of the demo; so3lr also installs the package that carries its weights
MODEL ?= spookynet-ala2-gfn2

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -c constraints.txt

# in the order in which they need one another's results
LED := benchmarks/led_mueller_brown_md.py benchmarks/led_mueller_brown.py benchmarks/led_data.py \
	benchmarks/led_reference.py benchmarks/led_ala2.py benchmarks/led_alternation.py \
	benchmarks/led_trpcage.py benchmarks/led_speedup.py

SO3KRATES := benchmarks/so3krates_ethanol.py benchmarks/so3lr_minima.py benchmarks/so3lr_stability.py \
	benchmarks/so3lr_water.py benchmarks/embedding_clusters.py benchmarks/embedding_nve.py

RESOLV := "benchmarks/resolv_vacuum.py --networks f32l2" benchmarks/resolv_labels.py "benchmarks/resolv_networks.py first" \
	"benchmarks/resolv_labels.py --rounds 2" "benchmarks/resolv_networks.py vacuum water report" \
	benchmarks/resolv_water.py "benchmarks/resolv_water.py --name fused2 --start fused --learning-rate 1.2e-5 --rounds 12" \
	benchmarks/resolv_hydration.py benchmarks/resolv_pair.py benchmarks/resolv_conformers.py

# these are told which data and models
BIO := benchmarks/bio_dataset.py benchmarks/spookynet_learning_curve.py benchmarks/spookynet_bio.py \
	benchmarks/spookynet_bio_dynamics.py benchmarks/spookynet_bio_guard.py benchmarks/spookynet_bio_examples.py benchmarks/spookynet_active_learning.py \
	benchmarks/spookynet_bio_release.py

# small molecules run fastest on one thread, and the tests already run in two processes
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all lint format benchmark reproduce reproduce-cg-gdml cg-gdml-learning-curve reproduce-led reproduce-so3krates reproduce-resolv clean help

help:
	@echo "make demo       ML/MM simulation of capped alanine in water, results in .demo/ (MODEL=so3lr: by SO3LR)"
	@echo "make test       fast tests (make test-all: the slow ones too)"
	@echo "make lint       ruff, mypy, import-linter (make format: let ruff rewrite)"
	@echo "make benchmark  every figure of the README, JSON beside each script in benchmarks/"
	@echo "make reproduce  label the data of the bundled model, train it and evaluate it (hours)"
	@echo "make reproduce-cg-gdml       six-bead alanine from all-atom data to its landscape (2 hours on 4 cores)"
	@echo "make reproduce-led           learned latent dynamics of Mueller-Brown, alanine and Trp-cage, from data to figures (hours)"
	@echo "make reproduce-so3krates     SO3krates of ethanol against sGDML; minima, long runs and embeddings with SO3LR (hours)"
	@echo "make reproduce-resolv        potentials in vacuum and in water from stored frames and hydration free energies (hours)"
	@echo "make cg-gdml-learning-curve  its error against the number of frames, beside neural networks (hours)"

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or later is needed, $(PYTHON) is %d.%d" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# what the main job needs and no more, so that a fresh clone gets to it quickly
$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e . matplotlib
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e ".[train,label,analysis,cluster,crystals,led,dev]"
	@touch $@ $(VENV)/.demo

# weights only: the package is never imported
$(VENV)/.so3lr: $(VENV)/.demo
	$(INSTALL) -e ".[so3lr]"
	@touch $@

demo: $(VENV)/.demo $(if $(filter so3lr,$(MODEL)),$(VENV)/.so3lr)
	$(BIN)/openmm-mlff demo --output .demo --model $(MODEL) $(DEMO_ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow"

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/.dev
	@failed=; for script in $(filter-out %/cg_gdml.py %/cg_gdml_data.py %/cg_gdml_learning_curve.py $(LED) $(SO3KRATES) $(subst ",,$(RESOLV)) $(BIO),$(wildcard benchmarks/[!_]*.py)); do \
		echo "== $$script"; $(BIN)/python $$script || failed="$$failed $$script"; done; \
		test -z "$$failed" || { echo "not done:$$failed"; exit 1; }

reproduce: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" bash benchmarks/reproduce.sh

# both go on where they were stopped
reproduce-cg-gdml: $(VENV)/.dev
	$(BIN)/python benchmarks/cg_gdml.py

cg-gdml-learning-curve: $(VENV)/.dev
	$(BIN)/python benchmarks/cg_gdml_learning_curve.py

# data of Trp-cage and of explicit solvent grow for an hour each time
reproduce-led: $(VENV)/.dev
	@set -e; for script in $(LED); do echo "== $$script"; \
		$(BIN)/python $$script $$(test $$script = benchmarks/led_data.py && echo --time-limit 60); done

reproduce-so3krates: $(VENV)/.dev
	@set -e; for script in $(SO3KRATES); do echo "== $$script"; $(BIN)/python $$script; done

reproduce-resolv: $(VENV)/.dev
	@set -e; for script in $(RESOLV); do echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf $(VENV) .demo build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

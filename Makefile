# Each target works from a bare checkout: it first creates .venv and installs what constraints.txt names.

PYTHON ?= python3
PROMPT ?=
TO ?=
VIEW :=
ARGS ?=
INSTALLED := .venv/.installed

# taken as it is, whatever it contains: make would expand `$`, the shell quotes and blanks
unexport PROMPT TO
export DEMO_PROMPT := $(value PROMPT)
export DEMO_TO := $(value TO)

.PHONY: help demo test test-install lint peers bench docs clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

demo: $(INSTALLED) ## complete code prompts by beam search: make demo PROMPT='def ', VIEW=stochastic, diverse, sample, trie or lattice (TO=a.svg)
	@.venv/bin/python docs/examples/demo.py $(VIEW:%=--%) $${DEMO_TO:+--to "$$DEMO_TO"} $${DEMO_PROMPT:+-- "$$DEMO_PROMPT"}

test: $(INSTALLED) ## the whole test suite: make test ARGS='-k order'
	.venv/bin/python -m pytest -n auto --dist worksteal $(ARGS)

test-install: $(INSTALLED) ## wheel, sdist, editable and strict editable installs, each in a new environment
	.venv/bin/python -m pytest -m slow_install tests/test_install.py $(ARGS)

lint: $(INSTALLED) ## ruff check, ruff format, mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	@rm -rf .site && mkdir -p .site/flashbeam
	@for path in beam/* kernels; do ln -s ../../$$path .site/flashbeam/; done
	.venv/bin/mypy

peers: $(INSTALLED) ## fetch fairseq's sources, which tests/test_presets.py then runs too
	.venv/bin/python -m pip download --no-deps --no-build-isolation --no-binary fairseq -d .venv/peers fairseq==0.12.2
	tar -xzf .venv/peers/fairseq-0.12.2.tar.gz -C .venv/peers

bench: $(INSTALLED) ## the benchmarks, printed
	.venv/bin/python -m pytest bench -s $(ARGS)

docs: $(INSTALLED) ## run every example of the docs, check every link and every file they name
	.venv/bin/python -m pytest tests/test_docs.py $(ARGS)

clean: ## remove what was built, except .venv
	rm -rf build dist *.egg-info .site .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "PYTHON: expected 3.10 or newer, got " + sys.version)'
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt torch setuptools
	.venv/bin/python -m pip install -c constraints.txt --no-build-isolation -e '.[test,bench,docs,lint,hf,grammar,peers]'
	@touch $@

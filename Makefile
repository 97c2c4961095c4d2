# make run | make test | make lab | make bench | make goldens: each makes .venv first when it is missing or out of date.
PYTHON ?= python3
OUT ?= out
TEST_JOBS ?= 2
BIN := .venv/bin/python
STAMP := .venv/.installed

.DEFAULT_GOAL := run
.PHONY: run test lab bench goldens native clean

# Only this rule uses the network, and only when the list of packages has changed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.11" >&2; exit 2; }
	test -x $(BIN) || $(PYTHON) -m venv .venv
	$(BIN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,compile]'
	@touch $@

# Two minutes, and only when a source that is compiled has changed; without a C compiler it says so and does nothing.
native: $(STAMP)
	@$(BIN) -m kit compile --if-possible

run: $(STAMP)
	@$(BIN) -m kit batch --out $(OUT)

# One worker a core, at most TEST_JOBS: the notebooks' kernels need memory of their own.
test: native
	@$(BIN) -m pytest -n logical --maxprocesses $(TEST_JOBS) --dist worksteal

lab: $(STAMP)
	@$(BIN) -m kit lab

bench: native
	@$(BIN) -m benchmarks

# The only way in which goldens change; the commit says why.
goldens: $(STAMP)
	@$(BIN) -m kit.batch.expected

clean:
	rm -rf .venv $(OUT) kit/native/compiled.*/

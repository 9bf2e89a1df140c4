# What one does with a checkout. Each target first sets up what it needs and does not have yet.
#
#   make run           the broker, on its defaults;     make run ARGS="--listen 127.0.0.1:9000"
#   make test          all tests;                       make test ARGS="tests/test_topics.py -x"
#   make lint          style and types
#   make conformance   the Autobahn suite against the native connection (needs a CPython 2.7)
#   make fuzz          the native code on ever more examples, under sanitizers; make fuzz ARGS="--minutes 60"
#   make bench         fan-out against its peers;       make bench ARGS=--check
#   make install-service   as root: into /opt/wsbroker, with units for systemd; make install-service WHAT=dist/….whl
#   make clean         removes what a build leaves behind; .venv stays

ROOMS := broker bench examples tests

.DEFAULT_GOAL := help
.PHONY: help run test lint conformance fuzz bench install-service clean setup-run setup-dev

help:
	@sed -n 's/^#   //p' Makefile

run: setup-run
	@exec .venv/bin/wsbroker serve $(ARGS)

test: setup-dev tests/node/node_modules
	@tools/packages chromium=chromium openssl=openssl systemd-socket-activate=systemd nginx=nginx-light
	.venv/bin/python -m pytest $(ARGS)

lint: setup-dev
	.venv/bin/ruff check $(ROOMS) _speedups setup.py
	.venv/bin/ruff format --check $(ROOMS) _speedups setup.py
	.venv/bin/mypy $(ROOMS)
	PATH=$$PWD/.venv/bin:$$PATH cython-lint _speedups

conformance: setup-dev
	.venv/bin/python -m tests.conformance.suite $(ARGS)

fuzz: setup-dev
	.venv/bin/python -m tests.fuzz $(ARGS)

bench: setup-dev
	.venv/bin/python -m bench.fanout $(ARGS)

install-service:
	@tools/install-service $(WHAT)

clean:
	rm -rf build bench/build dist *.egg-info .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f broker/_speedups.*.so broker/_speedups.pyi _speedups/*.c _speedups/*.html

setup-run:
	@tools/setup run

setup-dev:
	@tools/setup dev

tests/node/node_modules: tests/node/package.json tests/node/package-lock.json
	@tools/packages node=nodejs npm=npm
	npm ci --prefix tests/node --no-audit --no-fund --loglevel=error
	@touch $@

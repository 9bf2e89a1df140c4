"""How fast the broker is, measured beside its peers: see docs/benchmarks.md."""

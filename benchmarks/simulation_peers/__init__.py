"""The drivers that `benchmarks.simulation` compares, each run by an environment of its own."""

"""Flower's deployment on loopback, the peer of several benchmarks."""

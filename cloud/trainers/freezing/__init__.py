"""Layers that have learned what they will stop training: Egeria (arXiv:2201.06227), controls."""

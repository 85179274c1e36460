"""Whole fleets: on a virtual clock, and as real processes on one machine."""

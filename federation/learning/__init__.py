"""What devices and hub do with weights: train, aggregate, evaluate, export.

Importing this package imports nothing else; `aggregation`, `data`, `layers` and `methods`
need numpy only, and the rest reaches torch when it is used.
"""

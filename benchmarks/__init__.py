"""One module a claim: each measures Headwater beside a named peer, in the same run.

`python -m benchmarks.NAME [--quick] [--json]`; what they gave last is in docs/benchmarks.md.
"""

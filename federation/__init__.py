"""The language and the craft that device, hub, twin and simulation share.

`federation.protocol` is what they say to each other; `federation.learning` is what they do
with weights. Importing this package imports nothing else.
"""

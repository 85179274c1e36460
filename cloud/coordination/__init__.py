"""The hub as a state machine: rounds, updates, devices. It does no I/O."""

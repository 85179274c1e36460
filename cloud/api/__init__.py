"""The hub's HTTP API, in a thread of its own beside the hub."""

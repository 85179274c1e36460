"""The hub: it opens rounds, gathers updates, keeps the record, and releases models."""

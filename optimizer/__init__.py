"""Whom to ask, which model, where, and with how much."""

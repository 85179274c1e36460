"""A device: it learns where its data is, and talks to the hub by letter only."""

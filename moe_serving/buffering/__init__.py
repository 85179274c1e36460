"""A byte budget instead of a model that must fit: which experts stay, and how others come."""

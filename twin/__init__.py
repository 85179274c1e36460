"""A digital twin of each device: what it reported, what is wanted of it, what it will do."""

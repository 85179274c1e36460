"""A Flower app whose clients do nothing: what is left of a round is overhead."""

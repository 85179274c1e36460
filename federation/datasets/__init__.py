"""Real data sets, brought from packages and kept in a cache."""

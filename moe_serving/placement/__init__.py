"""Which device holds which expert: pure functions, history in, placement out."""

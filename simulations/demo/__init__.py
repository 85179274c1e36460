"""The demonstration: ten wrists as real processes, and what befalls them."""

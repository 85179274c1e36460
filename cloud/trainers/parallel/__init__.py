"""Training of mixtures of experts over many processes (TED, arXiv:2303.06318)."""

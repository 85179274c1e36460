"""Training of pruned networks: dense compute, compressed state (SAMO, arXiv:2302.05045)."""

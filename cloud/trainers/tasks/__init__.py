"""What the hub can learn: models of the zoo, and mixtures of experts, each on real data."""

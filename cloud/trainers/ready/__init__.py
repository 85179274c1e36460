"""Plans of trainings that are ready: small, real, each done in minutes on two cores."""

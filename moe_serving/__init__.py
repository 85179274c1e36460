"""The mixture-of-experts models that the hub serves."""

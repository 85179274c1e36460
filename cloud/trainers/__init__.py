"""The hub's trainers: big models, trained sparse, with frozen layers, over many processes."""

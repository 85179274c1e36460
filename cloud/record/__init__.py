"""What the hub must not forget: the database, the model files, and what is asked of them."""

"""The twins of a fleet, kept in the hub's database and fed from its log."""

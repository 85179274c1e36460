"""How an expert is computed: one kernel for each device and precision, behind one registry."""

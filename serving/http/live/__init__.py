"""The model in use: its interface, its warm-up, and the switch to a newer one."""

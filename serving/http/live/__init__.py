"""The model that answers: what the server needs of one, how it is warmed up, and the switch to a newer one."""

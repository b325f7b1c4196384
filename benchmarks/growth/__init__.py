"""How time, memory and bytes of each stage grow with the data."""

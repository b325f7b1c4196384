"""Scripts for what a person runs offline: parse, call one function, print one summary."""

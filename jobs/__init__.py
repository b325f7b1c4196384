"""Scripts that users run offline: parse options, call one function, print one summary."""

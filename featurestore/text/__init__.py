"""Text that anybody may have written: parsed with one line for each mistake, printed so that all of it is seen."""

"""Tables of variants and seeds: the paper's on samples of your own, and yours from a YAML file."""

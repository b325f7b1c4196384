"""Reading features fast: one rank's partition of a snapshot, mapped into memory, and the service that embeds keys."""

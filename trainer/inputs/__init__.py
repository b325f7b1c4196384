"""Numbers as inputs: scaled, filled or cut into buckets, by statistics that go with the run."""

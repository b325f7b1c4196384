"""Networks that run on a worker: from the vectors of a batch's fields to one logit a sample."""

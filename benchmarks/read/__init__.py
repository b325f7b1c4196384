"""Reading of samples by many ranks: what each decodes, its bytes from S3, and how well samples are mixed."""

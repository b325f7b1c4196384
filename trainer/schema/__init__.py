"""Fields of a sample: the schema that the reader, the exchange and the model share, and how one is suggested."""

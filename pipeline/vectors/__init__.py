"""Import vectors that another program made into a feature store."""

"""Training on one GPU: samples a second, how busy it is, and what is carried to it."""

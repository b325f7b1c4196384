"""The network of a bundle: exported from a trained run, and run on one request or several."""

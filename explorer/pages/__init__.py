"""The pages, one module a kind: routes, and for each what it shows."""

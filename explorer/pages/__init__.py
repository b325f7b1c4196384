"""The pages, one module for each kind: routes, and the content of each page."""

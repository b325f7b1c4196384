"""Report pages: what a command prints, as one HTML file without scripts that needs nothing else (option --html)."""

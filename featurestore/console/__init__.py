"""The console of all commands: arguments, exit codes, one-line errors, progress, tables and JSON files."""

"""The `dgrad` command: parses, calls the core, prints. Modules load torch and the core only inside commands."""

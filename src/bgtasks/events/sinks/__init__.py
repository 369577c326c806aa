"""The sinks, one module each; import the one you need. An extra installs the client of its server."""

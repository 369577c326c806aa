"""One file per framework; each is imported by its own name, and none by ``bgtasks`` itself."""

"""Publishers for real sinks, one file each; import the one you need, its client comes as an extra."""

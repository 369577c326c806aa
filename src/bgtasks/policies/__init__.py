"""The policies for submitted functions: attempts, keys, results, schedules and services."""

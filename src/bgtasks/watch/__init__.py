"""Watching: what runs, what is slow, what blocks the loop. Nothing of it is imported unless it is asked for."""

"""The matrix fault x sink: producer, injector and checker, each a process of its own, that share a folder of ledgers.

``matrix`` starts them; ``python -m harness`` prints the table.
"""

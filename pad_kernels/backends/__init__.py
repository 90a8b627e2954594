"""Backends: who does the row passes over a block of logits. Matrix products are torch's.

``base`` is the contract and ``choice`` who is chosen; ``registry`` says which are there and
``traits`` what plans depend on. ``native`` is what ``cpp`` and ``cuda`` have in common.
"""

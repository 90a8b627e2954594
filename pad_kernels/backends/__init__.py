"""Backends: who does the row passes over a block of logits. Matrix products are torch's."""

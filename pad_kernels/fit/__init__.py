"""What fits: memory of a distillation step from configs alone (``pad-kernels plan``).

- ``models``: a config to a model without weights, its exact parameters, LoRA.
- ``trace``: live bytes at every instant of a model's own forward and backward.
- ``step``: the phases of a training step put together, with dense logits and with this library.
- ``report``, ``plot``, ``command``: the table, the picture, the command line.
"""

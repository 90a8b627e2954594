"""The row engine: functionals over the same logits, block by block, forward and backward.

From a call to its gradients:

- ``call``: checked arguments become tensors and a ``recipe``, the op's static half;
  ``mixture`` puts losses against teachers together.
- ``ops``, ``scaling``, ``topk``, ``candidates``: the ``torch.library`` ops, the only autograd.
- ``plan``, ``planner``: shapes and a budget to a schedule, by bytes (``footprint``) and time
  (``costs``, of one of the ``devices``); ``explain`` prints it.
- ``problem``: an op's ``arguments`` as streams, without the ``rows`` that do not count, its
  ``inputs`` checked, the vocabulary in an ``order`` if a filter wants one.
- ``schedule``: the block loops; ``run`` does the steps of one block, with weights from ``feed`` and
  buffers from ``workspace``; ``gradients`` is where gradients add up, by ``products`` of what the
  ``filter`` does not leave out.
"""

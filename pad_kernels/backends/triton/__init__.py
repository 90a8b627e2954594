"""Row passes in Triton; importing the modules imports triton, the package itself does not.

- ``backend``: the steps that the engine asks for; each makes a ``launch`` or two and runs them.
- Over logits in memory: ``passes`` makes the launches, ``statistics`` and ``gradient`` are the
  kernels, ``configs`` their block sizes; ``topk`` merges the largest logits.
- Over products that stay on the chip: ``fused`` makes the launches for ``fused_operands``;
  ``fused_stats`` (with ``fused_state``) and ``fused_gradient`` are the kernels, made of ``tiles``,
  ``tilings`` their block sizes.
- ``live``, ``live_kernels``: products over the tiles that the gradient filter keeps.
- ``gather``: given tokens' rows of a weight.
- ``autotune`` measures block sizes on the device, if it is asked to.
- Shared: ``columns`` puts a row's numbers side by side, kernels use ``math`` and ``lists``.
- ``aot``, ``shipped``: compiled ahead of time, for tests on machines without a GPU.
"""

"""Adapters with the call signatures of other libraries: swapping an import is enough.

======================================== =========================================
in place of                              import
======================================== =========================================
``cut_cross_entropy``                    ``pad_kernels.compat.cut_cross_entropy``
``liger_kernel.transformers``            ``pad_kernels.compat.liger.transformers``
``liger_kernel.chunked_loss``            ``pad_kernels.compat.liger.chunked_loss``
``torch.nn.functional`` (its             ``pad_kernels.compat.torch_nn``
``linear_cross_entropy``)
======================================== =========================================

Values follow the adapted function wherever it is right; docs/compat.md lists every difference.
"""

from pad_kernels.compat import cut_cross_entropy, liger, torch_nn

__all__ = ["cut_cross_entropy", "liger", "torch_nn"]

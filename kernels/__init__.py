"""GPU programs in Triton and their typed launchers; installed as ``gcng.kernels``.

One module per op, named as the op in ``gcng/ops``. It holds the jit kernels (``<op>_forward_kernel``),
which know pointers, strides and tiles, and the launchers (``<op>_forward``, ``<op>_backward``), which check
shapes and dtypes, pick the frozen tile configuration and allocate the outputs. Autograd and
``torch.library`` belong to ``gcng/ops``.

No kernel ships yet: CUDA tensors take the blocked torch path of ``gcng/ops``.
"""

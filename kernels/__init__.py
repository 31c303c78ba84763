"""GPU programs in Triton and their typed launchers; installed as ``gcng.kernels``.

One module per op, named as the op in ``gcng/ops``. It holds the jit kernels (``<op>_forward_kernel``),
which know pointers, strides and tiles, and the launchers (``<op>_forward``, ``<op>_backward``), which check
shapes and dtypes, pick the frozen tile configuration and allocate the outputs, and ``compilation_cases``, which lists
launches for the compile check, beside those of a training step. Autograd and ``torch.library`` belong to ``gcng/ops``.

Every launch goes through ``launch``, which also records launches for the compile check; arithmetic that kernels share,
and every workaround for triton's interpreter, is in ``arithmetic``. Importing this package imports neither triton nor
torch.
"""

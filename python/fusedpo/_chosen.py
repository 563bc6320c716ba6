"""What was chosen by measurements on a GPU: ``bench/choose.py`` writes this file. Nothing was measured yet."""

# Operators whose native CUDA kernels run without being forced: right, and faster than those of Triton.
NATIVE_ON_CUDA: tuple[str, ...] = ()

# How much of the L2 cache the Triton kernel of one_pass may fill with the rows that it has under way.
L2_SHARE = 2 / 3

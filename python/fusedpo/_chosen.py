"""What was chosen by measurements on a GPU: ``bench/choose.py`` writes this file. Nothing was measured yet."""

# Operators whose native CUDA kernels run without being forced: right, and faster than those of Triton.
NATIVE_ON_CUDA: tuple[str, ...] = ()

# How much of the L2 cache the Triton kernel of one_pass may fill with the rows that it has under way.
L2_SHARE = 2 / 3

# Triton kernels of long rows: how much of a row a program has at a time, and its warps. The order of sums follows from
# them, and so do last digits: they are chosen once, for all calls, and nothing is tuned while a program runs.
FORWARD = (512, 4)  # token_logprobs: words, a fourth of a step
BACKWARD = (16384, 8)  # its gradient: bytes
WALK = (2048, 16)  # one_pass: words, a fourth of a step; half of them where they are narrow

"""Places of the numbers by which per_tensor_scaling.py scales float32 tensors, and results back."""

import triton.language as tl

SIGMA = tl.constexpr(0)  # the softmax scale of the rescaled q and k
MU = tl.constexpr(1)
# What a kernel writes has places one after the other, or every other one.
O = tl.constexpr(2)
O_T = tl.constexpr(3)
D_Q = tl.constexpr(4)
D_Q_T = tl.constexpr(5)
D_K = tl.constexpr(6)
D_V = tl.constexpr(7)
D_K_T = tl.constexpr(8)
D_V_T = tl.constexpr(9)
# From true units to those of the kernels:
OWN_MU = tl.constexpr(10)
OWN_O = tl.constexpr(11)
OWN_O_T = tl.constexpr(12)
OF_QUERIES = tl.constexpr(16)  # and the next three: q, q_t, d_o, d_o_t
OF_KEYS = tl.constexpr(20)  # likewise: k, v, k_t, v_t
COUNT = 24

# The backward kernels compute P * 2^SHIFT: of P itself, which is one over the number of keys on average, float16 would
# lose digits.
SHIFT = tl.constexpr(9)

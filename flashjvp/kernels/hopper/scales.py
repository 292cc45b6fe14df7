"""Where each number of per-tensor scaling lies in the tensor of scales (per_tensor_scaling.py)."""

import triton.language as tl

SOFTMAX_SCALE = tl.constexpr(0)  # of the scaled q and k
MU = tl.constexpr(1)
# The results of one kernel lie one after the other, or every other one.
O = tl.constexpr(2)
O_T = tl.constexpr(3)
D_Q = tl.constexpr(4)
D_Q_T = tl.constexpr(5)
D_K = tl.constexpr(6)
D_V = tl.constexpr(7)
D_K_T = tl.constexpr(8)
D_V_T = tl.constexpr(9)  # mutate: D_V_T
# What true mu, o and o_t are multiplied by to match the scaled tensors:
INVERSE_MU = tl.constexpr(10)
INVERSE_O = tl.constexpr(11)
INVERSE_O_T = tl.constexpr(12)
QUERY_SIDE = tl.constexpr(16)  # and the next three: what q, q_t, d_o, d_o_t are multiplied by
KEY_SIDE = tl.constexpr(20)  # likewise: k, v, k_t, v_t
COUNT = 24

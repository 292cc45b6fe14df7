"""One call of attention, PyTorch's own functions, and what counts calls in a report."""

import torch
from torch import Tensor
from torch.nn import functional as F

from flashjvp.integrations.replaced import Replaced
from tests.flashjvp.integrations.exact import normal

# In a tuple, since names at the top of a module are replaced.
FUNCTIONS = (F.scaled_dot_product_attention, F.layer_norm, torch.layer_norm)


def attention_calls(replaced: Replaced) -> int:
    return sum(row.calls for row in replaced.report_of.report().rows if row.function == "scaled_dot_product_attention")


Q = normal(1, 2, 4, 8).float()


def call() -> Tensor:
    return F.scaled_dot_product_attention(Q, Q, Q)

"""Every kind of finding, with what to do about it."""

REPLACED = "run the training step within flashjvp.replaced(model)"

LAYER_NORM = "layer norm"
BATCH_NORM = "batch norm in training"
INSTANCE_NORM = "instance norm"
SDPA = "stock attention"
ATTENTION = "flashjvp's attention"
DENSE = "dense attention"
SWITCH = "switch off"
DROPOUT = "dropout"
LEARNED_MASK = "learned mask"
CHECKPOINT = "checkpointing"
FUNCTION = "autograd.Function without jvp"
OWN_JVP = "autograd.Function with its own jvp"
IN_PLACE = "in-place on a captured tensor"
CUT = "tangent cut"
NO_GRAD = "gradient cut"
NO_FORWARD_AD = "operator without forward AD"
NO_BACKWARD = "JVP without backward"
STRIDED = "JVP of a strided input"
FAST_PATH = "fast path of inference"
ERROR = "error"
UNKNOWN = "unknown cause"
UNSEEN = "not observed"

ADVICE = {
    LAYER_NORM: f"its JVP has a wrong gradient in PyTorch: {REPLACED}, or use RMSNorm",
    BATCH_NORM: f"its JVP has a wrong gradient in PyTorch: {REPLACED}, or use GroupNorm",
    INSTANCE_NORM: f"its JVP has a wrong gradient in PyTorch: {REPLACED}, or use GroupNorm",
    SDPA: REPLACED,
    DENSE: "holds the whole matrix of scores: call flashjvp.attention instead",
    DROPOUT: "nothing to do: its mask is the same in the JVP and the backward pass",
    LEARNED_MASK: "nothing to do: flashjvp's attention gives the mask its gradient and its tangent",
    CHECKPOINT: f"stock checkpointing loses tangents: {REPLACED}, or turn it off",
    FUNCTION: "give it a jvp (or setup_context and generate_vmap_rule), or write it with PyTorch's operators",
    OWN_JVP: "its jvp must be differentiable: see the comparisons",
    IN_PLACE: "write out of place, or give torch.func.functional_call copies of the buffers, made under the JVP; "
    "batch norms may count within flashjvp.replaced(model)",
    CUT: "its result has no tangent, though what enters has: remove it, unless it is meant so",
    NO_GRAD: "what is computed without gradients counts as constant: remove torch.no_grad there, unless it is meant",
    NO_FORWARD_AD: "PyTorch has no JVP of it: write it with other operators",
    NO_BACKWARD: "PyTorch has a JVP of it, but no derivative of that: write it with other operators",
    STRIDED: "PyTorch's JVP of it needs an input without gaps in memory: call .contiguous() before it",
    FAST_PATH: f"a JVP under torch.no_grad fails: {REPLACED}, or torch.backends.mha.set_fastpath_enabled(False)",
    ERROR: "see the error",
    UNKNOWN: "look for in-place writes, tensors made from numbers, and custom operators, halving the model",
    UNSEEN: "this PyTorch has no TorchDispatchMode: operators were not observed, the comparisons hold",
}

DETACHED_NORM = "harmless while the tangent is detached; wrong once a gradient passes through it"
NOTHING = "nothing to do"
BY_FLASHJVP = "served by flashjvp"
HARMLESS_NORM = "its JVP has a wrong gradient in PyTorch, but nothing that is trained depends on that here"

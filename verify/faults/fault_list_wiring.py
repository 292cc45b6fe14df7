"""The planted bugs of the operators' derivatives and of what PyTorch's transforms meet."""

from .fault import Fault

OPERATORS = "dispatch/operators.py"
AUTOGRAD = "dispatch/autograd.py"

OF_WIRING = [
    Fault("tangents dropped silently", "wiring", AUTOGRAD, "if duals", "if False:", check="forward_ad"),
    Fault(
        "tangent of v dropped", "wiring", AUTOGRAD, "(q, q_t), (k, k_t), (v, v_t)",
        '(q, q_t), (k, k_t), (v, v_t) = split("q", q), split("k", k), (split("v", v)[0], None)',
        check="forward_ad",
    ),
    Fault(
        "tangent of o without a graph", "wiring", AUTOGRAD, "return _torch make_dual",
        "return _torch.make_dual(o, o_t.detach()), lse", check="forward_ad",
    ),
    Fault(
        "d_k and d_v exchanged", "wiring", AUTOGRAD, "grads (1)",
        "d_q, d_v, d_k, d_mask = ctx.gradients(BACKWARD, (d_o, *ctx.saved_tensors), tuple(wanted))\n"
        "grads = (d_q, d_k, d_v, d_mask)",
        "plain",
    ),
    Fault(
        "gradients of primals and tangents exchanged", "wiring", AUTOGRAD, "return grads",
        "return None, None, *grads[3:6], *grads[:3], *grads[6:], None",
    ),
    Fault(
        "o of an earlier call saved", "wiring", AUTOGRAD, "ctx.save_for_backward",
        'earlier = vars(_ForwardJvp).get("earlier", o)\n'
        "_ForwardJvp.earlier = o\n"
        "ctx.save_for_backward(q, k, v, q_t, k_t, v_t, earlier, o_t, lse, mu, mask, mask_t, seed)",
        check="stateless",
    ),
    Fault(
        "o of the tangent saved as o", "wiring", AUTOGRAD, "ctx.save_for_backward",
        "ctx.save_for_backward(q, k, v, q_t, k_t, v_t, o_t, o, lse, mu, mask, mask_t, seed)",
    ),
    Fault(
        "gradients asked for one place off", "wiring", AUTOGRAD, "_, _, *wanted, _",
        "wanted = [*ctx.needs_input_grad[1:7], *ctx.needs_input_grad[8:10]]",
    ),
    Fault(
        "cotangent of o_t dropped", "wiring", AUTOGRAD, "grads (2)",
        "grads = ctx.gradients(BACKWARD_JVP, (d_o, None, *ctx.saved_tensors), tuple(wanted))",
    ),
    Fault(
        "recorded backward gives tangents first", "wiring", AUTOGRAD, "grads (3)",
        "grads = _redispatch_in_node(operator, keyset, operator.split((*args, wanted)), fwd_grad)\n"
        "grads = (*grads[3:6], *grads[:3], *grads[6:])",
        check="func.grad",
    ),
    Fault(
        "outer levels cannot record", "wiring", "_torch/levels.py", "with torch enable_grad",
        "with _torch.set_fwd_grad_enabled(fwd_grad):", check="outer-level",
    ),
    Fault(
        "second backward silently zero", "wiring", AUTOGRAD, "raise second_order ctx",
        "return (None,) * len(ctx.needs_input_grad)", check="second-order",
    ),
    Fault(
        "JVP of a JVP silently zero", "wiring", AUTOGRAD, "raise second_order FORWARD_JVP",
        "pass", check="second-order",
    ),
    Fault(
        "JVP of a backward silently zero", "wiring", AUTOGRAD, "raise second_order operator",
        "pass", check="second-order",
    ),
    Fault(
        "backward inside a dual level silent", "wiring", AUTOGRAD, "if ctx in_level",
        "if False:", check="second-order",
    ),
    Fault(
        "func.jvp with the tangent of v dropped", "wiring", "dispatch/func_jvp.py", "tangents.append",
        "tangents.append(None if len(tangents) == 2 else _tangent(x, level))", check="forward-mode",
    ),
    Fault(
        "func.jvp gives o as its own tangent", "wiring", "dispatch/func_jvp.py", "return _torch make_dual",
        "return _torch.make_dual(o, o)", check="func.jvp",
    ),
    Fault(
        "short way with the options of an earlier call", "repeated calls", "dispatch/fast_path.py",
        "return operator options",
        "return operator, enable_gqa, autocast, q.shape, k.shape, *nested", check="repeated",
    ),
    Fault(
        "short way with the tensors of an earlier call", "repeated calls", OPERATORS, "return tensors function",
        "return lambda tensors: function(*operands, *rest, *wanted)", "plain", "repeated",
    ),
    Fault(
        "short way with the default scale", "repeated calls", "dispatch/fast_path.py", "run",
        "run = _run(operator, canonical, plain, Options(*options)._replace(scale=None), _view(joined, changes))",
        check="repeated",
    ),
    Fault(
        "short way back with the options of an earlier call", "repeated calls", "dispatch/fast_path.py", "gradients",
        'gradients = vars(derivatives).setdefault("first", _BoundGradients(options))', check="repeated",
    ),
    Fault("vmap over the wrong dim", "wiring", OPERATORS, "moved.append", "moved.append(x)", "square", "func.vmap"),
    Fault(
        "vmap left with the mapped dim in its place", "wiring", "dispatch/func_vmap.py", "return x movedim", "return x",
        "square", "func.vmap",
    ),
    Fault(
        "default scale from the width of v", "wiring", OPERATORS, "return getattr module",
        "return getattr(module, operator.name), options.of_backend(operands.v)", "dims_64_24",
    ),
    Fault(
        "causal option lost", "wiring", "api.py", "o, o_t",
        "o, o_t = derivatives.attention_jvp(operands, Options(False, _scale(scale), backend))", "causal_64_64",
    ),
]  # fmt: skip

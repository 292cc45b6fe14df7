"""The planted bugs of persistent kernels."""

from .fault import Fault

HOPPER = "kernels/hopper/"


def _persistent(name: str, file: str, marker: str, statement: str, case: str = "hopper_items") -> Fault:
    return Fault(
        f"persistent kernels: {name}", "pipelines", HOPPER + file, marker, statement, case, "emulated-persistent"
    )


OF_PERSISTENT = [
    _persistent("stages count anew in every item", "persistent.py", "iteration", "iteration += 0 * steps"),
    _persistent("stages count one too many", "mainloop.py", "iteration", "iteration += pipeline.turn[0].iteration + 1"),
    _persistent("resident tiles of the item before", "pipeline.py", "mbarrier.wait (2)", "pass"),
    _persistent(
        "resident tiles refilled before they are written", "persistent.py", "mbarrier.wait", "pass", "hopper_items_128"
    ),
    _persistent(
        "a program's first unit left out", "persistent.py", "first_unit",
        "first_unit = count * head_units * pid // programs + (pid > 0)",
    ),
    _persistent("a single unit of the second consumer at its block's second", "persistent.py", "before", "before = 0"),
    _persistent("query head for key head", "persistent.py", "streamed", "streamed = head"),
    _persistent(
        "one phase for all items of a buffer", "persistent.py", "return Turn",
        "return Turn(begun % BUFFERS * 2, 0, iteration)",
    ),
    _persistent(
        "items of the first batch entry alone", "persistent_kernels.py", "items",
        "items = key_items(1, M, N, heads, group, ROWS, HALVES)",
    ),
    _persistent(
        "columns of values beyond the first 64 left out", "eligibility.py", "return narrow",
        "return narrow", "hopper_items_128",
    ),
    _persistent(
        "serve and ignore masks", "persistent_launch.py", "if call",
        "if not jvp or are_scaled or call.pattern is not None or call.is_causal:", "hopper_mask",
    ),
]  # fmt: skip

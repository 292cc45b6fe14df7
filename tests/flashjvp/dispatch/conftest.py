"""What the tests of calls like earlier ones share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flashjvp.dispatch import derivatives, fast_path


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Calls that take the dispatcher."""
    seen: list[str] = []

    def spy(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            seen.append(name)
            return function(*args)

        return called

    fast_path.forget()
    monkeypatch.setattr(derivatives, "attention", spy("attention", derivatives.attention))
    monkeypatch.setattr(derivatives, "attention_jvp", spy("attention_jvp", derivatives.attention_jvp))
    yield seen
    fast_path.forget()

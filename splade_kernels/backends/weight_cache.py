from typing import Any


def cached(weight: Any, kind: str, make: Any) -> Any:
    return make()

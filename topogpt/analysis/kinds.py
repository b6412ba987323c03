"""Names of sheets and modules by kind: layers are averaged, attention and MLP are not."""

import re
from collections.abc import Iterable


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """layer.*.mlp -> layer.0.mlp, layer.1.mlp and so on; in the order of the names."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"\d+", "*", name, count=1), []).append(name)
    return found

"""Python's own documentation as text: all of it, in order, without running what it documents."""

import sys

from topogpt.text import python_docs


def test_python_documentation_is_in_order_and_runs_no_module():
    documents = list(python_docs.python_documents())
    assert {"antigravity", "this", "turtledemo.clock", "idlelib.idle"}.isdisjoint(sys.modules)
    names = [name for name, _ in documents]
    modules = [name for name in names if name.startswith("module/")]
    assert len(set(names)) == len(names) and modules == sorted(modules)
    assert {"topic/lambda", "module/json/decoder.py", "module/argparse.py"} <= set(names)
    assert not [name for name in names if "/test/" in name or "site-packages" in name]
    text = dict(documents)["module/json/decoder.py"]
    assert "function JSONDecoder.decode" in text
    assert sum(len(text) for _, text in documents) > 1_500_000

"""Export two small models with random weights, to be checked by check_export.py in other environments.

    python tests/compat/make_export.py OUT      # -> OUT/run/hf, a GPT-2, and OUT/rotary/hf, an Arcee

It needs what the tests need; check_export.py needs nothing of this repository.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import tiny  # noqa: E402

from topogpt.sharing import export  # noqa: E402

if __name__ == "__main__":
    rotary = {"norm": "rmsnorm", "position": "rope", "tied": False, "scale_attention": True, "n_layer": 3}
    print(export.export(tiny.random_run(Path(sys.argv[1]))))
    print(export.export(tiny.random_run(Path(sys.argv[1]), "rotary", **rotary)))

"""A file of minimal pairs, and their scores one token at a time."""

import json
from pathlib import Path

import torch


@torch.no_grad()
def plain_scores(model, sentences) -> list[float]:
    """Sentence by sentence, token by token."""
    found = []
    for sentence in sentences:
        log_p = model(torch.from_numpy(sentence)[None, :-1]).logits[0].log_softmax(-1)
        found.append(sum(float(log_p[i, token]) for i, token in enumerate(sentence[1:])))
    return found


ROWS = [
    {
        "UID": uid,
        "field": "syntax",
        "linguistics_term": term,
        "sentence_good": f"{uid} {k}",
        "sentence_bad": "x",
    }
    for uid, term in (("p", "islands"), ("q", "islands"), ("r", "binding"))
    for k in range(3)
]


def write_pairs(path: Path, rows: list[dict] = ROWS) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

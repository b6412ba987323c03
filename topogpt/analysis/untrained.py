"""The same shape without training: what the architecture alone does, to compare a trained model with."""

from topogpt import rng
from topogpt.analysis.subject import Subject


def untrained(subject: Subject, seed: int) -> Subject:
    """A model of the subject's shape as it is initialised, the same on every device; nothing else differs."""
    import torch

    model = subject.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed(seed, "untrained"))
        fresh = type(model)(model.cfg)
    return subject._replace(label=f"{subject.label}, untrained", model=fresh.to(model.device).eval())

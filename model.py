"""The GPT, where a reader looks for it; it is defined in topogpt/model/gpt.py."""

from topogpt.model.gpt import GPT, GPTConfig, Output, sheet_names

__all__ = ["GPT", "GPTConfig", "Output", "sheet_names"]

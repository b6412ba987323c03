"""TopoGPT: GPTs whose units lie on a two-dimensional sheet."""

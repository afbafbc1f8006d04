"""The op: checks, autograd, schemas, and the maths in plain PyTorch."""

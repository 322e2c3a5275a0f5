"""An adapted linear layer on a CPU against PEFT's LoRA: 2048 -> 5504, 8 samples of 64 tokens, fp32.

Every case first compares both layers with the formula in fp64: a wrong result gets no figure. Ratios are reported, not
asserted.
"""

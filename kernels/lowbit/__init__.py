"""lowbit: packed low-bit formats and the operations that run on them.

    formats        pack and unpack integer codes
    hadamard/      block Hadamard transform with random signs
    act_quant/     per-token dynamic activation quantization
    linear_wnan/   linear layer with an n-bit weight and n-bit activations
    ops            the names callers use; says which backend runs and why

Each operation's folder holds `naive.py`, the fp32 reference with the operation's signature, and its faster
versions beside it. Nothing here imports the workbench. Importing this package does not import torch.
"""

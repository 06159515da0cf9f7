"""lowbit: packed low-bit formats and the operations that run on them.

    formats        pack and unpack integer codes
    hadamard/      block Hadamard transform with random signs
    act_quant/     dynamic activation quantization, per token or per token and group
    linear_wnan/   linear layer with a packed n-bit weight and n-bit activations
    linear_wna16/  linear layer with a packed n-bit weight and float activations
    modulate/      adaptive layer norm in one pass
    attention/     attention of streams of tokens, with its RMS norms and rotary embedding in one pass
    quant_linears/ several layers of one input, quantized once
    ops            the names callers use; says which backend runs and why
    abi, build, cpu the C kernels' structs and functions; compile them; call them with tensors

Each operation's folder holds `naive.py`, the fp32 reference with the operation's signature, and its faster
versions beside it. Nothing here imports the workbench. Importing this package does not import torch.
"""

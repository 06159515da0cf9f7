"""The compiled library as ctypes sees it: the structs of `lowbit.h`, the arguments of its entry points, and a loaded library.

A function belongs to the library that it was looked up in, and nothing else keeps one: of two libraries in a process, built for
two instruction sets, each runs its own code.
"""

from __future__ import annotations

import ctypes

_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Weight(ctypes.Structure):
    _fields_ = (("packed", _P), ("scale", _P), ("zero", _P), ("n_out", _I), ("k_in", _I), ("group", _I), ("bits", _I))


class Epilogue(ctypes.Structure):
    _fields_ = (("bias", _P), ("low", _P), ("up", _P), ("y", _P), ("bias_format", _I), ("rank", _I), ("gelu", _I), ("y_format", _I),
                ("residual", _P), ("gate", _P), ("gate_stride", _I), ("tokens", _I))


class Layers(ctypes.Structure):
    _fields_ = (("weights", _P), ("ends", _P), ("factor", _P), ("count", _I), ("block", _I), ("act_groups", _I))


class ActGrid(ctypes.Structure):
    _fields_ = (("bits", _I), ("mid_rise", _I), ("clip", ctypes.c_float))


class Stream(ctypes.Structure):
    _fields_ = (("q", _P), ("k", _P), ("v", _P), ("q_norm", _P), ("k_norm", _P), ("y", _P), ("tokens", _I))


ARGUMENTS = {  # of lowbit.h's entry points; every one but quant_linears ends with the number of threads
    "lowbit_hadamard": (_P, _I, _P, _I, _I, _I, _P, _I),
    "lowbit_act_quant": (_P, _I, _P, _I, _P, _I, _I, _I, _P, _P, _I),
    "lowbit_linear_wnan": (ctypes.POINTER(Weight), ctypes.POINTER(Epilogue), _P, _P, _I, _I, _I),
    "lowbit_quant_linears": (_P,),
    "lowbit_linear_wna16": (ctypes.POINTER(Weight), ctypes.POINTER(Epilogue), _P, _I, _I, _I),
    "lowbit_modulate": (_P, _I, _P, _P, _I, _D, _I, _I, _I, _P, _I),
    "lowbit_attention": (_P, _I, _I, _P, _P, _D, _I, _I, _I, _I),
}


class Library(ctypes.CDLL):
    """A compiled library, loaded. `functions`: its entry points by name, ready to call; each returns 0, or 1 when memory ran out.

    Raises OSError for a file that is no library, and AttributeError for one that lacks an entry point."""

    def __init__(self, path: str):
        super().__init__(path)
        self.functions = {name: self[name] for name in ARGUMENTS}
        for name, function in self.functions.items():
            function.argtypes, function.restype = ARGUMENTS[name], ctypes.c_int

"""Layers that run whole (`forward`) and in pieces (`step`), with one body for both."""

from asr.nn.cells import CELLS, Bidirectional, Cell, Recurrent, SelfAttention, Stacked, initialise, stacked
from asr.nn.convolution import LookAhead, Normalise, StridedConvolution
from asr.nn.layer import Chain, State, StreamingLayer, windows
from asr.nn.recurrent import LSTM, BiLSTM

__all__ = [
    "CELLS",
    "LSTM",
    "BiLSTM",
    "Bidirectional",
    "Cell",
    "Chain",
    "LookAhead",
    "Normalise",
    "Recurrent",
    "SelfAttention",
    "Stacked",
    "State",
    "StreamingLayer",
    "StridedConvolution",
    "initialise",
    "stacked",
    "windows",
]

"""Layers that run whole (`forward`) and in pieces (`step`), with one body for both."""

from asr.nn.attention import SelfAttention
from asr.nn.cells import CELLS, Cell, initialise
from asr.nn.convolution import LookAhead, Normalise, RunningNormalise, StridedConvolution, UtteranceNormalise
from asr.nn.layer import Chain, State, StreamingLayer, detach, windows
from asr.nn.recurrent import LSTM, BiLSTM, cell_of
from asr.nn.stack import Bidirectional, Recurrent, Stacked, stacked

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
    "RunningNormalise",
    "SelfAttention",
    "Stacked",
    "State",
    "StreamingLayer",
    "StridedConvolution",
    "UtteranceNormalise",
    "cell_of",
    "detach",
    "initialise",
    "stacked",
    "windows",
]

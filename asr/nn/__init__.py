"""Layers that run whole (`forward`) and in pieces (`step`), with one body for both."""

from asr.nn.convolution import LookAhead, Normalise, StridedConvolution
from asr.nn.layer import Chain, State, StreamingLayer, windows
from asr.nn.recurrent import LSTM, BiLSTM

__all__ = [
    "LSTM",
    "BiLSTM",
    "Chain",
    "LookAhead",
    "Normalise",
    "State",
    "StreamingLayer",
    "StridedConvolution",
    "windows",
]

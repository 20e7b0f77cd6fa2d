"""What the commands share: the application, the options of those that recognize, how they report and end."""

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from asr.errors import AsrError, ConfigError, Problem

app = typer.Typer(
    help="Speech recognition on LSTMs: whole files, and live audio with text as it is spoken.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# The panels of `asr --help`.
RECOGNIZE = "Recognize"
TRAIN = "Train"
INSIDE = "Inside the LSTM"

MANIFESTS = "NeMo JSON Lines, CSV, a Kaldi folder, Lhotse cuts, or a folder of recordings with texts."
Engine = Literal["onnx", "torch"]
Precision = Literal["fp32", "int8"]
Decoding = Literal["greedy", "beam", "transducer"]
Format = Literal["txt", "json", "srt", "vtt", "ctm"]  # pipelines.formats.FORMATS

# The options of every command that recognizes.
HOW = "How to recognize"
ModelOption = Annotated[
    Path | None,
    typer.Option("--model", "-m", help="Model folder; without it, the one that comes along.", rich_help_panel=HOW),
]
StreamingOption = Annotated[
    bool,
    typer.Option("--streaming", help="Use the streaming network, and not the offline one.", rich_help_panel=HOW),
]
DecodingOption = Annotated[
    Decoding | None,
    typer.Option(
        help="beam: with the language model of the model folder; greedy: without, at next to no cost; transducer: by a "
        "network that has one. Unless given: beam, where there is a language model.",
        rich_help_panel=HOW,
    ),
]
BEAM = "How to search with --decoding beam"
BeamOption = Annotated[
    int | None, typer.Option(min=1, help="Hypotheses to keep; more find more, slower.", rich_help_panel=BEAM)
]
LmWeightOption = Annotated[
    float | None, typer.Option(min=0, help="Weight of the language model.", rich_help_panel=BEAM)
]
WordScoreOption = Annotated[
    float | None, typer.Option(help="Added for each word; more of it, more words.", rich_help_panel=BEAM)
]
NbestOption = Annotated[
    int | None, typer.Option(min=1, help="So many alternatives of each segment.", rich_help_panel=BEAM)
]


def _hot_words(path: str) -> dict[str, float]:
    from asr.decoding.hot_words import read_hot_words

    return read_hot_words(path)


HotWordsOption = Annotated[
    dict | None,
    typer.Option(
        "--hot-words",
        metavar="FILE",
        parser=_hot_words,
        help="Phrases to expect, a line each: `phrase`, or `phrase :boost`, 0 to 100 (5 without).",
        rich_help_panel=BEAM,
    ),
]
RulesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        metavar="KEY=VALUE",
        help="When a segment ends, repeatable: trailing_silence, leading_silence, max_segment (seconds), vad (energy "
        "or silero, extra \\[vad]), blanks, reset (true or false); docs/live.md shows what each does.",
        rich_help_panel=HOW,
    ),
]
EngineOption = Annotated[Engine, typer.Option(help="ONNX Runtime, or PyTorch (extra \\[train]).", rich_help_panel=HOW)]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option(help="int8 is small and fast, fp32 exact; without it, what the model has.", rich_help_panel=HOW),
]
ThreadsOption = Annotated[int, typer.Option(min=1, help="Threads of the network.", rich_help_panel=HOW)]
AddressOption = Annotated[str | None, typer.Option(help="A running Ray cluster, as host:port or auto.")]


def recognizer_options(
    model: Path | None,
    decoding: Decoding | None,
    engine: Engine,
    precision: Precision | None,
    threads: int,
    rules: Sequence[str] | None = None,
    **search: Any,
) -> Any:
    """How to recognize; without `decoding`, with the language model, if there is one, or if what is given needs it."""
    given = {name: value for name, value in search.items() if value is not None}
    if decoding is None:
        from asr.runtime.folder import best_decoding

        decoding = "beam" if given else best_decoding(model)
    if given and decoding != "beam":
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise typer.BadParameter(f"{named}: only with --decoding beam")
    from pipelines.transcribe import RecognizerOptions

    return RecognizerOptions(
        model=model,
        engine=engine,
        precision=precision,
        threads=threads,
        decoding=decoding,
        search=given,
        rules=endpoint_config(rules or ()),
    )


def endpoint_config(rules: Sequence[str]) -> Any:
    """The EndpointConfig of rules written as KEY=VALUE.

    Raises:
        ConfigError: no such rule, or a value that it cannot have.
    """
    from asr.endpoint import EndpointConfig

    kinds = {field.name: type(field.default) for field in fields(EndpointConfig)}
    given: dict[str, Any] = {}
    for rule in rules:
        key, _, value = rule.partition("=")
        if key not in kinds:
            raise ConfigError(f"--rule {rule}: there is no rule {key!r}; there are {', '.join(kinds)}")
        try:
            given[key] = {"true": True, "false": False}[value] if kinds[key] is bool else kinds[key](value)
        except (KeyError, ValueError):
            wanted = "true or false" if kinds[key] is bool else "a number of seconds"
            raise ConfigError(f"--rule {rule}: {key} must be {wanted}") from None
    return EndpointConfig(**given)


def network_name(model: Path | None, streaming: bool) -> str:
    from asr.runtime.folder import choose_network, find_networks

    return choose_network(find_networks(model), streaming)


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def complain(problem: Problem | AsrError) -> None:
    tell(f"error: {problem}")


def end(problems: Sequence[Problem], *, listed: bool = False) -> None:
    """Leave with the exit status; `listed` names what was skipped once more, as it may have scrolled away."""
    if not problems:
        return
    if listed:
        tell("skipped:")
        for problem in problems:
            tell(f"  {problem}")
    raise typer.Exit(1)

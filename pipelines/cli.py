"""The command `asr`: its options, its help, its exit status. The work is done in the modules beside it."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from asr.errors import AsrError, Problem

EXAMPLES = """
[bold]Examples[/bold]

Recognize with the model that comes along:
  asr transcribe interview.mp3
  asr transcribe recordings/ --format srt --output-dir subtitles/
  asr stream                       [dim]# speak; Ctrl-C ends[/dim]
  asr stream talk.wav --realtime   [dim]# a file as if it were live[/dim]

Train a model on recordings of your own:
  asr prepare train.jsonl --out data/mine --workers 2
  asr train configs/own_streaming.toml --workers 2 --out runs/mine
  asr evaluate --model runs/mine/model test.jsonl --streaming
  asr export runs/mine -o mymodel
  asr train-lm text.txt --out mymodel  [dim]# then: --decoding beam[/dim]

[bold]Exit status[/bold]  0 all well, 1 something failed (named on stderr), 2 wrong usage, 130 interrupted.
"""

app = typer.Typer(
    help="Speech recognition on LSTMs: whole files, and live audio with text as it is spoken.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MANIFESTS = "NeMo JSON Lines, CSV, a Kaldi folder, Lhotse cuts, or a folder of recordings with texts."
RECOGNIZE = "Recognize"
TRAIN_PACKAGES = {"torch", "torchaudio", "ray", "pyarrow", "safetensors", "tensorboard", "onnx", "librosa"}
TRAIN = "Train"


Engine = Literal["onnx", "torch"]
Precision = Literal["fp32", "int8"]
Decoding = Literal["greedy", "beam"]
Format = Literal["txt", "json", "srt", "vtt", "ctm"]  # pipelines.formats.FORMATS

# The options of every command that recognizes.
_HOW = "How to recognize"
ModelOption = Annotated[
    Path | None,
    typer.Option("--model", "-m", help="Model folder; without it, the one that comes along.", rich_help_panel=_HOW),
]
StreamingOption = Annotated[
    bool,
    typer.Option("--streaming", help="Use the streaming network instead of the offline one.", rich_help_panel=_HOW),
]
DecodingOption = Annotated[
    Decoding,
    typer.Option(help="greedy, or beam: with the language model of the model folder.", rich_help_panel=_HOW),
]
_BEAM = "How to search with --decoding beam"
BeamOption = Annotated[
    int | None, typer.Option(min=1, help="Hypotheses to keep; more find more, slower.", rich_help_panel=_BEAM)
]
LmWeightOption = Annotated[
    float | None, typer.Option(min=0, help="Weight of the language model.", rich_help_panel=_BEAM)
]
WordScoreOption = Annotated[
    float | None, typer.Option(help="Added for each word; more of it, more words.", rich_help_panel=_BEAM)
]
EngineOption = Annotated[Engine, typer.Option(help="ONNX Runtime, or PyTorch (extra \\[train]).", rich_help_panel=_HOW)]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option(help="int8 is small and fast, fp32 exact; without it, what the model has.", rich_help_panel=_HOW),
]
ThreadsOption = Annotated[int, typer.Option(min=1, help="Threads of the network.", rich_help_panel=_HOW)]
AddressOption = Annotated[str | None, typer.Option(help="A running Ray cluster, as host:port or auto.")]


def _recognizer_options(
    model: Path | None,
    decoding: Decoding,
    engine: Engine,
    precision: Precision | None,
    threads: int,
    **search: float | None,
) -> Any:
    given = {name: value for name, value in search.items() if value is not None}
    if given and decoding != "beam":
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise typer.BadParameter(f"{named}: only with --decoding beam")
    from pipelines.transcribe import RecognizerOptions

    return RecognizerOptions(
        model=model, engine=engine, precision=precision, threads=threads, decoding=decoding, search=given
    )


@app.callback(invoke_without_command=True)
def _asr(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as version_of

        try:
            print(f"asr {version_of('streaming-asr')}")
        except PackageNotFoundError:  # run from a source tree that was never installed
            print("asr (not installed)")
        raise typer.Exit()


# ---- recognizing


@app.command(rich_help_panel=RECOGNIZE)
def transcribe(
    audio: Annotated[list[Path], typer.Argument(help="Recordings, and folders that are searched for them.")],
    format: Annotated[Format, typer.Option("--format", "-f", help="What to write.")] = "txt",
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Write a file for each recording there.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do again what --output-dir holds already.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Recordings at a time; above 1 over Ray (extra \\[train]).")] = 1,
    model: ModelOption = None,
    streaming: StreamingOption = False,
    decoding: DecodingOption = "greedy",
    beam: BeamOption = None,
    lm_weight: LmWeightOption = None,
    word_score: WordScoreOption = None,
    nbest: Annotated[
        int | None,
        typer.Option(min=1, help="With --format json: so many alternatives of each segment.", rich_help_panel=_BEAM),
    ] = None,
    engine: EngineOption = "onnx",
    precision: PrecisionOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Turn recordings of any length into text.

    One recording: its text goes to stdout, a line for each segment. Several, or
    a folder: a line for each, path<TAB>text, in the order given (json: an object
    a line, with a "path").

    With --output-dir each gets a file of its name; sub-folders are kept. Run
    again, it goes on where it stopped. What cannot be read is named on stderr,
    and the rest goes on.

    json has the shape of openai/whisper's result, srt and vtt are subtitles, ctm
    is NIST's list of words with their times.
    """
    search = {"beam": beam, "lm_weight": lm_weight, "word_score": word_score, "nbest": nbest}
    options = _recognizer_options(model, decoding, engine, precision, threads, **search)
    if nbest is not None and format != "json":
        raise typer.BadParameter("--nbest: alternatives are written with --format json")
    from pipelines.formats import JOINABLE
    from pipelines.transcribe import transcribe as run

    if output_dir is None and format not in JOINABLE and (len(audio) > 1 or audio[0].is_dir()):
        raise typer.BadParameter(f"--format {format}: several recordings need --output-dir")
    results = run(
        audio,
        options,
        network=_network(streaming),
        format=format,
        output_dir=output_dir,
        overwrite=overwrite,
        workers=workers,
    )
    problems: list[Problem] = []
    done = kept = 0
    for result in results:
        if result.problem is not None:
            _complain(result.problem)
            problems.append(result.problem)
        elif result.kept is not None:
            kept += 1
        else:
            done += 1
            if output_dir is None:
                print(result.text, end="", flush=True)
    if output_dir is not None or done + len(problems) > 1:
        kept_too = f", {kept} there already (--overwrite does them again)" if kept else ""
        _tell(f"{done} transcribed{kept_too}, {len(problems)} failed")
    _end(problems, listed=done + kept + len(problems) > 1)


@app.command(rich_help_panel=RECOGNIZE)
def stream(
    audio: Annotated[Path | None, typer.Argument(help="A recording; without it, the microphone.")] = None,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Feed the recording at the pace at which it was spoken.")
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", "-d", help="Microphone: its number, or part of its name.")
    ] = None,
    list_devices: Annotated[bool, typer.Option("--list-devices", help="Show the microphones and exit.")] = False,
    model: ModelOption = None,
    decoding: DecodingOption = "greedy",
    beam: BeamOption = None,
    lm_weight: LmWeightOption = None,
    word_score: WordScoreOption = None,
    engine: EngineOption = "onnx",
    precision: PrecisionOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Show text while it is spoken, into a microphone or in a file fed as live audio.

    Finished segments go to stdout. The unfinished text, which may still change,
    goes to stderr: redrawn in place on a terminal, elsewhere a line a change.
    Ctrl-C ends with the text so far. The microphone needs the extra \\[mic].
    """
    from pipelines.stream import FileSource, MicrophoneSource, devices, terminal
    from pipelines.stream import stream as run

    if list_devices:
        print(devices(), end="")
        return
    if audio is None and realtime:
        raise typer.BadParameter("--realtime is for a recording; a microphone always is")
    if audio is not None and device is not None:
        raise typer.BadParameter("--device is for the microphone; leave out the recording")
    search = {"beam": beam, "lm_weight": lm_weight, "word_score": word_score}
    options = _recognizer_options(model, decoding, engine, precision, threads, **search)
    if audio is not None:
        source = FileSource(audio, realtime=realtime)
    else:
        source = MicrophoneSource(int(device) if device is not None and device.isdecimal() else device)
        _tell(f"opening the microphone at {source.sample_rate} Hz; Ctrl-C ends")
    with terminal() as screen:
        _, timing, interrupted = run(source, options, screen)
    _tell(str(timing))
    if interrupted and audio is not None:
        raise typer.Exit(130)


@app.command(rich_help_panel=RECOGNIZE)
def evaluate(
    manifests: Annotated[list[Path], typer.Argument(metavar="MANIFEST", help=MANIFESTS)],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to a file as well.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Show each reference and hypothesis.")] = False,
    endpoint: Annotated[
        bool, typer.Option("--endpoint", help="Cut rows where an utterance ends, as transcribe does.")
    ] = False,
    model: ModelOption = None,
    streaming: StreamingOption = False,
    decoding: DecodingOption = "greedy",
    beam: BeamOption = None,
    lm_weight: LmWeightOption = None,
    word_score: WordScoreOption = None,
    engine: EngineOption = "onnx",
    precision: PrecisionOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Count the errors on speech whose text is known: WER, CER, and the real-time factor.

    Both texts are normalised first: lower case, no punctuation. Each row is
    scored whole unless --endpoint; --streaming feeds it in blocks, as live audio
    comes. Rows that cannot be read are named, and their words count as deletions.
    The real-time factor is the time from file to text, loading the model aside.
    """
    search = {"beam": beam, "lm_weight": lm_weight, "word_score": word_score}
    options = _recognizer_options(model, decoding, engine, precision, threads, **search)
    from pipelines.evaluate import evaluate as run
    from pipelines.evaluate import report, table
    from pipelines.formats import write_text

    def told(row: Any, hypothesis: str) -> None:
        print(f"{row.id}\n  reference:  {row.text}\n  hypothesis: {hypothesis}")

    scores, problems = run(
        manifests,
        options,
        network=_network(streaming),
        endpoint=endpoint,
        on_utterance=told if show else None,
    )
    for problem in problems:
        _complain(problem)
    if scores:
        print(table(scores), end="")
    if json_file is not None:
        write_text(json_file, json.dumps(report(scores), indent=2, ensure_ascii=False) + "\n")
    _end(problems)


@app.command(rich_help_panel=RECOGNIZE)
def bench(
    audio: Annotated[list[Path], typer.Argument(help="Some recordings of speech, a few seconds each.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to a file as well.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; figures are their medians.")] = 5,
    model: ModelOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Measure what recognition and training cost on this machine (extra \\[train]).

    Features against torchaudio's, a live stream against stepping PyTorch and the
    bare graph, whole files against PyTorch, training against packed sequences:
    each group interleaved in one run. Also the largest difference between
    reading in blocks and whole.
    """
    from pipelines.bench import run_bench

    run_bench(audio, model=model, rounds=rounds, threads=threads, json_file=json_file)


# ---- training


@app.command(rich_help_panel=TRAIN)
def prepare(
    manifests: Annotated[list[Path], typer.Argument(metavar="MANIFEST", help=MANIFESTS)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    workers: Annotated[int, typer.Option(min=0, help="Ray tasks at a time; 0 works in this process.")] = 1,
    store: Annotated[
        Literal["audio", "features"], typer.Option(help="Keep audio (for augmentation) or ready features.")
    ] = "audio",
    lexicon: Annotated[
        Literal["cmudict", "none"],
        typer.Option(help="Add the phones of English words: they help learning."),
    ] = "none",
    address: AddressOption = None,
) -> None:
    """Check and decode recordings once, for training (Ray Data; extra \\[train]).

    Writes shards of 16 kHz audio with text, and the feature statistics. Rows that
    cannot be used are named, and listed in skipped.jsonl. Run again, it goes on
    where it stopped.
    """
    from pipelines.prepare import prepare as run

    summary = run(
        manifests,
        out,
        workers=workers,
        store=store,
        lexicon=None if lexicon == "none" else lexicon,
        address=address,
    )
    for problem in summary.skipped:
        _complain(problem)
    reused = f", {summary.reused} of them made before" if summary.reused else ""
    print(
        f"{summary.out}: {summary.utterances} utterances, {summary.seconds / 3600:.2f} hours, "
        f"{summary.shards} shards{reused}, {len(summary.skipped)} rows skipped"
    )
    _end(summary.skipped)


@app.command(rich_help_panel=TRAIN)
def train(
    config: Annotated[Path, typer.Argument(help="A TOML file, such as those in configs/.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the run; without it, runs/ and the config's name."),
    ] = None,
    set_values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value of the config; repeatable."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Ray Train workers; 0 trains in this process.")] = 1,
    address: AddressOption = None,
) -> None:
    """Train a network on prepared data (Ray Train; extra \\[train]). Run again, it resumes.

    The run ends with a model folder, RUN/model, which the other commands take as
    --model. --set data.train='["prepared/mine"]' overrides one value of the config.
    """
    from asr.config import load_config
    from pipelines.train import train as run

    made = run(
        load_config(config, set_values or []), out or Path("runs") / config.stem, workers=workers, address=address
    )
    print(f"{made}: try it with  asr transcribe --model {made} AUDIO")


@app.command("train-lm", rich_help_panel=TRAIN)
def train_lm(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT", help="UTF-8, a sentence a line; also .gz and .xz.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; a model's, to give it to that model.")],
    order: Annotated[int, typer.Option(min=2, max=5, help="Words to an n-gram.")] = 3,
    prune: Annotated[
        float, typer.Option(min=0, help="Drop n-grams that change the perplexity by a lower share; 0 keeps all.")
    ] = 1e-7,
    vocabulary: Annotated[int | None, typer.Option(min=1, help="Keep so many words, the most frequent ones.")] = None,
    min_count: Annotated[int, typer.Option(min=1, help="Keep words that occur so often.")] = 3,
    lexicon: Annotated[
        Literal["cmudict", "none"],
        typer.Option(help="Add the words of an English dictionary, however rare."),
    ] = "none",
) -> None:
    """Make a language model from text, for --decoding beam: word n-grams, modified Kneser-Ney, pruned.

    Writes OUT/lm. The text is normalised as transcripts are; every 200th line is
    kept back, to measure the perplexity. Needs about 500 MB of memory and half a
    minute for each ten million words.
    """
    from pipelines.train_lm import train_lm as run

    made = run(
        texts,
        out,
        order=order,
        threshold=prune,
        vocabulary=vocabulary,
        min_count=min_count,
        lexicon=None if lexicon == "none" else lexicon,
    )
    ngrams = " + ".join(f"{n:,}" for n in made.ngrams)
    print(
        f"{made.folder}: {made.words:,} words, {ngrams} n-grams, {made.megabytes:.1f} MB, "
        f"perplexity {made.perplexity.value:.1f} on {made.perplexity.words:,} words kept back "
        f"({made.perplexity.unknown:,} more are unknown)"
    )


@app.command(rich_help_panel=TRAIN)
def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN|MODEL", help="Runs or models; without any, the model that comes along."),
    ] = None,
    to: Annotated[
        Literal["model", "onnx", "onnx-int8"],
        typer.Option(help="A whole model folder, or only the graphs."),
    ] = "model",
    small: Annotated[
        bool, typer.Option("--small", help="A model in a quarter of the size: float16 weights, int8 graphs alone.")
    ] = False,
) -> None:
    """Join runs (an offline one, a streaming one) into one model folder, or write their ONNX graphs."""
    from asr.runtime.export import export_model
    from asr.runtime.folder import shipped_model

    export_model(sources or [shipped_model()], out, to, small=small)
    print(f"{out}: written")


# ---- what the commands share


def _network(streaming: bool) -> str:
    return "streaming" if streaming else "offline"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _complain(problem: Problem | AsrError) -> None:
    _tell(f"error: {problem}")


def _end(problems: Sequence[Problem], *, listed: bool = False) -> None:
    """Leave with the exit status; `listed` names what was skipped once more, as it may have scrolled away."""
    if not problems:
        return
    if listed:
        _tell("skipped:")
        for problem in problems:
            _tell(f"  {problem}")
    raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave with its exit status; `arguments` are those of this process unless given."""
    for out in (sys.stdout, sys.stderr):  # a file name need not be valid UTF-8; it must still be printed
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="surrogateescape" if out.encoding.lower() == "utf-8" else "backslashreplace")
    try:
        app(args=arguments, prog_name="asr")
    except AsrError as error:
        _complain(error)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in TRAIN_PACKAGES:
            raise
        _tell(f"error: this needs {error.name}, which is not installed: pip install 'streaming-asr[train]'")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder without permission
        _tell(f"error: {error.filename or 'input/output'}: {error.strerror or error}")
        sys.exit(1)


if __name__ == "__main__":
    main()

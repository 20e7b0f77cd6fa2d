"""The commands that recognize: transcribe, stream, bench."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from asr.errors import Problem
from pipelines.commands.options import (
    RECOGNIZE,
    AddressOption,
    BeamOption,
    DecodingOption,
    EngineOption,
    Format,
    HotWordsOption,
    LmWeightOption,
    ModelOption,
    NbestOption,
    PrecisionOption,
    RulesOption,
    StreamingOption,
    ThreadsOption,
    WordScoreOption,
    app,
    complain,
    end,
    network_name,
    recognizer_options,
    tell,
)


@app.command(rich_help_panel=RECOGNIZE)
def transcribe(
    audio: Annotated[
        list[Path],
        typer.Argument(
            help="Recordings, folders that are searched for them, and manifests (x.jsonl ...); - alone: a recording "
            "from standard input.",
            readable=False,  # what cannot be read is named, and the rest goes on
        ),
    ],
    format: Annotated[Format, typer.Option("--format", "-f", help="What to write.")] = "txt",
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Write a file for each recording there.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do again what --output-dir holds already.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Recordings at a time; above 1 over Ray (extra \\[train]).")] = 1,
    address: AddressOption = None,
    model: ModelOption = None,
    streaming: StreamingOption = False,
    decoding: DecodingOption = None,
    beam: BeamOption = None,
    lm_weight: LmWeightOption = None,
    word_score: WordScoreOption = None,
    hot_words: HotWordsOption = None,
    nbest: NbestOption = None,
    rule: RulesOption = None,
    engine: EngineOption = "onnx",
    precision: PrecisionOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Turn recordings of any length into text.

    One recording: its text goes to stdout, a line for each segment. Several, or
    a folder: a line for each, path<TAB>text, in the order given (json: an object
    a line, with a "path").

    With --output-dir each gets a file of its name; sub-folders are kept. Run
    again, it goes on where it stopped. What cannot be read is named on stderr
    and in skipped.jsonl, and the rest goes on.

    The rows of a manifest become JSON Lines in its order, x.jsonl to
    x.pred.jsonl: what the row holds, and its text as "pred_text".

    json has the shape of openai/whisper's result, srt and vtt are subtitles, ctm
    is NIST's list of words with their times.
    """
    search = {"beam": beam, "lm_weight": lm_weight, "word_score": word_score, "nbest": nbest, "hot_words": hot_words}
    options = recognizer_options(model, decoding, engine, precision, threads, rule, **search)
    if nbest is not None and format != "json":
        raise typer.BadParameter("--nbest: alternatives are written with --format json")
    from pipelines.formats import JOINABLE, check_writable
    from pipelines.predictions import is_manifest
    from pipelines.transcribe import transcribe as run

    rows = [path for path in audio if is_manifest(path) and not path.is_dir()]
    if rows and (format != "txt" or nbest is not None):
        raise typer.BadParameter(f"{rows[0]}: the rows of a manifest become JSON Lines; leave out --format and --nbest")

    if output_dir is None and format not in JOINABLE and (len(audio) > 1 or audio[0].is_dir()):
        raise typer.BadParameter(f"--format {format}: several recordings need --output-dir")
    piped = Path("-") in audio
    if piped and (len(audio) > 1 or output_dir is not None or address is not None):
        raise typer.BadParameter("-: a recording from standard input comes alone; not with --output-dir or --address")
    if output_dir is not None:
        check_writable(output_dir / "skipped.jsonl")
    network = network_name(model, streaming)
    problems: list[Problem] = []
    done = kept = 0
    with _standard_input() if piped else nullcontext(audio) as recordings:
        for result in run(
            recordings,
            options,
            network=network,
            format=format,
            output_dir=output_dir,
            overwrite=overwrite,
            workers=workers,
            address=address,
        ):
            if (problem := result.problem) is not None:
                problem = replace(problem, where="standard input") if piped else problem
                complain(problem)
                problems.append(problem)
            elif result.kept is not None:
                kept += 1
            else:
                done += 1
            if output_dir is None:  # of a row that cannot be read the reason, in its place
                print(result.text, end="", flush=True)
    if output_dir is not None:
        _list_skipped(output_dir / "skipped.jsonl", recordings, problems)
    if output_dir is not None or done + len(problems) > 1:
        kept_too = f", {kept} there already (--overwrite does them again)" if kept else ""
        tell(f"{done} transcribed{kept_too}, {len(problems)} failed")
    end(problems, listed=done + kept + len(problems) > 1)


@contextmanager
def _standard_input() -> Iterator[list[Path]]:
    """A file that holds the recording which standard input brings, as long as it is needed."""
    from pipelines.stream import standard_input

    source = standard_input()
    with tempfile.TemporaryDirectory(prefix="asr-") as folder:
        with open(Path(folder) / "stdin", "wb") as file:
            shutil.copyfileobj(source, file)
        yield [Path(file.name)]


def _list_skipped(path: Path, inputs: Sequence[Path], problems: Sequence[Problem]) -> None:
    """List what failed, beside what failed of other inputs in earlier commands."""
    from pipelines.formats import write_text

    here = [os.path.abspath(each) for each in inputs]
    mine = tuple(f"{each.rstrip(os.sep)}{mark}" for each in here for mark in (":", os.sep))

    def is_mine(line: str) -> bool:
        try:
            where = os.path.abspath(json.loads(line)["where"])
        except (ValueError, TypeError, KeyError):  # another program's
            return False
        return where in here or where.startswith(mine)

    old = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if path.is_file() else []
    lines = [line for line in old if not is_mine(line)]
    lines += [json.dumps(asdict(problem), ensure_ascii=False) for problem in problems]
    if lines:
        write_text(path, "".join(f"{line}\n" for line in lines))
    else:
        path.unlink(missing_ok=True)


@app.command(rich_help_panel=RECOGNIZE)
def stream(
    audio: Annotated[
        Path | None,
        typer.Argument(help="A recording; - for 16-bit samples, mono, from a pipe; without it, the microphone."),
    ] = None,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Feed the recording at the pace at which it was spoken.")
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", "-d", help="Microphone: its number, or part of its name.")
    ] = None,
    rate: Annotated[int, typer.Option(metavar="HZ", help="Of the samples from a pipe.")] = 16_000,
    list_devices: Annotated[bool, typer.Option("--list-devices", help="Show the microphones and exit.")] = False,
    json_lines: Annotated[
        bool, typer.Option("--json", help="Partials and finished segments as JSON objects on stdout, a line each.")
    ] = False,
    two_pass: Annotated[
        bool, typer.Option("--two-pass", help="Read finished segments again with the offline network.")
    ] = False,
    model: ModelOption = None,
    decoding: DecodingOption = None,
    beam: BeamOption = None,
    lm_weight: LmWeightOption = None,
    word_score: WordScoreOption = None,
    hot_words: HotWordsOption = None,
    rule: RulesOption = None,
    engine: EngineOption = "onnx",
    precision: PrecisionOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Show text while it is spoken, into a microphone or in a file fed as live audio.

    Finished segments go to stdout. The unfinished text, which may still change,
    goes to stderr: redrawn in place on a terminal, elsewhere a line a change.
    --json: both on stdout, as the messages of the server (docs/server.md).
    Ctrl-C ends with the text so far. The microphone needs the extra \\[mic].
    """
    from pipelines.stream import FileSource, MicrophoneSource, PipeSource, devices, terminal
    from pipelines.stream import stream as run

    if list_devices:
        print(devices(), end="")
        return
    piped = audio == Path("-")
    if realtime and (audio is None or piped):
        raise typer.BadParameter("--realtime is for a recording; a microphone and a pipe always are")
    if rate != 16_000 and not piped:
        raise typer.BadParameter("--rate is for samples from a pipe (-); a recording and a microphone tell theirs")
    if audio is not None and device is not None:
        raise typer.BadParameter("--device is for the microphone; leave out the recording")
    search = {"beam": beam, "lm_weight": lm_weight, "word_score": word_score, "hot_words": hot_words}
    options = recognizer_options(model, decoding, engine, precision, threads, rule, **search)
    if piped:
        source = PipeSource(rate)
    elif audio is not None:
        source = FileSource(audio, realtime=realtime)
    else:
        source = MicrophoneSource(int(device) if device is not None and device.isdecimal() else device)
        tell(f"opening the microphone at {source.sample_rate} Hz; Ctrl-C ends")
    with terminal(json_lines=json_lines) as screen:
        _, timing, interrupted = run(source, options, screen, two_pass=two_pass)
    tell(str(timing))
    if interrupted and audio is not None:
        raise typer.Exit(130)


@app.command(rich_help_panel=RECOGNIZE)
def bench(
    audio: Annotated[list[Path], typer.Argument(help="Some recordings of speech, a few seconds each.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to a file as well.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION",
            help="Repeatable: machine, features, exactness, stream, streams, batch, search, training, server.",
        ),
    ] = None,
    server: Annotated[bool, typer.Option("--server", help="Also live sessions over `asr serve`.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; figures are their medians.")] = 5,
    seconds: Annotated[float, typer.Option(min=1, help="To keep up many live streams, at each number tried.")] = 60,
    model: ModelOption = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Cores where more than one is used; without it, all.")
    ] = None,
) -> None:
    """Measure what recognition and training cost on this machine (extra \\[train]).

    Features, one live stream, many live streams, files in batches, beam search
    and training, each beside other libraries or plain PyTorch, interleaved in one
    run, and beside what this machine's memory and arithmetic allow.
    """
    import os

    from pipelines.bench import USUAL, run_bench
    from pipelines.bench.setting import Setting

    setting = Setting(
        audio=tuple(audio),
        model=model,
        rounds=rounds,
        threads=threads or os.cpu_count() or 1,
        seconds=seconds,
        tell=tell,
    )
    sections = tuple(only or USUAL) + (("server",) if server else ())
    run_bench(setting, sections, json_file)

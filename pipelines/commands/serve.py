"""The command that serves live audio and recordings to others: serve."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from asr.errors import AsrError
from pipelines.commands.options import (
    HOW,
    RECOGNIZE,
    BeamOption,
    DecodingOption,
    EngineOption,
    HotWordsOption,
    LmWeightOption,
    ModelOption,
    NbestOption,
    PrecisionOption,
    RulesOption,
    WordScoreOption,
    app,
    recognizer_options,
    tell,
)

SAFETY = "Who may use it"
BOUNDS = "How much a client may cost"


@app.command(rich_help_panel=RECOGNIZE)
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; any but this machine's own needs --token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="For the page, /v1/stream and OpenAI's clients.")] = 8000,
    vosk_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Speak Vosk's protocol there (2700).")] = None,
    sherpa_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Speak sherpa-onnx's protocol there (6006).")
    ] = None,
    two_pass: Annotated[
        bool, typer.Option("--two-pass", help="Read finished segments again with the offline network.")
    ] = False,
    log_text: Annotated[bool, typer.Option("--log-text", help="Write what is said into the log.")] = False,
    token: Annotated[
        str | None,
        typer.Option(envvar="ASR_TOKEN", show_envvar=True, help="What clients must know.", rich_help_panel=SAFETY),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Another web page that may use it; repeatable.", rich_help_panel=SAFETY),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate (PEM), for https.", rich_help_panel=SAFETY)] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).", rich_help_panel=SAFETY)] = None,
    max_sessions: Annotated[
        int | None,
        typer.Option(
            min=1, help="Live sessions at a time. Unless given 256, by beam 8 a core.", rich_help_panel=BOUNDS
        ),
    ] = None,
    max_minutes: Annotated[
        float, typer.Option(min=0.01, help="Of audio in one session or recording.", rich_help_panel=BOUNDS)
    ] = 240,
    max_upload: Annotated[
        int, typer.Option(min=1, metavar="MB", help="Size of a recording.", rich_help_panel=BOUNDS)
    ] = 100,
    idle: Annotated[
        float,
        typer.Option(min=0.01, metavar="SECONDS", help="Until who is silent is closed.", rich_help_panel=BOUNDS),
    ] = 30,
    model: ModelOption = None,
    decoding: DecodingOption = None,
    beam: BeamOption = None,
    lm_weight: LmWeightOption = None,
    word_score: WordScoreOption = None,
    nbest: NbestOption = None,
    hot_words: HotWordsOption = None,
    rule: RulesOption = None,
    engine: EngineOption = "onnx",
    precision: PrecisionOption = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Cores for the live sessions; without it, all.", rich_help_panel=HOW),
    ] = None,
) -> None:
    """Serve a page to talk to, and clients written for OpenAI, Vosk and sherpa-onnx (extra \\[server]).

    / is the page, /v1/stream a websocket for live audio, /v1/audio/transcriptions
    OpenAI's endpoint; /health and /metrics are for those who run it. The log goes
    to stderr, a JSON object a line, without anyone's audio or text.

    Ctrl-C or SIGTERM ends it: who is connected gets what was said so far.
    docs/server.md tells all of it.
    """
    search = {"beam": beam, "lm_weight": lm_weight, "word_score": word_score, "nbest": nbest, "hot_words": hot_words}
    options = recognizer_options(model, decoding, engine, precision, 1, rule, **search)
    try:
        from pipelines.serve.access import Access
        from pipelines.serve.limits import Limits
        from pipelines.serve.run import Addresses, Settings, run
    except ModuleNotFoundError as error:
        raise AsrError(
            f"this needs {error.name}, which is not installed: pip install 'streaming-asr[server]'"
        ) from None

    cores = threads or os.cpu_count() or 1
    settings = Settings(
        port=port,
        vosk_port=vosk_port,
        sherpa_port=sherpa_port,
        access=Access(token=token, origins=tuple(allow_origin or ()), host=host),
        limits=Limits(
            sessions=max_sessions or (8 * cores if options.decoding == "beam" else Limits.sessions),
            audio_seconds=max_minutes * 60,
            idle_seconds=idle,
            upload_bytes=max_upload << 20,
        ),
        tls_cert=tls_cert,
        tls_key=tls_key,
        two_pass=two_pass,
        threads=cores,
        log_text=log_text,
    )

    def started(addresses: Addresses) -> None:
        print(f"talk to it: {addresses.main}", flush=True)
        for name, address in (("Vosk", addresses.vosk), ("sherpa-onnx", addresses.sherpa)):
            if address:
                print(f"{name} clients: {address}", flush=True)
        if sys.stdin.isatty():
            tell("Ctrl-C ends it")

    run(options.load(), settings, started)

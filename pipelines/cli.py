"""The command `asr`: its help and its exit status. The commands are in pipelines.commands."""

import io
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from asr.errors import AsrError, ConfigError
from pipelines.commands import evaluate, inside, recognize, serve, training  # noqa: F401 (they add themselves to `app`)
from pipelines.commands.options import app, complain, tell
from pipelines.memory import keep_memory

EXAMPLES = """
[bold]Examples[/bold]

Recognize with the model that comes along:
  asr transcribe interview.mp3
  asr transcribe recordings/ --format srt --output-dir subtitles/
  asr stream                       [dim]# speak; Ctrl-C ends[/dim]
  asr stream talk.wav --realtime   [dim]# a file as if it were live[/dim]

Train a model on recordings of your own, in English (other languages: README.md):
  asr prepare train.jsonl --out data/mine --workers 2 --lexicon cmudict
  asr prepare dev.jsonl --out data/mine_dev
  asr align data/mine
  asr train configs/own_streaming.toml --workers 2 --out runs/mine
  asr evaluate --model runs/mine/model test.jsonl
  asr export runs/mine -o mymodel
  asr train-lm text.txt --out mymodel  [dim]# the beam search uses it[/dim]

[bold]Exit status[/bold]  0 all well, 1 something failed (named on stderr), 2 wrong usage, 130 interrupted.
"""


TRAIN_PACKAGES = {
    "torch",
    "torchaudio",
    "ray",
    "pyarrow",
    "safetensors",
    "tensorboard",
    "onnx",
    "numba",
    "matplotlib",
}


@app.callback(invoke_without_command=True, epilog=EXAMPLES)
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave with its exit status; `arguments` are those of this process unless given."""
    if arguments is None and sys.argv[1:2] == ["train"]:
        keep_memory()
    for out in (sys.stdout, sys.stderr):  # a file name need not be valid UTF-8; it must still be printed
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="surrogateescape" if out.encoding.lower() == "utf-8" else "backslashreplace")
    try:
        app(args=arguments, prog_name="asr")
    except ConfigError as error:
        complain(error)
        sys.exit(2)
    except AsrError as error:
        complain(error)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in TRAIN_PACKAGES:
            raise
        tell(f"error: this needs {error.name}, which is not installed: pip install 'streaming-asr[train]'")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder without permission
        tell(f"error: {error.filename or 'input/output'}: {error.strerror or error}")
        sys.exit(1)
    except Exception as error:
        if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):  # in the middle of an import
            sys.exit(130)
        raise


if __name__ == "__main__":
    main()

"""`torchrun -m asr.training CONFIG --out RUN`: the training loop without Ray, one process for each rank.

Plain `python -m asr.training` is one rank. `asr export RUN -o MODEL` then writes the graphs that recognition runs.
"""

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from asr.config import load_config
from asr.errors import AsrError
from asr.training.loop import run_training
from asr.training.start import with_absolute_paths


def main() -> None:
    parser = argparse.ArgumentParser(prog="asr.training", description="Train a network on prepared data, without Ray.")
    parser.add_argument("config", type=Path, help="a TOML file, such as those in configs/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run, which all ranks see")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="values")
    given = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    try:
        config = with_absolute_paths(load_config(given.config, given.values))
        if gpu:
            torch.cuda.set_device(device)
        if world > 1:
            limit = timedelta(seconds=config.training.hang_seconds)
            dist.init_process_group("nccl" if gpu else "gloo", timeout=limit)
        network = run_training(config, given.out, rank=rank, world=world, device=device)
    except AsrError as error:
        # at once, without the shutdown of a process group that waits for others: torchrun ends those
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        print(network)


if __name__ == "__main__":
    main()

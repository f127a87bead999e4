"""Runs a function of a test in N processes of their own, as torchrun would start them, with gloo on the CPU."""

import faulthandler
import os
import socket
import sys

import torch
import torch.multiprocessing as mp


def _enter(rank, function, size, port, args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    faulthandler.enable()
    torch.set_num_threads(1)
    function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    # once in some hundred runs a process aborted here, its work done: threads of gloo's that still hold a tensor while
    # Python shuts down are a known cause (torch's pull request 179291), and this process has nothing left to shut down
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(function, size, *args):
    """Calls function(*args) in `size` processes and waits; an error in any of them is raised here."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_enter, args=(function, size, port, args), nprocs=size)

"""Runs a function of a test in N processes of their own, as torchrun would start them, with gloo on the CPU."""

import os
import socket

import torch
import torch.multiprocessing as mp


def _enter(rank, function, size, port, args):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def run(function, size, *args):
    """Calls function(*args) in `size` processes and waits; an error in any of them is raised here."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_enter, args=(function, size, port, args), nprocs=size)

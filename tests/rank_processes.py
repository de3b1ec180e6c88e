"""Starts the processes of a distributed training in no time, and ends them when they hang."""

import faulthandler
import multiprocessing
import os
import socket
import traceback
from contextlib import closing

import torch

# Forked from a process that has imported everything already, and has no threads.
_CONTEXT = multiprocessing.get_context("forkserver")
# The last is what the first optimizer imports.
_CONTEXT.set_forkserver_preload(["training_runs", "minimagen_fast.trainer", "minimagen_fast.loading", "torch._dynamo"])
PATIENCE = 500


def start(function, *args, **environment):
    """A process that calls a function of a module, with one thread and these environment variables."""
    process = _CONTEXT.Process(target=_call, args=(function, args, environment), daemon=True)
    process.start()
    return process


def _call(function, args, environment):
    # Of a process that hangs it is shown where.
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)


def free_port():
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start_ranks(function, ranks, *args, local_ranks=None):
    """The processes of so many ranks, as torchrun would start them; `local_ranks` of them on each machine."""
    port, local_ranks = str(free_port()), local_ranks or ranks
    return [
        start(
            function,
            *args,
            RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_RANK=str(rank % local_ranks),
            LOCAL_WORLD_SIZE=str(local_ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(ranks)
    ]


def run_ranks(function, ranks, *args, local_ranks=None):
    """What the function returns on every rank.

    Raises:
        AssertionError: one of them raised an error, which the message holds, or died.
    """
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(ranks)]
    processes = start_ranks(_report, ranks, [sender for _, sender in pipes], function, args, local_ranks=local_ranks)
    try:
        for _, sender in pipes:
            sender.close()
        results = []
        for rank, (receiver, _) in enumerate(pipes):
            try:
                result, error = receiver.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert error is None, f"rank {rank}:\n{error}"
            results.append(result)
        return results
    finally:
        for process, (receiver, _) in zip(processes, pipes, strict=True):
            process.kill()
            process.join()
            receiver.close()


def _report(senders, function, args):
    sender = senders[int(os.environ["RANK"])]
    for other in senders:
        if other is not sender:
            other.close()
    try:
        sender.send((function(*args), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))

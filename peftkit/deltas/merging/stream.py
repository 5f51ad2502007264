"""Pieces of work done by two threads, handed on in their order; only a few are ahead, so memory does not grow."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from peftkit.deltas.merging.product import Piece, Product

WORKERS = 2
AHEAD = 4

T = TypeVar("T", bound=Product)


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that compute with one thread of torch's each, so that no sum depends on how many there are.

    So does the caller meanwhile: threads that torch would add to it wait busily, in the workers' way.
    """
    own = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(WORKERS, "merge", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(own)  # the workers' calls also set what new threads begin with


def pieces(pool: ThreadPoolExecutor, products: Iterable[T]) -> Iterator[tuple[T, Piece, bool]]:
    """(product, its next piece, whether it is its last), product after product. Raises what the work raises."""
    waiting: deque[tuple[T, Future[Piece], bool]] = deque()
    for product in products:
        jobs = iter(product.jobs())
        job = next(jobs, None)
        if job is None:  # a tensor without numbers
            job = _nothing
        while job is not None:
            following = next(jobs, None)
            waiting.append((product, pool.submit(job), following is None))
            job = following
            if len(waiting) > AHEAD:
                yield _done(waiting)
    while waiting:
        yield _done(waiting)


def _done(waiting: deque[tuple[T, Future[Piece], bool]]) -> tuple[T, Piece, bool]:
    product, future, last = waiting.popleft()
    return product, future.result(), last


def _nothing() -> Piece:
    return Piece(())

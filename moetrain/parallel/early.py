"""Sums that are made while the backward pass still computes, as far as its exchanges leave the link alone."""

from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Protocol
from weakref import ref

from torch import Tensor
from torch.nn import Parameter

from moetrain.dist.transport import Link


class Sum(Protocol):
    """One collective over the gradients of `parameters`, in place."""

    @property
    def parameters(self) -> Sequence[Parameter]: ...

    def make(self) -> None: ...


class EarlySums:
    """Makes all sums of a step in their order: each when its gradients are final and no exchange is under way.

    Exchanges go first because computation waits for them, and for sums only the update does. gloo cannot be told so: a sum beside an
    exchange takes half of the link. A sum may begin anywhere among the exchanges, and at other places on other ranks, but ranks never wait
    for each other in a ring: sums and exchanges have groups of their own, no exchange waits for a sum, and one thread makes the sums.
    """

    def __init__(self, sums: Sequence[Sum], link: Link) -> None:
        self._sums, self._link = sums, link
        self._of: dict[Parameter, list[int]] = {}
        for number, one in enumerate(sums):
            for parameter in one.parameters:
                self._of.setdefault(parameter, []).append(number)
        for parameter in self._of:
            parameter.register_post_accumulate_grad_hook(_hook(self))
        self._missing: list[int] = []  # gradients that a sum still waits for, by its number
        self._next = 0
        self._worker: _Worker | None = None

    @property
    def has_begun(self) -> bool:
        return self._worker is not None

    def begin(self) -> None:
        """Before a backward pass whose gradients are final."""
        assert self._worker is None, "the sums of the last step were neither finished nor abandoned"
        self._missing, self._next = [len(one.parameters) for one in self._sums], 0
        self._worker = _Worker(self._link)

    def finish(self) -> None:
        """After it: returns when all sums are made. Raises what one of them raised."""
        assert self._worker is not None
        worker, self._worker = self._worker, None
        for one in self._sums[self._next :]:  # some have parameters that the pass did not come by
            worker.give(one)
        worker.finish()

    def abandon(self) -> None:
        """After an error: no further sum begins. Does not wait for the one under way."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def count(self, parameter: Tensor) -> None:
        """The parameter's gradient of this pass is there. Raises what a sum has raised."""
        if self._worker is None:
            return
        if self._worker.error is not None:
            raise self._worker.error
        assert isinstance(parameter, Parameter)
        for number in self._of[parameter]:
            self._missing[number] -= 1
        while self._next < len(self._sums) and not self._missing[self._next]:
            self._worker.give(self._sums[self._next])
            self._next += 1


def _hook(sums: EarlySums) -> Callable[[Tensor], None]:
    """For autograd, which keeps it as long as the parameter lives: the parameters must not keep each other."""
    weak = ref(sums)

    def count(parameter: Tensor) -> None:
        if (its := weak()) is not None:
            its.count(parameter)

    return count


class _Worker:
    """A thread that makes the sums of one step. After an error it makes none: the other ranks would add another one to it."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._given: SimpleQueue[Sum | None] = SimpleQueue()
        self._is_ended = False
        self.error: BaseException | None = None
        self._thread = Thread(target=self._work, name="moetrain-sums", daemon=True)
        self._thread.start()

    def give(self, one: Sum) -> None:
        self._given.put(one)

    def end(self) -> None:
        """No sum begins any more."""
        self._is_ended = True
        self._given.put(None)

    def finish(self) -> None:
        self._given.put(None)
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        try:
            while (one := self._given.get()) is not None:
                self._link.settle()
                if self._is_ended:
                    return
                one.make()
        except BaseException as error:  # for the main thread
            self.error = error

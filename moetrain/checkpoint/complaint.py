"""What the operating system or an object store refuses a command, as a sentence. No torch."""

import argparse
from collections.abc import Callable

from moetrain.base.errors import CheckpointError

Run = Callable[[argparse.Namespace], int]


def in_a_sentence(run: Run) -> Run:
    """The same command; it raises CheckpointError in place of OSError."""

    def guarded(arguments: argparse.Namespace) -> int:
        try:
            return run(arguments)
        except BrokenPipeError:  # the reader of a pipe has seen enough
            raise
        except TimeoutError as error:
            raise CheckpointError("There was no answer in time.", "Try again, or look whether the other end still runs.") from error
        except OSError as error:
            hint = "Check that the path exists, is of the right kind and may be read and written; for s3:// bucket, credentials, endpoint."
            raise CheckpointError(f"{error.filename or 'The checkpoint'} cannot be used: {error.strerror or error}.", hint) from error

    return guarded

"""The tree of errors that pe-dpo raises on purpose; the command line turns each into one message and its exit code.

PeDpoError            exit 1   a run or a file failed, and the message says what to do
├── DataError                  a preference file or a row of it
├── ModelError                 a base, an adapter, or the reference that they define
│   ├── OutOfMemory             one pair does not fit into the memory of the device
│   └── MergeRefused            a merged model that is not what was trained
├── TrainingError              a run that cannot go on (non-finite loss, broken checkpoint)
├── DiskError                  a disk that is full, read-only, gone or failing
├── StoreUnavailable           the store of the reference's log-probs; a run can do without it
└── UsageError        exit 2   what was asked for is impossible; nothing was started
    ├── RecipeError            a recipe file, a preset or an override
    └── RunFolderError         an output folder that is taken, locked, or of another run
"""

from pe_dpo.printable import printable


class PeDpoError(Exception):
    """Base of every error that is a message to the user rather than a fault of this program."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message, parts of which came from elsewhere: nothing in it acts in a terminal, and it has no secrets."""
        return printable(super().__str__())


class DataError(PeDpoError):
    """A preference data set that cannot be read or used; the message names the file and the row."""


class ModelError(PeDpoError):
    """A base model, an adapter, or a reference that is not what the run needs."""


class OutOfMemory(ModelError):
    """A model and one pair of answers that do not fit into memory together."""


class MergeRefused(ModelError):
    """A merged model that does not do what the trained one did; it was not written."""


class TrainingError(PeDpoError):
    """A run that must stop; what was saved before stays valid."""


class DiskError(PeDpoError):
    """A disk that does not take or give what it is asked to; nothing half-written counts as whole."""


class StoreUnavailable(PeDpoError):
    """A reference store that cannot be made, read or written; its caller may go on without one."""


class UsageError(PeDpoError):
    """A request that cannot be carried out as given; raised before anything was started."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe, preset or override that is malformed or contradicts itself."""


class RunFolderError(UsageError):
    """An output folder that holds another run, is in use, or cannot be resumed from."""


def describe_error(error: BaseException) -> str:
    """Return an error in a line: the message of one of ours; of any other its kind and the first line of what it says."""
    if isinstance(error, PeDpoError):
        return str(error)
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].removesuffix(": ")

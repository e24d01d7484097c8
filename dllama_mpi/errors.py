"""What can go wrong by a user's hand. Each message is one line: the value, the limit, the remedy.

DllamaError
├── UsageError      arguments and options
├── ModelError      a model's files and what they describe
├── RequestError    one prompt or its sampling parameters; the program lives on
│   └── QueueFull   too many requests wait
└── ClusterError    ranks, hosts, launchers and memory

The command line prints such an error once and ends every rank with exit status 2. Anything else is a fault
of the program and shows a traceback.
"""


def printable(text: str) -> str:
    """Return a text in one line, without what would move a terminal's cursor: names in it may be a stranger's."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


class DllamaError(Exception):
    """A user's mistake, told in one line.

    Attributes:
        agreed: every rank raises this error, so that one tells it for all and nobody has to end the others.
    """

    agreed = False

    def __str__(self) -> str:
        return printable(super().__str__())


class UsageError(DllamaError):
    """An option or argument that cannot be used."""


class ModelError(DllamaError):
    """A model directory that is missing, damaged, unknown or does not fit its own config."""


class RequestError(DllamaError):
    """A prompt or sampling parameter outside its limits."""


class QueueFull(RequestError):
    """As many requests wait as may; the same request can be made later."""


class ClusterError(DllamaError):
    """Ranks, launchers, hosts or memory that do not fit the job."""

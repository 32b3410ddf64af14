"""What ends a run and is not a bug: a user's mistake, a run that cannot continue, a request to stop."""


class UserError(ValueError):
    """A wrong key, value, file or record. The message names it, says what is wrong and what would be right.

    Entry points print the message in one rank's log and exit with code 2; a traceback would only hide it.
    Programming mistakes are asserts, never this.
    """


class RunFailed(Exception):
    """A run cannot continue, and the message contains all there is to know. Raised on all ranks of a layout. Exit code 1."""


class Interrupted(Exception):
    """The run was asked to stop, has saved, and can continue from there with run.auto_resume=true. Exit code 75."""

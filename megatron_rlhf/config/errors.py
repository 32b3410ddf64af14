"""What ends a run and is no bug: a user's mistake, a run that cannot go on, a request to stop."""


class UserError(ValueError):
    """A wrong key, value, file or record. The message names it, says what is wrong and what would be right.

    Entry points print the message on one rank's log and exit with code 2; a traceback would only hide it.
    Programmers' mistakes are asserts, never this.
    """


class RunFailed(Exception):
    """A run cannot go on, and the message says all there is to know. Raised on all ranks of a layout. Exit code 1."""


class Interrupted(Exception):
    """The run was asked to stop, has saved, and can go on from there with run.auto_resume=true. Exit code 75."""

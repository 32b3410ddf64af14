"""The one exception type for mistakes that a user can mend."""


class UserError(ValueError):
    """A wrong key, value, file or record. The message names it, says what is wrong and what would be right.

    Entry points print the message on one rank's log and exit with code 2; a traceback would only hide it.
    Programmers' mistakes are asserts, never this.
    """

"""The one kind of error that is addressed to a person."""


class UserError(ValueError):
    """Something the user can mend, told in one sentence: the value, the limit and the way out.

    The command line prints the sentence and exits with code 2; a program may catch it like any ValueError.
    """

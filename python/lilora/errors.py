class UserError(ValueError):
    """A mistake the user can mend: one sentence that says what came, what is wanted and what to do.

    The command line prints it without a traceback and exits with code 2.
    """

"""What a user gave and a command cannot use."""


class UserError(Exception):
    """Wrong input; the message, one line, names it."""

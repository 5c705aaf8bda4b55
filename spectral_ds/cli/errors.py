"""What a user gave and a command cannot use."""


class UserError(Exception):
    """Wrong input; the message, one line, names it."""


class DataError(Exception):
    """Text that cannot be used; the message says why, and who gave its path says which."""

"""The one error for bad input."""


class UserError(Exception):
  """Something the user can fix. The message is one line: what is wrong, where, and the remedy.

  The command line prints it without a traceback and exits with code 2.
  """
